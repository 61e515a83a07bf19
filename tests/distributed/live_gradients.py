"""What test_live_gradients.py runs in every process: each case compares the hook with DDP's own all-reduce.

    torchrun --nproc_per_node 2 live_gradients.py FOLDER CASE...

A case returns plain data, which is written to FOLDER/CASE-RANK.json.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from toys import CONFIG as TOY_CONFIG
from toys import Tokens, causal_lm, gap_trainer

from gap_hf import sparse_layers
from gap_hf.config import GaPConfig
from gap_hf.errors import GaPError
from gap_hf.reduction import PACK_BELOW, GradientReducer, reduce_live_gradients
from gap_hf.sparse_products import Products
from gap_hf.sparsifier import Sparsifier

CONFIG = GaPConfig(
    sparsity=0.8, num_partitions=2, num_rounds=2, ramp_share=0, prune_share=0, include=["Linear", "Conv2d"]
)
RIGL = GaPConfig(
    sparsity=0.8, method="rigl", update_steps=4, drop_fraction=0.5, fine_tune_share=0.2, include=["Linear", "Conv2d"]
)
NUM_STEPS = 12
SMALL_BUCKETS = {"bucket_cap_mb": 0.004}


class Net(nn.Module):
    """Used in another order than registered, so that DDP's second buckets differ from its first."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(24, 5)
        self.first = nn.Linear(128, 24)
        self.branch = nn.Linear(24, 24)
        self.middle = nn.Linear(24, 24)
        self.norm = nn.LayerNorm(24)
        # Its gradients lie in the bucket as it lies in memory, which is not the order of its mask's rows.
        self.conv = nn.Conv2d(3, 8, 3, padding=1).to(memory_format=torch.channels_last)

    def forward(self, x: Tensor, *, use_branch: bool = True) -> Tensor:
        x = self.first(self.conv(x).relu().flatten(1)).relu()
        x = self.norm(self.middle(x)).relu()
        if use_branch:
            x = x + self.branch(x)
        return self.last(x).float().square().mean()


@dataclass
class Run:
    ddp: DistributedDataParallel
    sparsifier: Sparsifier
    reducer: GradientReducer | None
    losses: list[float] = field(default_factory=list)
    buckets: list[list[list[str]]] = field(default_factory=list)  # names in each bucket, by step
    sent: list[int] = field(default_factory=list)  # by step
    dense: list[int] = field(default_factory=list)
    whole_steps: list[int] = field(default_factory=list)


def make_run(
    config: GaPConfig,
    *,
    hook: bool,
    dtype: torch.dtype = torch.float32,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    **ddp_args: Any,
) -> Run:
    torch.manual_seed(0)
    model = Net().to(dtype)
    ddp = DistributedDataParallel(model, **{**SMALL_BUCKETS, **ddp_args})
    stepped = optimizer(model.parameters(), lr=1e-2)
    sparsifier = Sparsifier(model, config, total_steps=NUM_STEPS, optimizer=stepped)
    sparsifier.start()
    run = Run(ddp, sparsifier, GradientReducer(sparsifier) if hook else None)
    if run.reducer is not None:
        names = {param: name for name, param in model.named_parameters()}

        def watched(state, bucket):  # DDP takes no annotations that are strings
            run.buckets[-1].append([names[p] for p in bucket.parameters()])
            return reduce_live_gradients(state, bucket)

        ddp.register_comm_hook(run.reducer, watched)
    return run


def batch_of(step: int, micro: int, dtype: torch.dtype) -> Tensor:
    seed = 1000 * step + 10 * micro + dist.get_rank()
    size = 2 + dist.get_rank() % 2 * (step % 3)  # an uneven last batch is nothing special, but cheap to have
    return torch.randn(size, 3, 4, 4, generator=torch.Generator().manual_seed(seed)).to(dtype)


