"""The command line `hf-gem`, with one file for each group of commands. Commands import what they need when they run."""

from .app import app, main

__all__ = ["app", "main"]
