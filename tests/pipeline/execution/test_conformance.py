"""Executors keep their contract, all of them the same one."""

from __future__ import annotations

import pytest

from mmerge.pipeline.execution.executor import SerialExecutor
from mmerge.pipeline.execution.process_executor import ProcessExecutor
from mmerge.pipeline.execution.ray_executor import RayExecutor
from mmerge.pipeline.testing import ExecutorConformance, SeparateProcessConformance


class TestSerial(ExecutorConformance):
    def make_executor(self) -> SerialExecutor:
        return SerialExecutor(num_threads=2)


class TestProcesses(SeparateProcessConformance):
    def make_executor(self) -> ProcessExecutor:
        return ProcessExecutor(num_processes=2)


@pytest.mark.ray
class TestRay(SeparateProcessConformance):
    def make_executor(self) -> RayExecutor:
        return RayExecutor(num_workers=2)
