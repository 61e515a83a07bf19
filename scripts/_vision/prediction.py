"""A trained model's answers for image files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from _images import UNREADABLE, open_picture
from transformers import AutoModelForImageClassification

from _vision.model import ImageFormat, known_format
from gap_hf.errors import GaPError
from gap_hf.recipe import one_line


@torch.inference_mode()
def best_names(folder: str | Path, files: Sequence[Path], *, number: int = 3) -> list[list[tuple[str, float]]]:
    """For each file its `number` likeliest classes and their probabilities, best first.

    Images are prepared as evaluation prepared them: upright, scaled, cut from the middle; grey if the model takes one channel,
    which transformers' pipelines cannot do.

    Args:
        folder: A saved model, or a name on the Hub.

    Raises:
        GaPError: naming what cannot be loaded or read.
    """
    known = {"crop_share": 0.875, **known_format(folder)}
    if missing := [name for name in ("size", "mean", "std") if name not in known]:
        raise GaPError(
            f"{folder}: does not say how images are prepared ({missing[0]}); expected a model that was saved here"
        )
    channels = len(known["mean"])
    form = ImageFormat((channels, *known["size"]), known["mean"], known["std"], known["crop_share"])
    prepare = form.transform()
    pictures = []
    for path in files:
        try:
            pictures.append(prepare(open_picture(path, mode="L" if channels == 1 else "RGB")))
        except UNREADABLE as error:
            raise GaPError(f"{path}: cannot be read as an image: {one_line(error)}") from None
    try:
        model = AutoModelForImageClassification.from_pretrained(folder).eval()
    except (OSError, ValueError) as error:
        raise GaPError(f"{folder}: cannot be loaded: {one_line(error)}") from None
    out = []
    for picture in pictures:
        shares, classes = model(pixel_values=picture[None]).logits[0].softmax(-1).sort(descending=True)
        names = [model.config.id2label[int(c)] for c in classes[:number]]
        out.append(list(zip(names, shares[:number].tolist(), strict=True)))
    return out
