"""Runs the test suites of transformers and timm with our activations and with their own; see run.py."""
