"""The kernels: one forward and one backward pass for all families, with several backends.

`dispatch` chooses the backend: `plain` is the formulas in plain torch, `cpu` (with `cpu.cpp` and `build`) is C++, and
`gpu` (with `triton_kernels`) is Triton. `symbols` and `printer` translate the formulas of a family into C++ and Triton.
"""

from .dispatch import BACKENDS, check_save, keeps_output, kernels, run
from .printer import DTYPES

__all__ = ["BACKENDS", "DTYPES", "check_save", "keeps_output", "kernels", "run"]
