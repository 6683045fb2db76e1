"""The families of activations: what they are called, and what they compute. One file for each.

`egem` and `segem` are ours. A family of your own is one file too: a `Family` made of functions that use `arithmetic`,
and a call of `hf_gem.register_family`.
"""

from . import egem, segem  # noqa: F401  # put their families into the table
