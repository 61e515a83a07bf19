"""What each process of benchmarks/communication.py measures. Times are the slowest rank's, after a barrier."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import GPT2Config, GPT2LMHeadModel

from gap_hf.config import GaPConfig
from gap_hf.reduction import GradientReducer, reduce_live_gradients
from gap_hf.sparsifier import Sparsifier

CONFIG = GaPConfig(sparsity=0.9, num_partitions=4, num_rounds=2, ramp_share=0, prune_share=0)
# Phases of one step each before a fine-tune of three: 1 + 2 * 4 and a quarter of all.
PLAN_STEPS = 12


@dataclass(frozen=True)
class Settings:
    """Read from the command line, see communication.py."""

    num_layers: int
    width: int
    batch: int
    length: int
    rounds: int
    seconds: float
    repeats: int


def main(part: str, settings: Settings, output: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    result = {"pair": pair, "pieces": pieces}[part](settings)
    if dist.get_rank() == 0:
        output.write_text(json.dumps(result), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def make_model(settings: Settings) -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            n_layer=settings.num_layers,
            n_embd=settings.width,
            n_head=max(1, settings.width // 64),
            n_positions=settings.length,
            vocab_size=1000,
            bos_token_id=0,
            eos_token_id=1,
            # Dropout draws random numbers, which is no part of what is compared.
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )


class Replica:
    """A model under DDP with or without the hook, and everything that one of its training steps needs."""

    def __init__(self, settings: Settings, *, live: bool) -> None:
        self.settings = settings
        self.model = make_model(settings)
        self.ddp = DistributedDataParallel(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        self.sparsifier = Sparsifier(self.model, CONFIG, total_steps=PLAN_STEPS, optimizer=self.optimizer)
        self.sparsifier.start()
        self.reducer = GradientReducer(self.sparsifier)
        self.buckets: dict[int, list[Tensor]] = {}  # of the last step
        if live:
            self.ddp.register_comm_hook(self, _noting_buckets)

    def step(self, seed: int, *, synchronise: bool = True) -> None:
        rows = (self.settings.batch, self.settings.length)
        generator = torch.Generator().manual_seed(2 * seed + dist.get_rank())
        ids = torch.randint(2, 1000, rows, generator=generator)
        with nullcontext() if synchronise else self.ddp.no_sync():
            self.ddp(input_ids=ids, labels=ids).loss.backward()
        self.sparsifier.mask_gradients()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.sparsifier.mask_weights()
        self.optimizer.zero_grad()


def _noting_buckets(state, bucket):  # no annotations: DDP takes none that are strings
    state.buckets[bucket.index()] = bucket.parameters()
    return reduce_live_gradients(state.reducer, bucket)


# --- bytes, and steps in turn ----------------------------------------------------------------------------------------


def pair(settings: Settings) -> dict[str, Any]:
    """DDP's own all-reduce and the hook on two replicas, step by step in turn; then what the hook sends over a run."""
    own, live = Replica(settings, live=False), Replica(settings, live=True)
    stages = {}
    for stage in ("phase", "fine_tune"):
        if stage == "fine_tune":
            for replica in (own, live):
                replica.sparsifier.prune_to_target()
        stages[stage] = {"live_share": 1 - live.sparsifier.sparsity(), **in_turn(own, live, settings)}
    same = zip(own.model.state_dict().values(), live.model.state_dict().values(), strict=True)
    exact = all(torch.equal(a, b) for a, b in same)
    return {"stages": stages, "weights_equal": exact, "bytes": count_bytes(live)}


def in_turn(own: Replica, live: Replica, settings: Settings) -> dict[str, Any]:
    """Seconds of each round's two steps; the order changes from round to round."""
    for seed in range(2):  # DDP rebuilds its buckets after the first step, and the index is made
        own.step(seed)
        live.step(seed)
    begin = time.perf_counter()
    seconds: list[list[float]] = []
    while len(seconds) < settings.rounds and not _any_rank(time.perf_counter() - begin > settings.seconds):
        seed = 2 + len(seconds)
        turn = [0.0, 0.0]
        for i in (0, 1) if seed % 2 else (1, 0):
            replica = (own, live)[i]
            turn[i] = timed(lambda replica=replica, seed=seed: replica.step(seed))
        seconds.append(turn)
    return {"seconds": slowest(seconds)}


