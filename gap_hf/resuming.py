"""Weights back from a checkpoint whose files name them otherwise than the model does.

transformers saves models such as Mixtral and DETR under the names of their first releases and translates these in
`from_pretrained`. Trainer reads a checkpoint's files as they are: whatever is named otherwise is then not loaded, which is a warning, and training
goes on from weights that were never trained (huggingface/transformers issue 43701).
"""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer

from gap_hf import checkpoint
from gap_hf.distributed import all_objects
from gap_hf.errors import GaPError
from gap_hf.folder_files import has_weights, keys_of, weight_files
from gap_hf.shards import is_sharded

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from gap_hf.sparsifier import Sparsifier

_Base = Trainer if TYPE_CHECKING else object


class ResumeMixin(_Base):
    """With GaP on, weights that a checkpoint names otherwise are loaded as `from_pretrained` loads them. Off, it is Trainer's.

    Attributes:
        load_renamed_weights: Do so without GaP too.
    """

    load_renamed_weights = False

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self._gap_load_renamed(resume_from_checkpoint, model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if best is None or not self._gap_load_renamed(best, None):
            super()._load_best_model()

    def _gap_best_state(self, sparsifier: Sparsifier) -> checkpoint.GaPState | None:
        """What lies beside the best model's weights, which Trainer has just loaded; None if it has not.

        Raises:
            GaPError: if P-GaP's replicas are apart, or the model is sharded, and only some processes have loaded it.
        """
        wanted, state, failure = self.args.load_best_model_at_end, None, None
        best = self.state.best_model_checkpoint if wanted else None
        if best is not None and not (Path(best) / checkpoint.CONFIG_NAME).is_file() and not has_weights(Path(best)):
            # Other nodes make the folder for their random states, and P-GaP's replicas; Trainer warns of the weights.
            logger.warning("%s holds no masks on this node; set training.save_on_each_node: true", best)
        elif best is not None:
            try:
                state = checkpoint.load(best)
            except GaPError as error:
                failure = error
        # What follows takes all processes there, so that none may go on, or stop, by itself.
        together = sparsifier.workers.apart or (wanted and is_sharded(sparsifier.model))
        found = all_objects(state is not None) if together else []
        if failure is not None:
            raise failure
        if len(set(found)) > 1:
            raise GaPError(
                "training.load_best_model_at_end: only some processes find the best checkpoint's masks on their disk, and the others "
                "cannot go on without them; set training.save_on_each_node: true"
            )
        return state

    def _gap_load_renamed(self, folder: str, model: nn.Module | None) -> bool:
        """Load a checkpoint if its files name weights otherwise. Returns False, and does nothing, if they do not.

        Raises:
            GaPError: if they do and cannot be loaded here.
        """
        model = self.model if model is None else model
        wanted = self.load_renamed_weights or getattr(self, "_gap_on", False)
        if not wanted or not isinstance(model, PreTrainedModel) or not Path(folder).is_dir():
            return False
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # these save by the model's own names
            return False
        if not has_weights(Path(folder)):  # another node's disk has them; Trainer says so
            return False
        renamed = {key for path in weight_files(Path(folder)) for key in keys_of(path)} - model.state_dict().keys()
        if not renamed:
            return False
        if is_sharded(model):
            raise GaPError(
                f"{folder}: its files hold '{min(renamed)}', which the model names otherwise; a sharded {type(model).__name__} cannot be resumed from it"
            )
        # The widest of the model's dtypes: what was saved in any of them comes through it to the bit, which config.dtype need not.
        dtypes = [param.dtype for param in model.parameters() if param.is_floating_point()]
        dtype = functools.reduce(torch.promote_types, dtypes)
        cls: Any = type(model)
        found = cls.from_pretrained(folder, config=model.config, dtype=dtype, output_loading_info=True)
        loaded, info = found
        if missing := sorted(info["missing_keys"]):
            raise GaPError(f"{folder}: has no weights for '{missing[0]}'")
        model.load_state_dict(loaded.state_dict())
        return True
