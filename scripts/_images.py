"""Image files as a person sees them, upright and with 16 bits of grey brought down to 8; what transformers' image processors say."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what `open_picture` raises
ORIENTATION = 0x0112  # in EXIF
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_picture(path: str | Path, *, mode: str = "RGB", upright: bool = True) -> Image.Image:
    """The file as an image of 8 bits a channel.

    Cameras store a photo as the sensor had it and say in its EXIF data how to turn it; viewers, annotation tools, `datasets` and
    transformers' pipelines turn it. PIL by itself does not, and cuts 16-bit grey at 255 when it converts it.

    Args:
        mode: RGB, or L for grey.
        upright: Turn it as its EXIF data say.

    Raises:
        One of `UNREADABLE`: if it is no image that can be read.
    """
    with Image.open(path) as image:
        turn = TURNS.get(_orientation(image)) if upright else None
        seen = as_eight_bits(image).convert(mode)
    return seen if turn is None else seen.transpose(turn)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except (SyntaxError, ValueError, TypeError, OSError, struct.error):  # damaged; the pixels need not be
        return 1


def as_eight_bits(image: Image.Image) -> Image.Image:
    """The image itself, unless its grey has more bits: of 16 the upper 8. What has 32 bits, but needs 8 only, is of 8.

    Raises:
        ValueError: if it has floating-point values, or larger ones than 16 bits hold.
    """
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError(f"its mode is {image.mode}; expected 8 bits a channel, or 16 of grey")
    is_small = image.mode == "I" and values.max() <= 255
    return Image.fromarray((values if is_small else values // 256).astype(np.uint8))


def norm_of(processor: Any) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel that an image processor normalises with; 0 and 1 if it does not."""
    if not processor.do_normalize:
        return [0.0] * 3, [1.0] * 3
    return list(processor.image_mean), list(processor.image_std)


def edges_of(size: Any) -> dict[str, int]:
    """What a processor's `size` or `crop_size` says: height and width, shortest_edge, or others; empty if there is none."""
    return {name: int(value) for name, value in dict(size or {}).items() if value}
