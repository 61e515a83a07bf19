"""What Trainer pushes to the Hub, with masks and card of the same step as the weights, in either form.

Trainer's own pushes upload its output folder while later saves may write into it, and leave an earlier push's shards where
they were. Here every push is a copy of one save, in one commit (`gap_hf.uploads`).
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitInfo, HfApi
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, SaveStrategy
from transformers.utils.hub import PushInProgress

from gap_hf.card import write_card
from gap_hf.card_facts import facts_of, scores_in
from gap_hf.card_section import CardOptions
from gap_hf.errors import GaPError
from gap_hf.folders import pack_folder
from gap_hf.saving import save_pretrained
from gap_hf.shards import is_sharded
from gap_hf.uploads import files_of, hub_errors, is_model_file, publish

if TYPE_CHECKING:
    from gap_hf.sparsifier import Sparsifier

logger = logging.getLogger(__name__)

TRAINING_ARGS = "training_args.bin"

_Base = Trainer if TYPE_CHECKING else object


class HubMixin(_Base):
    """Pushes of a trainer with masks. Without any (`gap` is None), every method returns what Trainer's own returns."""

    gap: Sparsifier | None = None
    _gap_hub: HfApi | None = None
    _gap_saved: Path | None = None  # the checkpoint that is being pushed
    _gap_in_checkpoint = False

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """Trainer's, with one sentence where the Hub refuses.

        Raises:
            GaPError: if GaP is on and the repository cannot be had.
        """
        if not getattr(self, "_gap_on", False):
            return super().init_hf_repo(*args, **kwargs)
        with hub_errors(str(self.args.hub_model_id or self.args.output_dir)):
            return super().init_hf_repo(*args, **kwargs)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        *args: Any,
        packed: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Trainer's, with the masks, and weights in either form. It is one commit; stale shards go with it.

        Args:
            packed: Publish the packed form (docs/format.md), not ordinary safetensors with zeros.
            commit_message, blocking, token, revision: As Trainer's.
            *args, **kwargs: As Trainer's: `private`, and what its `create_model_card` takes.

        Returns:
            As Trainer's: what the commit is, or a future of that if not `blocking`.

        Raises:
            GaPError: if the Hub refuses or cannot be reached; nothing is published then, or the error says that it may have been.
        """
        if self.gap is None:
            if packed:
                raise GaPError(
                    "push_to_hub: packed=True needs masks; expected GaP to be on and train() to have been called"
                )
            return super().push_to_hub(commit_message, blocking, token, revision, *args, **kwargs)
        private = args[0] if args else kwargs.pop("private", None)
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = self.args.hub_token if token is None else token
        model_name = kwargs.pop("model_name", None) or self._gap_model_name()
        if self.hub_model_id is None:
            if private is not None:  # as an argument of init_hf_repo transformers 5.17 does not know it
                self.args.hub_private_repo = private
            self.init_hf_repo(token=token)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        tags = kwargs.pop("tags", None) or []
        tags = [tags] if isinstance(tags, str) else list(tags)
        tags += [tag for tag in getattr(self.model, "model_tags", None) or [] if tag not in tags]
        self.create_model_card(model_name=model_name, tags=tags or None, **kwargs)
        self._finish_current_push()
        stage = self._gap_stage(Path(str(self.args.output_dir)))
        if packed:
            with _removed_if_it_fails(stage):
                self._gap_pack(stage)
        revision = self.args.hub_revision if revision is None else revision
        message = "End of training" if commit_message is None else commit_message
        job = self._gap_publish(stage, message, revision, token)
        return job.result() if blocking else job

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Trainer's card, and after it gap_hf's section (`gap_hf.card`) with what was measured of the saved model."""
        super().create_model_card(*args, **kwargs)
        if (
            self.gap is None
            or (self._gap_in_checkpoint and self._gap_saved is None)
            or not self.is_world_process_zero()
        ):
            return
        output = Path(str(self.args.output_dir))
        try:
            # A push during training does not wait for its weights to be counted and weighed.
            facts = facts_of(self._gap_saved or output, measure=self._gap_saved is None)
            if not facts.scores:
                scores, split = scores_in(self.state.log_history)
                facts = replace(facts, scores=scores, split=split)
            write_card(output, facts, CardOptions(repo=self.hub_model_id))
        except GaPError as error:  # no reason to lose a run
            logger.warning("The model card has no section on sparsity: %s", error)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        # TRL writes a card in each, into the output folder, whose model may be another run's.
        self._gap_in_checkpoint = True
        try:
            super()._save_checkpoint(*args, **kwargs)
        finally:
            self._gap_in_checkpoint = False

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self.gap is None or not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return super()._push_from_checkpoint(checkpoint_folder)
        running = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if running and not self.args.hub_always_push:
            return None
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        saved = Path(checkpoint_folder)
        self._gap_saved = saved
        try:
            self.create_model_card(model_name=self._gap_model_name())
        finally:
            self._gap_saved = None
        stage = self._gap_stage(Path(str(self.args.output_dir)), saved=saved)
        under = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: saved.name}
        if (name := under.get(HubStrategy(self.args.hub_strategy))) is not None:
            for path in saved.rglob("*"):
                if path.is_file():
                    _link(path, stage / name / path.relative_to(saved))
        in_steps = self.args.save_strategy == SaveStrategy.STEPS
        when = f"step {self.state.global_step}" if in_steps else f"epoch {int(self.state.epoch or 0)}"
        message = f"Training in progress, {when}"
        job = self._gap_publish(stage, message, self.args.hub_revision, self.args.hub_token)
        job.add_done_callback(lambda done: _warn(done.exception()))
        if running:
            self.push_in_progress.jobs.append(job)  # type: ignore[union-attr]
        else:
            self.push_in_progress = PushInProgress([job])  # type: ignore[arg-type]
        return None

    def _gap_model_name(self) -> str:
        hub = self.args.hub_model_id
        return Path(str(self.args.output_dir)).name if hub is None else hub.split("/")[-1]

    def _gap_stage(self, output: Path, *, saved: Path | None = None) -> Path:
        """A copy of what Trainer would upload of the output folder, its model that of the checkpoint `saved` if there is one."""
        stage = Path(tempfile.mkdtemp(prefix="_push-", dir=output))
        with _removed_if_it_fails(stage):
            for path in [path for path in output.rglob("*") if path.is_file()]:
                name = path.relative_to(output)
                if name.parts[0].startswith(("_", ".", f"{PREFIX_CHECKPOINT_DIR}-")):
                    continue
                if saved is None or not is_model_file(str(name)):
                    (stage / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(path, stage / name)
            newer = {} if saved is None else files_of(saved) | {TRAINING_ARGS: saved / TRAINING_ARGS}
            for name, path in newer.items():
                (stage / name).unlink(missing_ok=True)
                _link(path, stage / name)
        return stage

    def _gap_pack(self, stage: Path) -> None:
        assert self.gap is not None and self.model is not None
        model: Any = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if is_sharded(model):
            packed = stage / "packed"
            pack_folder(stage, packed)
            for name in files_of(stage):
                (stage / name).unlink()
            for path in packed.iterdir():
                os.replace(path, stage / path.name)
            packed.rmdir()
            return
        with self.gap.workers.merged(self.gap):
            save_pretrained(model, stage, self.gap, packed=True)

    def _gap_publish(self, stage: Path, message: str, revision: str | None, token: str | None) -> Any:
        """Upload a staged folder in the background, one after the other, and remove it."""
        repo, api = str(self.hub_model_id), HfApi(token=token)
        self._gap_hub = self._gap_hub or HfApi()
        files = {str(path.relative_to(stage)): path for path in sorted(stage.rglob("*")) if path.is_file()}

        def upload() -> CommitInfo:
            with _removed(stage):
                return publish(api, repo, files, message=message, revision=revision)

        return self._gap_hub.run_as_future(upload)


def _link(path: Path, target: Path) -> None:
    """A checkpoint's files are written once, so that a hard link is as good as a copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(path, target)
    except OSError:  # a file system without them
        shutil.copy2(path, target)


@contextmanager
def _removed(stage: Path) -> Iterator[None]:
    try:
        yield
    finally:
        shutil.rmtree(stage, ignore_errors=True)


@contextmanager
def _removed_if_it_fails(stage: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)
        raise


def _warn(error: BaseException | None) -> None:
    if error is not None:
        logger.warning("A push during training failed; training goes on. %s", error)
