"""The workers of P-GaP: who trains which replica, how replicas part, and how they become one model again.

`OneWorker` is every other method: one model, nothing to merge. `ProcessWorkers` spreads the replicas over groups of
processes; `SequentialWorkers` keeps them all in one process and swaps them in and out of the model. The merge is one piece
of code, which asks for a tensor of a worker's replica and does not know where that is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from gap_hf.distributed import ProcessGroup, WorkerGroups, all_objects, broadcast
from gap_hf.errors import GaPError
from gap_hf.merging import merge_rules
from gap_hf.phases import Update
from gap_hf.replica import Replica, TensorSpec, describe, live_replica, write_state, write_tensors

if TYPE_CHECKING:
    from gap_hf.sparsifier import Sparsifier

T = TypeVar("T")


class OneWorker:
    """One model that every update changes.

    Attributes:
        num: Workers in all.
        apart: True while their replicas differ, from the start of a parallel phase to its merge.
        reporter: The worker whose replica is reported on.
    """

    num = 1
    reporter = 0
    apart = False
    group: ProcessGroup | None = None  # the processes that hold one replica together; None for all

    @property
    def held(self) -> Sequence[int]:
        """The workers whose replicas this process holds."""
        return (0,)

    def each(self, sparsifier: Sparsifier, update: Update) -> Iterator[int]:
        """Put the replicas that an update changes into the model, one after the other, and say whose each is."""
        yield 0

    def activate(self, sparsifier: Sparsifier, worker: int) -> None:
        """Put the replica of a worker into the model, if it is this process that holds it."""

    def fork(self, sparsifier: Sparsifier) -> None:
        """From here on each worker has a replica of its own."""

    def begin_step(self) -> None:
        """Before the first micro-batch of a step, which may follow some that came to no step: the end of data of unknown length."""

    def take_turn(self, sparsifier: Sparsifier, num_micro_batches: int) -> None:
        """Before each of a step's micro-batches: put the replica that it trains into the model."""

    def others(self, sparsifier: Sparsifier) -> Iterator[int]:
        """After the last micro-batch of a step: put every other replica with gradients into the model, for its update."""
        yield from ()

    def replicas(self, sparsifier: Sparsifier) -> dict[int, Replica]:
        """What this process has to save of the workers' replicas, by worker, while they are apart."""
        return {}

    def adopt(self, sparsifier: Sparsifier, replicas: Mapping[int, Replica]) -> None:
        """Go on with the replicas of a checkpoint, those of `held`."""

    def merge(self, sparsifier: Sparsifier) -> None:
        """One model of all replicas: tensors, optimizer state, masks and levels, each from where `merge_rules` says."""

    def drop(self) -> None:
        """Forget the replicas: the model is one again, whatever is in it."""

    @contextmanager
    def merged(self, sparsifier: Sparsifier) -> Iterator[None]:
        """The model as a merge would give it now, to evaluate or save; the replicas come back unchanged."""
        yield


