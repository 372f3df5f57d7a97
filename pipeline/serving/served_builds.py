"""The models of a server: a composite, and each of its experts rebuilt when somebody asks for it.

A reference such as STORE#NAME is followed: when it names a newer build, that one is loaded beside
the old one and answers from then on. Prompts that came before are answered by the old build.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Protocol

from mmerge.manifests.errors import MmergeError
from mmerge.manifests.format.references import open_build, open_reference, split_uri
from mmerge.pipeline.serving.api_errors import ApiError
from mmerge.pipeline.serving.server_metrics import ServerMetrics
from mmerge.workers.composite.model import Composite

_log = logging.getLogger(__name__)


class Loader(Protocol):
    """Loads a composite, or one of its experts."""

    def __call__(self, uri: str, *, expert: str | None, reuse: Composite | None) -> Composite:
        """Return it; weights that are equal in `reuse` are shared and not fetched again."""


@dataclass(frozen=True, eq=False)
class ServedModel:
    """A loaded model under the name that requests give."""

    name: str
    build: str
    """Digest of its build."""
    composite: Composite
    created: int = field(default_factory=lambda: int(time.time()))


class ServedBuilds:
    """What a server answers with. Threads may share it."""

    def __init__(
        self,
        uri: str,
        *,
        load: Loader,
        metrics: ServerMetrics,
        name: str | None = None,
        max_experts: int = 1,
    ) -> None:
        """Load the composite at `uri`.

        Args:
            uri: STORE#NAME is followed to newer builds; STORE#NAME@NUMBER and STORE#DIGEST stay.
            load: of composites and experts.
            metrics: told of the build and its changes.
            name: of the composite in requests; that of its reference if None. Experts are
                NAME/EXPERT.
            max_experts: rebuilt experts in memory at once, each a whole model. With 0 none is
                served.
        """
        self._uri, self._load, self._metrics = uri, load, metrics
        self._max_experts = max_experts
        self._turn = threading.Lock()
        """Held while a model is loaded."""
        _, build, reference = open_reference(uri)
        composite = load(self._uri_of(build), expert=None, reuse=None)
        self._name = name or (reference.name if reference is not None else build[:12])
        self._main = ServedModel(self._name, build, composite)
        self._experts: OrderedDict[str, ServedModel] = OrderedDict()
        metrics.show_build(build)

    @property
    def main(self) -> ServedModel:
        """The composite that answers now."""
        return self._main

    def list_models(self) -> list[tuple[str, str, int]]:
        """Return name, build and time of creation of every model that can be asked."""
        main = self._main
        names = [main.name]
        if self._max_experts:
            names += [f"{main.name}/{record.name}" for record in main.composite.manifest.experts]
        return [(name, main.build, main.created) for name in names]

    def find(self, name: str) -> ServedModel:
        """Return a model by its name; an expert may have to be loaded first.

        Raises:
            ApiError: 404; there is no such model. 503; the expert cannot be loaded.
        """
        main = self._main
        if name == main.name:
            return main
        known = [known for known, _, _ in self.list_models()]
        if name not in known:
            raise ApiError(
                404,
                f"model {name[:200]!r} does not exist. There are {', '.join(known)}",
                param="model",
                code="model_not_found",
            )
        with self._turn:
            return self._find_expert(name)

    def _find_expert(self, name: str) -> ServedModel:
        main = self._main
        loaded = self._experts.get(name)
        if loaded is not None and loaded.build == main.build:
            self._experts.move_to_end(name)
            return loaded
        self._experts.pop(name, None)
        while len(self._experts) >= self._max_experts:
            self._experts.popitem(last=False)  # freed once its last answer has ended
        expert = name.removeprefix(f"{main.name}/")
        try:
            composite = self._load(self._uri_of(main.build), expert=expert, reuse=None)
        except MmergeError as error:
            _log.error("model %s cannot be loaded: %s", name, error)
            raise ApiError(
                503, f"model {name!r} cannot be loaded; the server's log has the reason"
            ) from error
        self._experts[name] = ServedModel(name, main.build, composite)
        return self._experts[name]

    def refresh(self) -> bool:
        """Load the build that the reference names now, if it is another; return whether it was.

        Where it cannot be loaded the present one goes on to answer, and the log says why.
        """
        with self._turn:
            try:
                build = open_build(self._uri)[1]
                if build == self._main.build:
                    return False
                composite = self._load(self._uri_of(build), expert=None, reuse=self._main.composite)
            except MmergeError as error:
                _log.error("the newer build cannot be served, the present one stays: %s", error)
                self._metrics.swaps.labels("failed").inc()
                return False
            self._main = ServedModel(self._name, build, composite)
            self._experts.clear()
        self._metrics.swaps.labels("done").inc()
        self._metrics.show_build(build)
        _log.info("build %s answers now", build)
        return True

    def _uri_of(self, build: str) -> str:
        """Return the URI of one build, whatever the reference names by then."""
        return f"{split_uri(self._uri)[0]}#{build}"
