"""A whole server from its settings: models, scheduler and HTTP application."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from mmerge.pipeline.serving.door import Door
from mmerge.pipeline.serving.http_app import make_http_app
from mmerge.pipeline.serving.scheduler import BatchSettings, Scheduler
from mmerge.pipeline.serving.served_builds import Loader, ServedBuilds
from mmerge.pipeline.serving.server_metrics import ServerMetrics
from mmerge.workers.composite.loader import load_composite
from mmerge.workers.composite.model import Composite
from mmerge.workers.composite.routed_linear import Policy
from mmerge.workers.tasks.answer import register_from


class ServeSettings(BaseModel):
    """What is served, and how: options of `mmerge serve`, and `args` of the Ray Serve application.

    The fields are the options of the command.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    uri: str
    """STORE#NAME, whose newer builds take over; STORE#NAME@NUMBER and STORE#DIGEST stay."""
    model_name: str | None = None
    device: str = "cpu"
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    policy: Policy = "packed"
    encoders: tuple[str, ...] = ()
    """Functions "module:function" that register encoders."""
    check: bool = True
    """Compare a small prompt with the experts' own classes at each load."""
    refresh_s: float = Field(30.0, ge=0)
    max_experts: int = Field(1, ge=0)
    max_batch: int = Field(16, ge=1, le=1024)
    max_queue: int = Field(64, ge=1)
    max_prompt_tokens: int | None = Field(None, ge=1)
    max_new_tokens: int = Field(512, ge=1)
    no_api_key: bool = False
    """Serve everyone."""


def make_loader(settings: ServeSettings) -> Loader:
    """Return what loads a model onto the device of a server, see `load_composite`."""

    def load(uri: str, *, expert: str | None, reuse: Composite | None) -> Composite:
        return load_composite(
            uri,
            mode="retention" if expert else "expansion",
            expert=expert,
            device=settings.device,
            dtype=None if settings.dtype is None else getattr(torch, settings.dtype),
            policy=settings.policy,
            check=settings.check,
            reuse=reuse,
        )

    return load


def make_application(
    settings: ServeSettings, *, keys: Sequence[str] = ()
) -> tuple[Door, ServedBuilds]:
    """Return the ASGI application of a server whose composite is loaded, and its models.

    Args:
        settings: of the server.
        keys: API keys, one of which a request must have; none: everyone may ask.

    Raises:
        MmergeError: the composite cannot be loaded.
    """
    for target in settings.encoders:
        register_from(target)
    metrics = ServerMetrics()
    builds = ServedBuilds(
        settings.uri,
        load=make_loader(settings),
        metrics=metrics,
        name=settings.model_name,
        max_experts=settings.max_experts,
    )
    scheduler = Scheduler(
        BatchSettings(
            max_batch=settings.max_batch,
            max_queue=settings.max_queue,
            max_prompt_tokens=settings.max_prompt_tokens,
            default_new_tokens=settings.max_new_tokens,
        ),
        metrics=metrics,
    )
    app = make_http_app(
        builds, scheduler, metrics=metrics, keys=keys, refresh_s=settings.refresh_s or None
    )
    return app, builds
