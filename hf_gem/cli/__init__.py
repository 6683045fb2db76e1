"""The command line `hf-gem`: one file for each group of commands. What a command needs is imported when it runs."""

from .app import app, main

__all__ = ["app", "main"]