class _Workers(OneWorker, ABC):
    """What both kinds share: the merge."""

    _is_merged = False

    def __init__(self, num: int) -> None:
        self.num = num

    @contextmanager
    def merged(self, sparsifier: Sparsifier) -> Iterator[None]:
        if not self.apart or self._is_merged:  # in a merged view it is what it is: no second merge
            yield
            return
        with self._as_merged(sparsifier):
            self._is_merged = True
            try:
                yield
            finally:
                self._is_merged = False

    @abstractmethod
    def _as_merged(self, sparsifier: Sparsifier) -> AbstractContextManager[None]:
        """`merged`, of replicas that are apart."""

    def merge(self, sparsifier: Sparsifier) -> None:
        assert self.apart
        self._merge(sparsifier, with_optimizer=sparsifier.config.optimizer_reset != "all")
        self.drop()

    def _merge(self, sparsifier: Sparsifier, *, with_optimizer: bool) -> None:
        rules = merge_rules(sparsifier.model, sparsifier.targets, sparsifier.groups)
        found = self._describe(sparsifier)
        live = live_replica(sparsifier)

        def fetch(worker: int, like: Tensor, get: Callable[[Replica], Tensor]) -> Tensor:
            return self._fetch(live, worker, like, get)

        def mean(of: Sequence[int], like: Tensor, get: Callable[[Replica], Tensor]) -> Tensor:
            if len(of) == 1:
                return fetch(of[0], like, get)
            # Always in order of worker and in float64, so that processes, one process and a resumed run agree to the bit.
            total = torch.zeros(like.shape, dtype=torch.float64, device=like.device)
            for worker in of:
                total += fetch(worker, like, get)
            return (total / len(of)).to(like.dtype)

        # Whose mean a tensor is: that of one worker, or of all.
        sources = {name: list(range(self.num)) if rule is None else [rule] for name, rule in rules.items()}
        for name, tensor in live.tensors.items():
            value = mean(sources[name], tensor, lambda replica, name=name: replica.tensors[name])
            write_tensors({name: tensor}, {name: value})
        for name in live.params if with_optimizer else ():
            # A weight that a worker's data never reached has no state there.
            states = {w: found[w]["optimizer"][name] for w in sources[name] if found[w]["optimizer"][name]}
            _check_has_mean(name, list(states.values()))
            new: dict[str, Any] = {}
            for key, spec in next(iter(states.values()), {}).items():
                if not isinstance(spec, TensorSpec):
                    new[key] = spec
                    continue
                like = torch.empty(spec.shape, dtype=spec.dtype, device=live.state_device(name, key))
                new[key] = mean(list(states), like, lambda replica, name=name, key=key: replica.optimizer[name][key])
            write_state(sparsifier, live, name, new)
        masks: dict[str, Tensor | None] = {}
        previous: dict[str, Tensor] = {}
        for worker, group in enumerate(sparsifier.groups):
            for name in group.names:
                like = torch.empty_like(live.tensors[name], dtype=torch.uint8)
                masks[name] = None
                if found[worker]["sparse"][name]:
                    masks[name] = fetch(worker, like, lambda replica, name=name: _there(replica.masks[name]))
                if name in found[worker]["previous"]:
                    previous[name] = fetch(worker, like, lambda replica, name=name: replica.previous[name])
        sparsifier.previous = previous
        sparsifier.levels = [found[group]["levels"][group] for group in range(self.num)]
        for name, mask in masks.items():
            sparsifier.masks.set(name, mask)

    @abstractmethod
    def _describe(self, sparsifier: Sparsifier) -> Sequence[Mapping[str, Any]]:
        """`describe` of every worker's replica, in order."""

    @abstractmethod
    def _fetch(self, live: Replica, worker: int, like: Tensor, get: Callable[[Replica], Tensor]) -> Tensor:
        """A tensor of a worker's replica, of the shape, dtype and device of `like`; `live` is the one in the model."""


class ProcessWorkers(_Workers):
    """Each worker is a group of processes, which hold its replica as their model.

    Args:
        groups: The process groups.

    Attributes:
        switch: Called with the worker's own group when replicas part, and with None when they are one again: gradients are to
            be averaged over that group, or over all.
    """

    def __init__(self, groups: WorkerGroups) -> None:
        super().__init__(groups.num)
        self.groups = groups
        self.switch: Callable[[ProcessGroup | None], None] = lambda group: None
        self.reporter = groups.index

    def each(self, sparsifier: Sparsifier, update: Update) -> Iterator[int]:
        if update.worker in (None, self.groups.index):
            yield self.groups.index

    def fork(self, sparsifier: Sparsifier) -> None:
        self._set_apart(True)

    @contextmanager
    def _as_merged(self, sparsifier: Sparsifier) -> Iterator[None]:
        own = live_replica(sparsifier).clone(share_optimizer=True)
        self._merge(sparsifier, with_optimizer=False)
        try:
            yield
        finally:
            own.install(sparsifier, with_optimizer=False)

    def _describe(self, sparsifier: Sparsifier) -> Sequence[Mapping[str, Any]]:
        every = all_objects(describe(live_replica(sparsifier)))
        return [every[self.groups.leader(worker)] for worker in range(self.num)]

    def _fetch(self, live: Replica, worker: int, like: Tensor, get: Callable[[Replica], Tensor]) -> Tensor:
        own = worker == self.groups.index and self.groups.is_leader
        source = get(live).detach() if own else like
        # From where the weights are: NCCL sends nothing from a CPU, where some optimizers keep their count of steps.
        place = next(iter(live.params.values())).device
        value = torch.empty(like.shape, dtype=like.dtype, device=place).copy_(source)
        broadcast(value, self.groups.leader(worker))
        return value.to(like.device)

    def drop(self) -> None:
        self._set_apart(False)

    def replicas(self, sparsifier: Sparsifier) -> dict[int, Replica]:
        return {self.groups.index: live_replica(sparsifier)} if self.groups.is_leader else {}

    def adopt(self, sparsifier: Sparsifier, replicas: Mapping[int, Replica]) -> None:
        self._set_apart(True)
        replicas[self.groups.index].install(sparsifier, with_optimizer=True)

    @property
    def held(self) -> Sequence[int]:
        return (self.groups.index,)

    def _set_apart(self, apart: bool) -> None:
        self.apart = apart
        self.group = self.groups.group if apart else None
        self.switch(self.group)


