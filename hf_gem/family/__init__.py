"""The families of activations: their names and their formulas, one file per family.

`egem` and `segem` come with the package. To add your own family, write one file: define a `Family` from functions that
use `arithmetic`, and call `hf_gem.register_family`.
"""

from . import egem, segem  # noqa: F401  # importing them adds their families to the table
