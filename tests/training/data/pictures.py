"""Folders of made-up images, and data made of them."""

import numpy as np
import torch
from PIL import Image

from hf_gem.training.data.images import VisionConfig
from hf_gem.training.data.normalisation import Normalisation
from hf_gem.training.data.vision import prepare_images

CPU = torch.device("cpu")
NEUTRAL = Normalisation((0, 0, 0), (1, 1, 1))
ROUNDED = 8 * torch.finfo(torch.float32).eps  # of an image in [0, 1], normalised


def prepare(tmp_path, **fields):
    return prepare_images(VisionConfig(cache_dir=str(tmp_path / "cache"), **fields), 0, CPU)


def write_folder(folder, sizes=((12, 12),), mode="RGB", per_class=10):
    """A folder of images with the number of the image in its top left pixel; returns the folder."""
    draw = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (folder / label).mkdir(parents=True, exist_ok=True)
        for number in range(per_class):
            width, height = sizes[number % len(sizes)]
            pixels = draw.integers(0, 256, (height, width, 3)).astype(np.uint8)
            Image.fromarray(pixels).convert(mode).save(folder / label / f"{number}.png")
    return folder
