"""The test suites of transformers and timm, run with an activation of the family and with their own: see run.py."""