class SequentialWorkers(_Workers):
    """All replicas in one process. The active one is in the model, the others wait in memory with their gradients."""

    def __init__(self, num: int) -> None:
        super().__init__(num)
        self.active = self._turn = 0
        self._waiting: list[Replica | None] = []

    def each(self, sparsifier: Sparsifier, update: Update) -> Iterator[int]:
        if not self.apart:
            assert update.worker is None, "replicas part before a worker's own update"
            yield 0
            return
        for worker in range(self.num) if update.worker is None else [update.worker]:
            self.activate(sparsifier, worker)
            yield worker

    def activate(self, sparsifier: Sparsifier, worker: int) -> None:
        if not self.apart or worker == self.active:
            return
        replica = self._waiting[worker]
        assert replica is not None
        self._waiting[self.active] = live_replica(sparsifier).clone(share_optimizer=True)
        replica.install(sparsifier, with_optimizer=True)
        self.active, self._waiting[worker] = worker, None

    def fork(self, sparsifier: Sparsifier) -> None:
        self.apart, self.active = True, 0
        live = live_replica(sparsifier)
        self._waiting = [None, *(live.clone() for _ in range(self.num - 1))]

    @property
    def held(self) -> Sequence[int]:
        return range(self.num)

    def replicas(self, sparsifier: Sparsifier) -> dict[int, Replica]:
        return {w: live_replica(sparsifier) if w == self.active else _there(self._waiting[w]) for w in self.held}

    def adopt(self, sparsifier: Sparsifier, replicas: Mapping[int, Replica]) -> None:
        self.apart, self.active = True, 0
        replicas[0].install(sparsifier, with_optimizer=True)
        self._waiting = [None, *(replicas[w] for w in range(1, self.num))]

    def begin_step(self) -> None:
        self._turn = 0

    def take_turn(self, sparsifier: Sparsifier, num_micro_batches: int) -> None:
        """The first micro-batches of a step are the first worker's, as with one process for each of them."""
        if self.apart:
            self.activate(sparsifier, self._turn * self.num // num_micro_batches)
            self._turn += 1

    def others(self, sparsifier: Sparsifier) -> Iterator[int]:
        """Each worker's gradients become a mean over its own micro-batches, where Trainer made it one over all."""
        if not self.apart:
            return
        last, self._turn = self.active, 0
        self._scale_gradients(sparsifier)
        for worker in self.held:
            if worker != last and _there(self._waiting[worker]).grads:
                self.activate(sparsifier, worker)
                self._scale_gradients(sparsifier)
                yield worker
        self.activate(sparsifier, last)

    def _scale_gradients(self, sparsifier: Sparsifier) -> None:
        for grad in live_replica(sparsifier).grads.values():
            grad.mul_(self.num)

    @contextmanager
    def _as_merged(self, sparsifier: Sparsifier) -> Iterator[None]:
        # A merge reads the waiting replicas and the model, which is one of them: so it is put with them first.
        self._waiting[self.active] = own = live_replica(sparsifier).clone(share_optimizer=True)
        self._merge(sparsifier, with_optimizer=False)
        try:
            yield
        finally:
            own.install(sparsifier, with_optimizer=False)
            self._waiting[self.active] = None

    def merge(self, sparsifier: Sparsifier) -> None:
        self._waiting[self.active] = live_replica(sparsifier).clone()
        super().merge(sparsifier)

    def _describe(self, sparsifier: Sparsifier) -> Sequence[Mapping[str, Any]]:
        return [describe(_there(replica)) for replica in self._waiting]

    def _fetch(self, live: Replica, worker: int, like: Tensor, get: Callable[[Replica], Tensor]) -> Tensor:
        return get(_there(self._waiting[worker])).detach().to(like.device)

    def drop(self) -> None:
        self.apart, self.active, self._turn, self._waiting = False, 0, 0, []


def _check_has_mean(name: str, states: Sequence[Mapping[str, Any]]) -> None:
    for key, spec in states[0].items() if len(states) > 1 else ():
        if isinstance(spec, TensorSpec) and not (
            spec.dtype.is_floating_point and all(state.get(key) == spec for state in states)
        ):
            raise GaPError(
                f"{name}: the workers' optimizer state '{key}' has no mean ({spec.dtype}, or not the same on all); expected an "
                "optimizer with plain floating-point state, such as adamw_torch_fused, or optimizer_reset: all"
            )


def _there(value: T | None) -> T:
    assert value is not None
    return value
