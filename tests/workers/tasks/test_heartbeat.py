"""Heartbeat logging of long tasks."""

from __future__ import annotations

import logging
import threading

import pytest

from mmerge.workers.tasks.heartbeat import Heartbeat


def test_a_long_task_says_which_tensor_it_is_at(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mmerge.run")
    heard = threading.Event()

    class _Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.set()

    listener = _Listener()
    logging.getLogger("mmerge.run").addHandler(listener)
    try:
        with Heartbeat("layers.3: wudi", num_steps=7, seconds=0.01) as heartbeat:
            heartbeat.start_step("q_proj [8, 8]")
            heartbeat.start_step("k_proj [8, 8]")
            assert heard.wait(30)
    finally:
        logging.getLogger("mmerge.run").removeHandler(listener)
    assert "layers.3: wudi: 2 of 7, k_proj [8, 8], after" in caplog.text


def test_a_short_task_says_nothing_and_leaves_no_thread(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mmerge.run")
    with Heartbeat("norm: linear", num_steps=1) as heartbeat:
        heartbeat.start_step("norm.weight [8]")
    assert not caplog.text
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("heartbeat")]
