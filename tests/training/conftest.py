"""Every test gets an accelerator of its own: accelerate keeps its state for the life of the process."""

import pytest
from accelerate.state import AcceleratorState


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