def train(run: Run, *, accumulate: int = 1, branch: Callable[[int], bool] = lambda step: True) -> Run:
    optimizer = run.sparsifier.optimizer
    dtype = next(run.ddp.parameters()).dtype
    for step in range(NUM_STEPS):
        run.buckets.append([])
        if run.reducer is not None:
            run.reducer.num_sent = run.reducer.num_dense = 0
        if run.sparsifier.needs_dense_gradients:
            run.whole_steps.append(step)
        for micro in range(accumulate):
            with run.ddp.no_sync() if micro < accumulate - 1 else nullcontext():
                loss = run.ddp(batch_of(step, micro, dtype), use_branch=branch(step)) / accumulate
                loss.backward()
            run.losses.append(float(loss.detach()))
        if run.reducer is not None:
            run.sent.append(run.reducer.num_sent)
            run.dense.append(run.reducer.num_dense)
        run.sparsifier.mask_gradients()
        nn.utils.clip_grad_norm_(run.ddp.parameters(), 1.0)
        optimizer.step()
        run.sparsifier.mask_weights()
        optimizer.zero_grad()
        run.sparsifier.advance(step + 1)
    return run


def compare(
    config: GaPConfig = CONFIG,
    *,
    accumulate: int = 1,
    branch: Callable[[int], bool] = lambda step: True,
    **make: Any,
) -> dict[str, Any]:
    """Train once with DDP's own all-reduce and once with the hook."""
    own = train(make_run(config, hook=False, **make), accumulate=accumulate, branch=branch)
    live = train(make_run(config, hook=True, **make), accumulate=accumulate, branch=branch)
    theirs, ours = own.ddp.module.state_dict(), live.ddp.module.state_dict()
    return {
        "losses_equal": own.losses == live.losses,
        "weights_equal": all(torch.equal(theirs[k], ours[k]) for k in theirs),
        "largest_difference": max(float((theirs[k].double() - ours[k].double()).abs().max()) for k in theirs),
        "masks_equal": own.sparsifier.masks.digest() == live.sparsifier.masks.digest(),
        "moved": own.losses[0] != own.losses[-1],
        "digest": live.sparsifier.masks.digest(),
        "sum": sum(float(p.detach().double().sum()) for p in live.ddp.parameters()),
        "sent": live.sent,
        "dense": live.dense,
        "whole_steps": live.whole_steps,
        "buckets": [live.buckets[0], live.buckets[1], live.buckets[-1]],
    }


# --- plain loops -----------------------------------------------------------------------------------------------------


def plain() -> dict[str, Any]:
    return compare()


def bucket_view() -> dict[str, Any]:
    return compare(gradient_as_bucket_view=True)


def one_bucket() -> dict[str, Any]:
    return compare(bucket_cap_mb=25)


def accumulation() -> dict[str, Any]:
    return compare(accumulate=3)


def unused() -> dict[str, Any]:
    """Now all ranks leave the branch out, now only the first does."""
    return compare(
        find_unused_parameters=True, branch=lambda step: step % 3 == 0 or (step % 3 == 1 and dist.get_rank() == 0)
    )


def static_graph() -> dict[str, Any]:
    return compare(static_graph=True)


def bf16() -> dict[str, Any]:
    return compare(dtype=torch.bfloat16)


def fp16() -> dict[str, Any]:
    # Adam's epsilon is 0 in fp16: SGD.
    return compare(dtype=torch.float16, gradient_as_bucket_view=True, optimizer=torch.optim.SGD)


def rigl() -> dict[str, Any]:
    return compare(RIGL)


def gmp() -> dict[str, Any]:
    """Live shares on both sides of PACK_BELOW."""
    return compare(GaPConfig(sparsity=0.8, method="gmp", update_steps=1, include=["Linear", "Conv2d"]))


def counts() -> dict[str, Any]:
    """What the reducer counts, beside a count from the masks, after each kind of mask change."""
    run = make_run(CONFIG, hook=True)
    assert run.reducer is not None
    out = []
    for step in range(NUM_STEPS):
        run.buckets.append([])
        run.reducer.num_sent = run.reducer.num_dense = 0
        run.ddp(batch_of(step, 0, torch.float32)).backward()
        expected = 0
        masks = run.sparsifier.masks
        for name, param in run.ddp.module.named_parameters():
            live = masks.live(name) if name in masks.params else param.numel()
            expected += live if live < PACK_BELOW * param.numel() else param.numel()
        out.append([run.reducer.num_sent, expected, run.reducer.num_dense])
        run.ddp.zero_grad()
        run.sparsifier.advance(step + 1)
    return {"counts": out, "params": sum(p.numel() for p in run.ddp.parameters())}


