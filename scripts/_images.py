"""Opening image files the way a person sees them: upright, and with 16 bits of grey brought down to 8."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps


def open_picture(path: str | Path, *, mode: str = "RGB", upright: bool = True) -> Image.Image:
    """The file as an image of 8 bits a channel.

    Cameras store a photo as the sensor had it and say in its EXIF data how to turn it; viewers, annotation tools, `datasets` and
    transformers' pipelines turn it. PIL by itself does not, and cuts 16-bit grey at 255 when it converts it.

    Args:
        mode: RGB, or L for grey.
        upright: Turn it as its EXIF data say.

    Raises:
        OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError: if it is no image that can be read.
    """
    with Image.open(path) as image:
        return as_eight_bits(ImageOps.exif_transpose(image) if upright else image).convert(mode)


def as_eight_bits(image: Image.Image) -> Image.Image:
    """The image itself, unless its grey is of 16 bits; of these the upper 8.

    Raises:
        ValueError: if it has floating-point values, or larger ones than 16 bits hold.
    """
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError(f"its mode is {image.mode}; expected 8 bits a channel, or 16 of grey")
    return Image.fromarray((values // 256).astype(np.uint8))
