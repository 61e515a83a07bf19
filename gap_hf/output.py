"""The output folder of a script: what may be resumed, and what an earlier run left that must not be mistaken."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from gap_hf.checkpoint import CONFIG_NAME, MASKS_NAME
from gap_hf.errors import GaPError


def checkpoint_to_resume(args: TrainingArguments, *, overwrite: bool) -> str | None:
    """The checkpoint to go on from; an output folder in use is an error unless it is resumed or overwritten.

    Raises:
        GaPError: if `output_dir` is a file or in use, or there is no checkpoint to resume.
    """
    wanted: Any = args.resume_from_checkpoint
    output = Path(str(args.output_dir))
    if output.exists() and not output.is_dir():
        raise GaPError(f"training.output_dir: {output} is a file, expected a folder")
    if wanted is True:
        last = get_last_checkpoint(str(output)) if output.is_dir() else None
        if last is None:
            raise GaPError(f"training.resume_from_checkpoint: found no checkpoint in {output}, expected one")
        return last
    if wanted:
        if not (Path(wanted) / "trainer_state.json").is_file():
            raise GaPError(
                f"training.resume_from_checkpoint: {wanted} is no checkpoint; expected its trainer_state.json"
            )
        return str(wanted)
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise GaPError(
            f"training.output_dir: {output} is not empty; expected another folder, "
            "--training.overwrite_output_dir=true, or --training.resume_from_checkpoint=true to go on"
        )
    return None


def remove_earlier_run(output: Path) -> None:
    """What a run writes and the next might mistake for its own: checkpoints and results. Nothing else is touched."""
    for path in output.glob("checkpoint-*"):
        if re.fullmatch(r"checkpoint-\d+", path.name) and (path / "trainer_state.json").is_file():
            shutil.rmtree(path)
    weights = [path.name for path in output.glob("model*.safetensors*")]
    for name in (
        "results.json",
        "translations.txt",
        "plot.png",
        "preprocessor_config.json",
        "trainer_state.json",
        CONFIG_NAME,
        MASKS_NAME,
        *weights,
    ):
        (output / name).unlink(missing_ok=True)
