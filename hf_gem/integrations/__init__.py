"""Integration with other libraries: `register()` and `unregister()`."""

from .hooks import register, unregister

__all__ = ["register", "unregister"]