def zeros() -> dict[str, Any]:
    """Masked places of what was packed are 0, even where one rank has a NaN."""
    run = make_run(CONFIG, hook=True)
    run.buckets.append([])
    param, mask = next((p, m) for p, m in run.sparsifier.masks.sparse_params() if p.ndim == 2)
    before = []

    def poison(grad: Tensor) -> Tensor:
        before.append(int((grad[mask == 0] != 0).sum()))
        return grad.masked_fill(mask == 0, torch.nan) if dist.get_rank() == 0 else grad

    param.register_hook(poison)
    run.ddp(batch_of(0, 0, torch.float32)).backward()
    grad = param.grad
    assert grad is not None
    return {
        "masked_had_gradients": before[0] > 0,
        "masked_are_zero": bool((grad[mask == 0] == 0).all()),
        "live_are_not": bool((grad[mask == 1] != 0).any()) and bool(grad.isfinite().all()),
    }


def sparse_embedding() -> dict[str, Any]:
    """An embedding with sparse gradients has a bucket of its own, which goes DDP's way."""
    results = []
    for hook in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(10, 24, sparse=True), nn.Linear(24, 24), nn.Linear(24, 24))
        ddp = DistributedDataParallel(model)
        sparsifier = Sparsifier(model, CONFIG.replace(include=["Linear"]), total_steps=20)
        sparsifier.start()
        if hook:
            ddp.register_comm_hook(GradientReducer(sparsifier), reduce_live_gradients)
        for step in range(2):
            ids = torch.tensor([[dist.get_rank() + step, 3]])
            ddp(ids).square().mean().backward()
        sparsifier.mask_gradients()
        results.append([p.grad.to_dense() for p in model.parameters() if p.grad is not None])
    return {"equal": all(torch.equal(a, b) for a, b in zip(*results, strict=True)), "num": len(results[0])}


