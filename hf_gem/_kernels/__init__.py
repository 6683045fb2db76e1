"""What computes the family: one forward and one backward for all of it, by backend.

`dispatch` chooses, `formulas` is plain torch, `cpu` (with `cpu.cpp` and `build`) C++, `gpu` (with `triton_kernels`)
Triton. `symbols` and `printer` write the formulas of a family in both languages.
"""

from .dispatch import BACKENDS, check_save, keeps_output, kernels, run
from .printer import DTYPES

__all__ = ["BACKENDS", "DTYPES", "check_save", "keeps_output", "kernels", "run"]
