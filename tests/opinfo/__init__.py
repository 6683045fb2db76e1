"""The family under PyTorch's own test machinery, and every kind of derivative of it."""