def groups() -> dict[str, Any]:
    """The group switches from step to step; each half of the ranks has masks of its own while it is on its own."""
    world, rank = dist.get_world_size(), dist.get_rank()
    half = max(1, world // 2)
    halves = [dist.new_group(list(range(i, i + half))) for i in range(0, world, half)]
    mine = list(range(rank // half * half, rank // half * half + half))
    run = make_run(CONFIG, hook=True)
    reducer, sparsifier = run.reducer, run.sparsifier
    assert reducer is not None
    start = {name: sparsifier.masks[name] for name in sparsifier.weights}
    differences = []
    for step in range(6):
        run.buckets.append([])
        alone = step in (1, 2, 4)
        reducer.group = halves[rank // half] if alone else None
        # A tensor that only this half has dense.
        for i, name in enumerate(sparsifier.weights):
            sparsifier.masks.set(name, None if alone and i == rank // half else start[name])
        run.ddp.zero_grad()
        run.ddp(batch_of(step, 0, torch.float32)).backward()
        plain = Net()
        plain.load_state_dict(run.ddp.module.state_dict())
        plain(batch_of(step, 0, torch.float32)).backward()
        sparsifier.mask_gradients()
        for (name, param), local in zip(run.ddp.module.named_parameters(), plain.parameters(), strict=True):
            assert local.grad is not None and param.grad is not None
            everyone = [torch.empty(local.shape) for _ in range(world)]
            dist.all_gather(everyone, local.grad.contiguous())
            members = mine if alone else range(world)
            mean = sum(everyone[r] / len(members) for r in members)
            mask = sparsifier.masks[name] if name in sparsifier.weights else None
            mean = mean if mask is None else mean * mask
            differences.append(float((param.grad - mean).abs().max()))
    return {"largest_difference": max(differences)}


def order_of_addition() -> dict[str, Any]:
    """The same numbers at two places of a buffer: why packing may change the last bits, and between two ranks cannot."""
    values = torch.randn(1000, generator=torch.Generator().manual_seed(dist.get_rank()))
    alone, behind = values.clone(), torch.cat([torch.zeros(5000), values])
    dist.all_reduce(alone)
    dist.all_reduce(behind)
    return {"equal": torch.equal(alone, behind[5000:]), "difference": float((alone - behind[5000:]).abs().max())}


# --- the trainer -----------------------------------------------------------------------------------------------------


def trainer_runs(folder: Path, *, seconds: bool = False, **changes: Any) -> dict[str, Any]:
    """The whole of a GaPTrainer run with and without the hook."""
    config, packed = changes.pop("config", TOY_CONFIG), changes.pop("live_state", False)
    seen = []
    for live in (False, None):
        model = causal_lm(n_layer=2)
        config = config.replace(live_gradients=live, live_state=packed and live is None)
        trainer = gap_trainer(folder, config=config, model=model, **changes)
        trainer.train()
        if seconds:  # a second train() on the same DDP module
            trainer.train()
        log = [
            {k: v for k, v in r.items() if "runtime" not in k and "per_second" not in k}
            for r in trainer.state.log_history
        ]
        seen.append((trainer, log))
    (own, own_log), (live, live_log) = seen
    theirs, ours = own.model.state_dict(), live.model.state_dict()
    reducer = live._gap_reducer
    return {
        "weights_equal": all(torch.equal(theirs[k], ours[k]) for k in theirs),
        "largest_difference": max(float((theirs[k] - ours[k]).abs().max()) for k in theirs),
        "log_equal": own_log == live_log,
        "num_records": len(own_log),
        "own_has_none": own._gap_reducer is None,
        "live_has_one": reducer is not None,
        "share_sent": reducer.num_sent / reducer.num_dense if reducer is not None else None,
        "current": reducer is not None and reducer.sparsifier is live.gap,
        "at_target": live.gap.at_target,
    }


def trainer(folder: Path) -> dict[str, Any]:
    """40 rows in batches of 3 on each rank: every epoch's last batch is short."""
    return trainer_runs(folder, per_device_train_batch_size=3, gradient_accumulation_steps=2)


def trainer_rigl(folder: Path) -> dict[str, Any]:
    config = GaPConfig(sparsity=0.9, method="rigl", update_steps=5, drop_fraction=0.5)
    return trainer_runs(folder, config=config, max_steps=12)


def trainer_live_state(folder: Path) -> dict[str, Any]:
    """The optimizer's state packed too, against neither."""
    return trainer_runs(folder, live_state=True, gradient_accumulation_steps=2)


def trainer_sparse_compute(folder: Path) -> dict[str, Any]:
    """Gradients that the kernels made, which are 0 where weights are masked, are reduced as others are."""
    sparse_layers.MIN_WEIGHTS = 1
    count, original = [0], Products.weight_gradient

    def counted(self: Products, *args: Any) -> Tensor | None:
        count[0] += 1
        return original(self, *args)

    Products.weight_gradient = counted  # type: ignore[method-assign]
    found = trainer_runs(folder, config=TOY_CONFIG.replace(sparse_compute=True))
    Products.weight_gradient = original  # type: ignore[method-assign]
    assert count[0] > 100, "dense ran"
    return found


def trainer_twice(folder: Path) -> dict[str, Any]:
    return trainer_runs(folder, seconds=True, max_steps=8)


def trainer_compiled(folder: Path) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dynamo's own
        return trainer_runs(folder, max_steps=8, torch_compile=True, torch_compile_backend="eager")


def trainer_plain(folder: Path) -> dict[str, Any]:
    """Where nothing may be registered: without GaP, and where too little is masked."""
    hooks = {}
    for name, config in (
        ("off", None),
        ("dense", GaPConfig(method="dense")),
        ("little", TOY_CONFIG.replace(sparsity=0.3)),
        ("asked", TOY_CONFIG.replace(sparsity=0.3, live_gradients=True)),
        ("on", TOY_CONFIG),
    ):
        trainer = gap_trainer(folder, config=config, max_steps=8, train_dataset=Tokens(size=16))
        trainer.train()
        wrapped = trainer.model_wrapped
        hooks[name] = len(wrapped._comm_hooks) if isinstance(wrapped, DistributedDataParallel) else 0
    return hooks


def trainer_other_hook(folder: Path) -> dict[str, Any]:
    """The user's own hook is not replaced."""
    trainer = gap_trainer(folder, max_steps=8)
    wrap = trainer.accelerator.prepare_model

    def with_hook(*args: Any, **kwargs: Any) -> Any:
        model = wrap(*args, **kwargs)
        model.register_comm_hook(None, allreduce_hook)
        return model

    trainer.accelerator.prepare_model = with_hook
    try:
        trainer.train()
    except GaPError as error:
        return {"error": str(error)}
    return {"error": None}


def main(folder: Path, cases: list[str]) -> None:
    # DDP's first bucket holds a megabyte whatever bucket_cap_mb says; the toys are smaller.
    dist._DEFAULT_FIRST_BUCKET_BYTES = 4096
    warnings.simplefilter("error")
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    for case in cases:
        function = globals()[case]
        result = function(folder / case) if case.startswith("trainer") else function()
        (folder / f"{case}-{dist.get_rank()}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
