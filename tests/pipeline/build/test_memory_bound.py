"""Memory is stated before it is used: the bound of every task against what the task takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = """
import json, sys
from pathlib import Path
from mmerge.pipeline import make_plan, read_recipe, run
from mmerge.pipeline.execution.executor import SerialExecutor
from mmerge.workers.tasks.run import run_task

def memory(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(key))
    return int(line.split()[1]) * 1024

class Measuring(SerialExecutor):
    def run(self, tasks, store_uri, follow):
        waiting = list(tasks)
        while waiting:
            task = waiting.pop(0)
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
            before = memory("VmRSS")
            result = run_task(task, store_uri)
            growth = memory("VmHWM") - before
            found.append([type(task).__name__, task.shard, growth, task.peak_bytes])
            waiting += follow(task, result)
            yield task, result

found = []
run(make_plan(read_recipe(sys.argv[1])), executor=Measuring())
print(json.dumps(found))
"""


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(),
    reason="the high-water mark of memory can be reset on Linux alone",
)
@pytest.mark.parametrize(
    "recipe",
    [
        {"method": "breadcrumbs"},
        {"method": "ties", "scope": "tensor", "count": "exact", "density": 0.4},
        {"method": "sce", "select_topk": 0.5},
        {"method": "della", "rescale": "norm"},
        {"method": "pcb", "scope": "tensor"},
        {"method": "emr"},
    ],
    ids=lambda recipe: str(recipe["method"]),
)
def test_no_task_takes_more_memory_than_it_states(recipe: dict[str, Any], lab: Any) -> None:
    lab.config |= {
        "hidden_size": 1024,
        "intermediate_size": 256,
        "head_dim": 64,
        "vocab_size": 3000,
        "num_hidden_layers": 1,
    }
    raw = lab.make_all(2)
    path = lab.write_recipe(raw | recipe)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(path)], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert {"MergeTask", "ScanTask", "CopyTask"} <= {kind for kind, *_ in found}
    for kind, shard, taken, stated in found:
        assert taken <= stated, f"{kind} {shard} took {taken:,} bytes, its bound is {stated:,}"