def count_bytes(live: Replica) -> dict[str, Any]:
    """What the hook sends in each step of a whole run of the paper's schedule, counted by the hook itself."""
    sparsifier, reducer = live.sparsifier, live.reducer
    sparsifier.start()
    num_prunable = sum(w.numel for w in sparsifier.weights.values())
    num_params = sum(p.numel() for p in live.model.parameters())
    steps = []
    for step in range(PLAN_STEPS):
        reducer.num_sent = reducer.num_dense = 0
        live.step(step)
        assert reducer.num_dense == num_params
        # What is not prunable is sent whole, so the rest is the prunable set's.
        prunable = reducer.num_sent - (num_params - num_prunable)
        kind = "fine_tune" if sparsifier.phase is sparsifier.plan.fine_tune else "phase"
        steps.append({"stage": kind, "sent": reducer.num_sent, "sent_of_prunable": prunable})
        sparsifier.advance(step + 1)
    return {"num_params": num_params, "num_prunable": num_prunable, "steps": steps}


# --- pieces of the cost model ----------------------------------------------------------------------------------------

MESSAGES = (2**12, 2**16, 2**18, 2**20, 2**22, 2**24, 25 * 2**20)
# DDP has several buckets on the way at once, and while one waits for the other side another one works.
IN_FLIGHT = 4
BUFFER = 25 * 2**20 // 4  # entries of a full bucket


class Bucket:
    """Stands in for DDP's GradBucket, to time the hook's work without a backward pass."""

    def __init__(self, number: int, params: list[Tensor]) -> None:
        self._number, self._params = number, params
        self._buffer = torch.randn(sum(p.numel() for p in params))
        ends = torch.tensor([p.numel() for p in params]).cumsum(0).tolist()
        self._gradients = [self._buffer[e - p.numel() : e].view(p.shape) for p, e in zip(params, ends, strict=True)]

    def index(self) -> int:
        return self._number

    def buffer(self) -> Tensor:
        return self._buffer

    def parameters(self) -> list[Tensor]:
        return self._params

    def gradients(self) -> list[Tensor]:
        return self._gradients


