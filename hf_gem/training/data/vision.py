"""Turns images from a dataset, a folder or an array into augmented, normalised batches.

The randomness of a sample depends only on the seed and the number of its draw, so it is the same on any number of
processes and after a restart.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ...files import shown
from ..errors import DataError, reason
from .decoded import DecodedImages, prepare_decoded
from .images import ImageData, VisionConfig, read_splits
from .normalisation import Normalisation, Preprocessing
from .resident import can_be_resident, prepare_resident


def prepare_images(
    config: VisionConfig,
    seed: int,
    device: torch.device,
    preprocessing: Preprocessing | None = None,
) -> ImageData:
    """Prepares the images of `config`.

    Args:
        config: The config with the dataset and the augmentation.
        seed: Seed of the augmentation.
        device: Device for resident images.
        preprocessing: The preprocessing that the model expects. By default, pixels are normalised by the statistics of
            the training images if these are resident, and by those of ImageNet otherwise.

    Raises:
        ConfigError: A package that is needed to read the dataset is not installed.
        DataError: The dataset cannot be read, lacks the named columns, or cannot be resident as requested, or the cache
            cannot be written.
    """
    splits = read_splits(config)
    wanted = preprocessing or Preprocessing()
    wanted = replace(wanted, image_size=config.image_size or wanted.image_size)
    resident = can_be_resident(splits.parts["train"], wanted.image_size) if config.resident is None else config.resident
    if resident:
        return prepare_resident(config, splits, seed, device, wanted)
    return prepare_decoded(config, splits, seed, wanted)


def image_processor(data: ImageData) -> Any:
    """Makes an image processor that prepares images as evaluation does, to be saved next to the model."""
    from transformers import BitImageProcessor

    edge, squash = data.image_size, True  # of resident images
    if isinstance(data.validation, DecodedImages):
        edge, squash = data.validation.edge, data.validation.squash
    return BitImageProcessor(
        size={"height": edge, "width": edge} if squash else {"shortest_edge": edge},
        crop_size={"height": data.image_size, "width": data.image_size},
        image_mean=list(data.normalisation.mean),
        image_std=list(data.normalisation.std),
        resample=3,  # bicubic
    )


def preprocessing_of(model: str) -> Preprocessing:
    """Reads the preprocessing that a pretrained model expects.

    Args:
        model: Name or folder of a timm model, or of a transformers model with an image processor.

    Raises:
        DataError: The model has no image processor that can be read.
    """
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(model, trust_remote_code=False)
        if timm := getattr(processor, "data_config", None):
            normalisation, squash = Normalisation(timm["mean"], timm["std"]), timm.get("crop_mode") == "squash"
            side = timm["input_size"][-1]
            edge = int(side / timm["crop_pct"])
        else:
            normalisation = Normalisation(processor.image_mean, processor.image_std)
            side, edge, squash = _crop_of(processor)
        return Preprocessing(normalisation, side, min(1.0, side / edge), squash)
    except Exception as error:  # the Hub client, JSON and the processors raise their own
        raise DataError(
            f"cannot read the image processor of {shown(model)}: {reason(error)}. --model can be timm/<name>, a Hub "
            "id, or a folder with a model and its image processor. Check the name."
        ) from error


def _crop_of(processor: Any) -> tuple[int, int, bool]:
    """Returns the side of the crop of an image processor, to what it scales images before, and whether both sides."""
    squash = "height" in processor.size
    edge = int(processor.size["height"] if squash else processor.size["shortest_edge"])
    crops = getattr(processor, "do_center_crop", False)
    side = int(processor.crop_size["height"]) if crops else edge
    if crop_pct := getattr(processor, "crop_pct", None):
        squash = not crops and edge >= 384  # ConvNeXt's crops only below this size; PoolFormer's always crops
        edge = edge if squash else int(edge / crop_pct)
    return side, edge, squash
