"""The families of activations: what they are called, and what they compute."""