def pieces(settings: Settings) -> dict[str, Any]:
    """Times of every piece of the cost model, and of the two things that it predicts."""
    repeats = settings.repeats
    all_reduce = []
    for size in MESSAGES:
        tensors = [torch.zeros(size // 4) for _ in range(IN_FLIGHT)]
        seconds = median_of(lambda tensors=tensors: _sum(tensors), repeats=repeats)
        all_reduce.append([size, seconds / IN_FLIGHT])
    replica = Replica(settings, live=True)
    replica.step(0)
    replica.step(1)  # the buckets are the rebuilt ones from here on
    layout = [replica.buckets[i] for i in sorted(replica.buckets)]
    step = {
        "alone": median_of(lambda: replica.step(2, synchronise=False), repeats=max(3, repeats // 4)),
        "whole": median_of(lambda: replica.step(2), repeats=max(3, repeats // 4)),
    }
    return {
        "num_processes": dist.get_world_size(),
        "all_reduce": all_reduce,
        "packing": [packing(density, whole, repeats) for whole in (0, 0.5) for density in (0.1, 0.2, 0.4)],
        "forms": forms(repeats),
        "step": step,
        "update": mask_update(replica.sparsifier, max(3, repeats // 4)),
        "communication": communication(replica, layout, repeats),
    }


def _sum(tensors: list[Tensor]) -> None:
    for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
        assert work is not None
        work.wait()


def packing(density: float, whole: float, repeats: int) -> dict[str, Any]:
    """Pack and unpack one full bucket, nothing sent: a share `whole` of it is a dense tensor, the rest has random masks."""
    rows = round(whole * 1024)
    model = nn.Sequential(*(nn.Linear(BUFFER // 1024, n, bias=False) for n in (1024 - rows, rows) if n))
    config = GaPConfig(sparsity=1 - density, method="static", include=("0",))
    sparsifier = Sparsifier(model, config, total_steps=9)
    sparsifier.start()
    reducer = GradientReducer(sparsifier)
    # Over one rank an all-reduce sends nothing, and only its call is left.
    reducer.group = _alone()
    bucket: Any = Bucket(0, list(model.parameters()))
    seconds = median_of(lambda: reducer.reduce(bucket).wait(), repeats=repeats)
    return {**counts_of(bucket, reducer), "seconds": seconds}


def counts_of(bucket: Any, reducer: GradientReducer) -> dict[str, Any]:
    """Entries of a bucket that has been reduced: all, those gathered one by one, those that went in whole stretches."""
    packing = reducer._packings[bucket.index()]
    live = 0 if packing.index is None else packing.index.numel()
    return {
        "num_entries": bucket.buffer().numel(),
        "num_live": live,
        "num_whole": packing.num_sent - live,
        "num_sent": packing.num_sent,
        "packed": packing.index is not None,
    }


def forms(repeats: int) -> list[list[Any]]:
    """Ways to pick the live tenth of a full bucket and to put it back: [name, bytes of index a weight, pick, put]."""
    generator = torch.Generator().manual_seed(0)
    mask = (torch.rand(BUFFER, generator=generator) < 0.1).to(torch.uint8)
    flags, index = mask.view(torch.bool), mask.nonzero().squeeze(1)
    short, density = index.int(), float(index.numel() / BUFFER)
    buffer, packed = torch.randn(BUFFER, generator=generator), torch.empty(index.numel())
    ways: list[tuple[str, float, Callable[[], object], Callable[[], object]]] = [
        (
            "int32 index, widened to scatter (what is used)",
            4 * density,
            lambda: torch.index_select(buffer, 0, short, out=packed),
            lambda: buffer.zero_().index_copy_(0, short.long(), packed),
        ),
        (
            "int64 index",
            8 * density,
            lambda: torch.index_select(buffer, 0, index, out=packed),
            lambda: buffer.zero_().index_copy_(0, index, packed),
        ),
        (
            "indexing with int32, index_put_",
            4 * density,
            lambda: buffer[short],
            lambda: buffer.zero_().index_put_((short,), packed),
        ),
        (
            "gather and scatter_",
            8 * density,
            lambda: torch.gather(buffer, 0, index, out=packed),
            lambda: buffer.zero_().scatter_(0, index, packed),
        ),
        (
            "masked_select and masked_scatter_",
            0.0,
            lambda: torch.masked_select(buffer, flags, out=packed),
            lambda: buffer.zero_().masked_scatter_(flags, packed),
        ),
    ]
    return [
        [name, bytes_, median_of(pick, repeats=repeats), median_of(put, repeats=repeats)]
        for name, bytes_, pick, put in ways
    ]


_GROUPS: list[Any] = []


def _alone() -> Any:
    """This rank's group of itself."""
    if not _GROUPS:
        _GROUPS.extend(dist.new_group([rank]) for rank in range(dist.get_world_size()))
    return _GROUPS[dist.get_rank()]


def mask_update(sparsifier: Sparsifier, repeats: int) -> dict[str, Any]:
    """A phase's change by its pieces, and as a whole: prune one group, apply all masks, take the digest."""
    names, masks = sparsifier.groups[0].names, sparsifier.masks
    old = {n: masks[n] for n in names}

    def prune() -> None:
        for name, mask in sparsifier.selection.by_magnitude(names, masks=old).items():
            masks.set(name, mask)

    def whole() -> None:
        prune()
        masks.apply_to_weights()
        masks.digest()

    prune()
    return {
        "num_pruned": sum(sparsifier.weights[n].numel for n in names),
        "num_weights": sum(w.numel for w in sparsifier.weights.values()),
        "prune": median_of(prune, repeats=repeats),
        "apply": median_of(masks.apply_to_weights, repeats=repeats),
        "digest": median_of(masks.digest, repeats=repeats),
        "whole": median_of(whole, repeats=repeats),
    }


def communication(replica: Replica, layout: list[list[Tensor]], repeats: int) -> dict[str, Any]:
    """All of a step's buckets through the hook, one after another as backward would launch them, and waited for."""
    sparsifier = replica.sparsifier
    sparsifier.start()
    reducer = replica.reducer
    buckets: list[Any] = [Bucket(i, params) for i, params in enumerate(layout)]

    def step() -> None:
        for future in [reducer.reduce(bucket) for bucket in buckets]:
            future.wait()

    seconds = median_of(step, repeats=repeats)
    return {
        "live_share": 1 - sparsifier.sparsity(),
        "buckets": [counts_of(bucket, reducer) for bucket in buckets],
        "seconds": seconds,
    }


# --- clocks ----------------------------------------------------------------------------------------------------------


def timed(work: Callable[[], object]) -> float:
    """Seconds of this rank; all begin together."""
    dist.barrier()
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def median_of(work: Callable[[], object], *, repeats: int, warm_up: int = 2) -> float:
    """Median of the slowest rank's seconds."""
    for _ in range(warm_up):
        work()
    seconds = slowest([timed(work) for _ in range(repeats)])
    return float(torch.tensor(seconds).median())


def slowest(seconds: Any) -> Any:
    """Largest over the ranks, entry by entry."""
    tensor = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.tolist()


def _any_rank(flag: bool) -> bool:
    return bool(slowest([float(flag)])[0])
