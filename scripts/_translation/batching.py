"""Batches of similar length, filled up to a number of tokens instead of a number of sentences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Sampler
from transformers import TrainerCallback
from transformers.trainer_utils import seed_worker


class TokenBatchSampler(Sampler[list[int]]):
    """Index lists of at most `max_tokens` padded tokens each; an epoch visits every example exactly once.

    A batch costs its number of examples times its longest one. Examples are sorted by length, ties in a random
    order of the epoch, cut into batches, and the batches are shuffled. Where a batch ends depends on the sorted
    lengths alone, so every epoch has the same number of batches, which the Trainer counts only once. The order
    is a function of (seed, epoch): the same on every process, and again after a resume.

    Args:
        lengths: Tokens of each example, the longer of its two sides.
        max_tokens: Upper bound of a batch's cost; no example may be longer.
        seed: Base of the shuffles.
        group_size: Number of consecutive batches that belong to one optimizer step (processes times
            accumulation). They are kept next to each other in length, so that no process waits for another.
    """

    def __init__(self, lengths: Sequence[int], *, max_tokens: int, seed: int, group_size: int = 1) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)
        if len(self.lengths) and self.lengths.max() > max_tokens:
            raise ValueError(f"an example of {self.lengths.max()} tokens does not fit in batches of {max_tokens}")
        self.max_tokens, self.seed, self.group_size, self.epoch = max_tokens, seed, group_size, 0
        self._starts = _batch_starts(np.sort(self.lengths), max_tokens)

    def __len__(self) -> int:
        return len(self._starts)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng((self.seed, self.epoch))
        order = np.lexsort((rng.random(len(self.lengths)), self.lengths))
        batches = np.split(order, self._starts[1:])
        groups = [batches[i : i + self.group_size] for i in range(0, len(batches), self.group_size)]
        # A last group that is not full stays last: in the middle it would shift the others across steps.
        tail = groups.pop() if groups and len(groups[-1]) < self.group_size else []
        for i in rng.permutation(len(groups)):
            yield from (batch.tolist() for batch in groups[i])
        yield from (batch.tolist() for batch in tail)


def _batch_starts(ascending: np.ndarray, max_tokens: int) -> list[int]:
    """Where the batches start when lengths in ascending order are cut greedily."""
    starts: list[int] = []
    for i, length in enumerate(ascending.tolist()):
        if not starts or length * (i + 1 - starts[-1]) > max_tokens:
            starts.append(i)
    return starts


class SetEpoch(TrainerCallback):
    """Tells the sampler its epoch.

    The Trainer does that as well, but does not reach through two wrappers: after a resume with several
    processes the sampler is inside accelerate's `SkipBatchSampler` inside its `BatchSamplerShard`.
    """

    def __init__(self, sampler: TokenBatchSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.sampler.set_epoch(int(state.epoch or 0))


class TokenBatches:
    """Mixin for a Trainer: training batches come from `token_sampler` when it is set."""

    token_sampler: TokenBatchSampler | None = None

    def use_token_batches(self: Any, sampler: TokenBatchSampler) -> None:
        self.token_sampler = sampler
        self.add_callback(SetEpoch(sampler))

    def get_train_dataloader(self: Any) -> DataLoader:
        if self.token_sampler is None:
            return super().get_train_dataloader()  # type: ignore[misc]
        args = self.args
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=self.token_sampler,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            worker_init_fn=partial(seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index),
        )
        return self.accelerator.prepare(loader)
