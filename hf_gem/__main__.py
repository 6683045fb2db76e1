"""`python -m hf_gem` is `hf-gem`, for launchers that take a module: `torchrun -m hf_gem run train.py`."""

from .cli import main

if __name__ == "__main__":
    main()
