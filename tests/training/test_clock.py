"""The clock counts what training does, and leaves out what else goes on."""

import pytest
import torch

from hf_gem.training import clock as module
from hf_gem.training.clock import Clock


@pytest.fixture
def now(monkeypatch):
    """A time that passes when the test says so."""
    passed = [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: passed[0])

    def wait(seconds):
        passed[0] += seconds

    return wait


def test_rate_and_share_of_waiting(now):
    clock = Clock(torch.device("cpu"))
    for _ in range(2):
        with clock.waiting():
            now(1.0)
        now(3.0)
        clock.add(40)
    assert clock.lap() == (10.0, 0.25)
    now(2.0)
    clock.add(2)
    assert clock.lap() == (1.0, 0.0)  # since the lap before


def test_pauses_do_not_count(now):
    clock = Clock(torch.device("cpu"))
    now(2.0)
    with clock.paused():
        now(50.0)
    clock.add(6)
    assert clock.lap() == (3.0, 0.0)
