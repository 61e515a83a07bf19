"""`GaPTrainer`: Trainer's hooks turned into Sparsifier calls. No algorithm here.

Everything that GaP adds hangs on `gap_config`. Without one, or with method ``dense``, every method below returns
what Trainer's own returns: no callback, no draw from the global generator, no log key and no file is added.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import Seq2SeqTrainer, Trainer, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from gap_hf import checkpoint
from gap_hf.callback import GaPCallback
from gap_hf.change import Change
from gap_hf.config import GaPConfig
from gap_hf.density_rates import join_groups
from gap_hf.distributed import WorkerGroups, check_same_masks, make_worker_groups
from gap_hf.errors import GaPError
from gap_hf.lr import restarted_schedule
from gap_hf.optimizer_state import unwrap
from gap_hf.packed_gradients import PackedGradientsMixin
from gap_hf.plan import Plan
from gap_hf.planning import plan_for
from gap_hf.publishing import HubMixin
from gap_hf.reduction import GradientReducer, attach
from gap_hf.refusals import check_arguments, check_model, check_setup
from gap_hf.report import describe, unfinished
from gap_hf.resuming import ResumeMixin
from gap_hf.sparse_layers import install, remove
from gap_hf.sparsifier import Sparsifier
from gap_hf.workers import OneWorker, ProcessWorkers, SequentialWorkers

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from gap_hf.zero import ZeroState


class GaPMixin(PackedGradientsMixin, ResumeMixin, HubMixin):
    """Adds scheduled grow-and-prune to any Trainer subclass: ``class MyTrainer(GaPMixin, SFTTrainer): ...``.

    Under FSDP version 2 masks are sharded as weights are (`gap_hf.shards`), and `save_model` is for all ranks, as Trainer's own
    is. Models that transformers shards while loading them (``distributed_config``) are tested on a CPU; ``fsdp: true`` was not
    run through Trainer yet, because that takes a GPU: on a CPU accelerate silently trains with DDP instead.

    Args:
        gap_config: A `GaPConfig`, a mapping of its keys, or None for plain Trainer.
        gap_masks: First masks by parameter name, such as `gap_hf.load_masks` gives for a sparse model that is trained on.
        *args, **kwargs: As the Trainer takes them.

    Attributes:
        gap: The `Sparsifier` of the current run (masks, plan, report); None before `train()` and when GaP is off.

    Raises:
        GaPError: for what cannot work (DataParallel, FSDP version 1, ZeRO-3, quantised weights, optimizers that step
            in backward), and if the model has nothing to prune. What the model and the arguments rule out is refused
            before the output folder is made.
    """

    def __init__(
        self,
        *args: Any,
        gap_config: GaPConfig | Mapping[str, Any] | None = None,
        gap_masks: Mapping[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        if gap_config is not None and not isinstance(gap_config, GaPConfig):
            gap_config = GaPConfig.from_dict(gap_config)
        self.gap_config = gap_config
        self.gap: Sparsifier | None = None
        self._gap_masks = gap_masks
        self._gap_resume: tuple[str, checkpoint.GaPState] | None = None
        self._gap_started: Change | None = None
        self._gap_reducer: GradientReducer | None = None
        self._gap_zero: ZeroState | None = None
        self._gap_groups: WorkerGroups | None = None
        if not self._gap_on:
            super().__init__(*args, **kwargs)
            return
        # Trainer makes the output folder, so all that can be refused by what was passed is refused before it.
        model, arguments = (
            kwargs.get(key, args[i] if len(args) > i else None) for i, key in enumerate(("model", "args"))
        )
        if isinstance(model, nn.Module):
            check_model(model, self._gap_on_config)
        if isinstance(arguments, TrainingArguments):
            check_arguments(arguments, self._gap_on_config)
        super().__init__(*args, **kwargs)
        if not isinstance(model, nn.Module):  # a name, or model_init: known only now
            check_model(self.model, self._gap_on_config)
        check_arguments(self.args, self._gap_on_config)
        check_setup(self, self._gap_on_config)
        callback = GaPCallback(self)
        self.add_callback(callback)
        self.callback_handler.callbacks.insert(0, self.callback_handler.callbacks.pop())

    @property
    def _gap_on(self) -> bool:
        return self.gap_config is not None and not self.gap_config.is_off

    @property
    def _gap_on_config(self) -> GaPConfig:
        assert self.gap_config is not None
        return self.gap_config

    @property
    def _gap_sparsifier(self) -> Sparsifier:
        assert self.gap is not None
        return self.gap

    # --- Trainer's methods -------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train. A checkpoint to resume is read and checked before anything is changed.

        Raises:
            GaPError: if the checkpoint has no masks, or those of another config or model.
        """
        if not self._gap_on:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        is_last = resume_from_checkpoint is True
        path = get_last_checkpoint(str(self.args.output_dir)) if is_last else resume_from_checkpoint
        self._gap_resume = None
        if path:
            state = checkpoint.load(path)
            checkpoint.check_same_config(state, self._gap_on_config, path)
            self._gap_resume = (path, state)
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._gap_resume = None
            remove(self.model)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """One micro-batch; at the last of an accumulation, gradients of masked weights are zeroed before clipping."""
        if not self._gap_on:
            return super().training_step(*args, **kwargs)
        gap = self._gap_sparsifier
        gap.workers.take_turn(gap, self.current_gradient_accumulation_steps)
        with self._gap_packing(gap):
            loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            for _ in gap.workers.others(gap):
                self._gap_update_replica()
            if (change := gap.mask_gradients()) is not None:
                self._gap_report(change)
        return loss

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Trainer's schedule, or under ``lr_schedule: restart`` the same one in every phase."""
        if self._gap_on:
            inner = unwrap(optimizer or self.optimizer)
            join_groups(inner)  # of a run that ended within a step
            if self._gap_on_config.lr_schedule == "restart" and self.lr_scheduler is None:
                plan, peaks = self._gap_plan(num_training_steps), self._gap_on_config.lr_peaks
                self.lr_scheduler = restarted_schedule(self.args, inner, plan, peaks)
                self._created_lr_scheduler = True
                return self.lr_scheduler
        return super().create_scheduler(num_training_steps, optimizer)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Trainer's, in a parallel round on the model that a merge would give now."""
        with self._gap_merged():
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, in a parallel round on the model that a merge would give now."""
        with self._gap_merged():
            return super().predict(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model and, beside it, config and masks; these come first because Trainer may push at the end.

        In a parallel round it is the model that a merge would give now, and a checkpoint also holds every replica.
        """
        if self.gap is None:
            return super().save_model(output_dir, _internal_call=_internal_call)
        folder = output_dir or str(self.args.output_dir)
        is_checkpoint = Path(folder).name.startswith(PREFIX_CHECKPOINT_DIR) and not self.args.save_only_model
        replicas = checkpoint.save_replicas(folder, self.gap) if self.gap.workers.apart and is_checkpoint else {}
        with self._gap_merged():
            # On all ranks, because sharded masks have to be gathered; it does nothing more where nothing is sharded.
            step = self.state.global_step
            checkpoint.save(folder, self.gap, step=step, replicas=replicas, write=self.args.should_save)
            return super().save_model(output_dir, _internal_call=_internal_call)

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> bool:
        # A model with a dense group is not what the user asked for, however good its metric.
        if self.gap is not None and self._gap_on_config.best_model_at_target and not self.gap.at_target:
            return False
        return super()._determine_best_metric(*args, **kwargs)

    # --- added -------------------------------------------------------------------------------------------------------

    def prune_to_target(self) -> None:
        """Prune what is still dense, for a run that was stopped before its fine-tune. Save the model after it.

        Raises:
            GaPError: if GaP is off or `train()` was never called.
        """
        if self.gap is None:
            raise GaPError(
                "prune_to_target: there are no masks yet; expected GaP to be on and train() to have been called"
            )
        error = self.gap.prune_to_target()
        if error is not None:
            self._gap_say(
                f"pruned what was dense, without training after it (error {error:.4f}): the prunable set is at a sparsity of {self.gap.sparsity():.4f}"
            )

    def _gap_plan(self, total_steps: int) -> Plan:
        """The plan of this run; a resumed one keeps its own, with a fine-tune that ends where training ends."""
        if self._gap_resume is not None:
            return self._gap_resume[1].plan.with_total_steps(total_steps)
        assert self.model is not None
        return plan_for(self.model, self._gap_on_config, self.args, total_steps=total_steps)

    def _gap_begin(self) -> None:
        assert self.model is not None and self.model_wrapped is not None
        plan = self._gap_plan(self.state.max_steps)
        old = self.gap if self.gap is not None and self.gap.model is self.model else None
        if self.is_deepspeed_enabled:
            from gap_hf.zero import ZeroState  # deepspeed is no dependency, and slow to import

            self._gap_zero = ZeroState(self.model_wrapped, replaces=self._gap_zero)
        self.gap = Sparsifier(
            self.model,
            self._gap_on_config,
            total_steps=self.state.max_steps,
            optimizer=self.optimizer if self._gap_zero is None else self._gap_zero,
            seed=self._gap_resume[1].seed if self._gap_resume else self.args.seed,
            plan=plan,
            workers=self._gap_workers(plan),
        )
        if self._gap_zero is not None:
            self._gap_zero.attach(self.gap)
        self._gap_pack_gradients(self.gap)
        if self._gap_on_config.sparse_compute:
            install(self.gap)
        self._gap_reducer = attach(self.model_wrapped, self.gap, self._gap_reducer)
        if isinstance(self.gap.workers, ProcessWorkers):
            assert self._gap_reducer is not None, "P-GaP over processes trains one DDP module"
            self.gap.workers.switch = self._gap_reducer.switch
        if self._gap_resume is None:
            self._gap_started = self.gap.start(masks=old.masks if old else self._gap_masks)
            return
        path, state = self._gap_resume
        checkpoint.check_same_weights(state, self.gap, path)
        self._gap_load(state, self.state.global_step)
        checkpoint.load_replicas(path, state, self.gap)
        check_same_masks(self.gap.masks, self.gap.workers.group)
        if plan.total_steps != state.plan.total_steps:
            logger.warning(
                "The checkpoint was planned for %d optimizer steps and training now has %d: the fine-tune takes the "
                "difference.",
                state.plan.total_steps,
                plan.total_steps,
            )

    def _gap_workers(self, plan: Plan) -> OneWorker:
        if plan.num_workers == 1:
            return OneWorker()
        if self._gap_on_config.workers == "sequential":
            return SequentialWorkers(plan.num_workers)
        if self._gap_groups is None:
            self._gap_groups = make_worker_groups(plan.num_workers)
        return ProcessWorkers(self._gap_groups)

    def _gap_update_replica(self) -> None:
        """An optimizer step for the replica in the model, as Trainer does it for the last one of a step."""
        gap = self._gap_sparsifier
        assert self.model is not None and self.optimizer is not None
        gap.mask_gradients()
        if self.args.max_grad_norm is not None and self.args.max_grad_norm > 0:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)
        self.optimizer.step()  # type: ignore[union-attr]
        gap.mask_weights()
        self.model.zero_grad()

    def _gap_merged(self) -> AbstractContextManager[None]:
        if self.gap is None:
            return nullcontext()
        self.gap.masks.writes += 1
        return self.gap.workers.merged(self.gap)

    def _gap_load(self, state: checkpoint.GaPState, step: int) -> None:
        self._gap_sparsifier.load(step, state.masks, state.previous, levels=state.levels, num_done=state.num_done)

    def _gap_report_start(self) -> None:
        # Not in on_train_begin, where this callback comes first: others would get a record before they have begun.
        if self._gap_started is not None:
            change, self._gap_started = self._gap_started, None
            self._gap_report(change)

    def _gap_advance(self) -> None:
        if (change := self._gap_sparsifier.advance(self.state.global_step)) is not None:
            self._gap_report(change)

    def _gap_end(self) -> None:
        gap = self._gap_sparsifier
        if (best := self._gap_best_state(gap)) is not None:
            gap.workers.drop()
            self._gap_load(best, best.step)
        elif gap.workers.apart:
            # Stopped in the middle of a round: every process is to hold the same model.
            gap.workers.merge(gap)
            self._gap_say("training ended in the middle of a parallel round, so the workers' replicas were merged")
        if gap.at_target:
            return
        if self._gap_on_config.prune_if_stopped:
            self.prune_to_target()
            return
        logger.warning(unfinished(self.state.global_step, gap.plan, gap.sparsity(), float(self._gap_on_config.target)))

    def _gap_report(self, change: Change) -> None:
        """One record in the log for each change, and a line on the screen where a phase begins; all processes agree on it."""
        check_same_masks(self._gap_sparsifier.masks, self._gap_sparsifier.workers.group)
        record: dict[str, Any] = {
            "gap_phase": change.phase.index,
            "gap_sparsity": change.sparsity,
            "gap_model_sparsity": change.model_sparsity,
        }
        if change.pruning_error is not None:
            record["gap_pruning_error"] = change.pruning_error
        if change.mask_iou is not None:
            record["gap_mask_iou"] = change.mask_iou
        # Not self.log: subclasses such as TRL's put metrics of their own, gathered since their last record, into it.
        Trainer.log(self, record)
        if change.begins_phase:
            self._gap_say(describe(change, self._gap_sparsifier.plan))

    def _gap_say(self, text: str) -> None:
        if self.is_world_process_zero():
            tqdm.write(f"GaP: {text}")


class GaPTrainer(GaPMixin, Trainer):
    """`transformers.Trainer` with scheduled grow-and-prune; see `GaPMixin` for what it adds."""


class GaPSeq2SeqTrainer(GaPMixin, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` with scheduled grow-and-prune; see `GaPMixin` for what it adds."""
