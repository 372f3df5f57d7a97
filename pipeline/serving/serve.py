"""The server as a Ray Serve application, run by `infra/kubernetes/base/service`.

Each replica is a whole server: the same protocol, limits and API keys (MMERGE_API_KEY in the
environment of the replicas) as `mmerge serve`.
"""

from __future__ import annotations

from typing import Any

from ray import serve

from mmerge.manifests.errors import MmergeError
from mmerge.pipeline.serving.application import ServeSettings, make_application
from mmerge.pipeline.serving.door import KEY_VARIABLE, Door, read_keys


class CompositeServer:
    """One replica. Ray Serve hands every HTTP request to its ASGI application."""

    def __init__(self, settings: dict[str, Any]) -> None:
        """Keep the settings; the composite is loaded by the application's builder."""
        self.settings = settings


def make_app(args: dict[str, Any]) -> Any:
    """Return the application; `args` are the fields of `ServeSettings`.

    Raises:
        ValidationError: `args` do not fit `ServeSettings`; raised before a replica starts.
    """
    settings = ServeSettings.model_validate(args)

    def build() -> Door:
        keys = () if settings.no_api_key else read_keys(None)
        if not keys and not settings.no_api_key:
            raise MmergeError(
                f"{KEY_VARIABLE} is not set where the replicas run, and Ray Serve listens on all"
                " addresses. Set it, or give 'no_api_key: true' to serve everyone"
            )
        return make_application(settings, keys=keys)[0]

    deployment: Any = serve.deployment(serve.ingress(build)(CompositeServer))
    return deployment.bind(settings.model_dump())
