"""The order of samples, a pure function of seed and step, and random numbers that are one of seed and sample."""

from __future__ import annotations

import functools
import hashlib

import numpy as np


class SampleOrder:
    """Endless shuffled passes over `num_samples` samples, a new permutation for each.

    The batch of a step depends on seed, step and batch size only, so it is the same on any number of processes, for
    any split into micro-batches, and after a restart.
    """

    def __init__(self, num_samples: int, seed: int) -> None:
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        self.num_samples = num_samples
        self.seed = seed
        self._permutation = functools.lru_cache(maxsize=2)(self._make_permutation)

    def batch(self, step: int, batch_size: int) -> np.ndarray:
        """The sample indices of batch number `step`, int64 of shape (batch_size,)."""
        position = np.arange(step * batch_size, (step + 1) * batch_size)
        epochs, offsets = np.divmod(position, self.num_samples)
        indices = np.empty(batch_size, dtype=np.int64)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            indices[chosen] = self._permutation(int(epoch))[offsets[chosen]]
        return indices

    def hash(self, steps: int, batch_size: int) -> str:
        """SHA-256 over the indices of the first steps, a thousand at most: equal for runs that see the same samples."""
        digest = hashlib.sha256()
        for step in range(min(steps, 1000)):
            digest.update(self.batch(step, batch_size).tobytes())
        return digest.hexdigest()

    def _make_permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(self.num_samples)


def uniforms(key: tuple[int, int], counters: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Uniform numbers in [0, 1) for some samples, each a function of the key and the sample's counter alone.

    Args:
        key: A seed, and what the numbers are for.
        counters: One for each sample.
        shape: Of the numbers of one sample.

    Returns:
        float64 of shape (samples, *shape).
    """
    numbers = np.empty((len(counters), *shape))
    for row, counter in enumerate(counters):
        philox = np.random.Philox(key=key, counter=[0, 0, 0, int(counter)])
        numbers[row] = np.random.Generator(philox).random(shape)
    return numbers


def four_uniforms(key: tuple[int, int], counters: np.ndarray) -> np.ndarray:
    """Four uniform numbers for each of some samples, a hundred times as fast as `uniforms` where counters are in order.

    They are others than those of `uniforms`: a counter of the generator, which gives four numbers, is one of a sample.

    Args:
        key: As for `uniforms`.
        counters: One for each sample; those that follow each other take one call.

    Returns:
        float64 of shape (samples, 4).
    """
    parts = np.split(counters, np.flatnonzero(np.diff(counters) != 1) + 1)
    generators = [np.random.Philox(key=key, counter=[int(part[0]), 0, 0, 0]) for part in parts]
    numbers = [np.random.Generator(g).random((len(part), 4)) for g, part in zip(generators, parts, strict=True)]
    return np.concatenate(numbers)
