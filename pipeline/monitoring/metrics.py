"""Ray metrics of a run, which Prometheus collects from every node: bytes, shards, seconds.

Prometheus shows the names with the prefix `ray_`. `infra/monitoring/` has a dashboard and alerts
for them.
"""

from __future__ import annotations

from typing import Any

from typing_extensions import override

from mmerge.pipeline.monitoring.progress import Progress
from mmerge.workers.task import TaskResult

TAGS = ("composite", "phase")
COUNTERS = {
    "mmerge_bytes_read": "Bytes of base and experts that tasks have read.",
    "mmerge_bytes_written": "Bytes of objects that tasks have written.",
    "mmerge_shards_done": "Shards that were computed.",
    "mmerge_shards_reused": "Shards that were already in the store.",
    "mmerge_shards_failed": "Shards that failed.",
}
GAUGES = {
    "mmerge_shards_total": "Shards of the phase, including those already in the store.",
    "mmerge_bytes_to_read": "Bytes that the phase reads.",
}
HISTOGRAMS = {"mmerge_task_seconds": "Seconds that a task takes."}
BOUNDARIES = [0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0]


class MetricsProgress(Progress):
    """Updates the metrics of one composite; Ray exports them once this process is connected."""

    def __init__(self, composite: str) -> None:
        from ray.util import metrics

        self._composite = composite
        self._totals: dict[str, tuple[int, int]] = {}
        self._instruments: dict[str, Any] = {
            name: metrics.Counter(name, text, TAGS) for name, text in COUNTERS.items()
        }
        self._instruments |= {
            name: metrics.Gauge(name, text, TAGS) for name, text in GAUGES.items()
        }
        self._instruments |= {
            name: metrics.Histogram(name, text, BOUNDARIES, TAGS)
            for name, text in HISTOGRAMS.items()
        }

    def _tags(self, phase: str) -> dict[str, str]:
        return {"composite": self._composite, "phase": phase}

    @override
    def begin(self, phase: str, *, num_bytes: int, num_tasks: int, num_reused: int) -> None:
        tags = self._tags(phase)
        shards, size = self._totals.get(phase, (0, 0))
        self._totals[phase] = shards + num_tasks + num_reused, size + num_bytes
        self._instruments["mmerge_shards_total"].set(self._totals[phase][0], tags)
        self._instruments["mmerge_bytes_to_read"].set(self._totals[phase][1], tags)
        self._add("mmerge_shards_reused", num_reused, tags)

    @override
    def advance(self, phase: str, result: TaskResult) -> None:
        tags = self._tags(phase)
        self._add("mmerge_shards_reused" if result.reused else "mmerge_shards_done", 1, tags)
        self._add("mmerge_bytes_read", result.num_bytes, tags)
        if result.entry is not None and not result.reused:
            self._add("mmerge_bytes_written", result.entry.object.num_bytes, tags)
        self._instruments["mmerge_task_seconds"].observe(max(result.seconds, 1e-6), tags)

    @override
    def fail(self, phase: str, shard: str, error: Exception) -> None:
        self._add("mmerge_shards_failed", 1, self._tags(phase))

    def _add(self, name: str, amount: float, tags: dict[str, str]) -> None:
        if amount > 0:  # Ray refuses to increment a counter by 0
            self._instruments[name].inc(amount, tags)
