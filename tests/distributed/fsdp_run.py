"""One process of FSDP2 runs under gloo. Beside each sharded model stands a whole copy on every process: before a change the
copy takes weights, gradients and optimizer state of the sharded one, both change, and all must be equal bit for bit.

Usage: fsdp_run.py FOLDER 1,2,4 [CASE ...]: with one process, then with two, then with four. Masks are saved in
FOLDER/WORLD_SIZE, and each world size loads those of the ones before it.
"""

from __future__ import annotations

import copy
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from toys import Tokens, arguments
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig
from transformers.pytorch_utils import Conv1D

from gap_hf import GaPConfig, GaPError, GaPTrainer, Sparsifier, checkpoint
from gap_hf.pattern_names import parse_pattern
from gap_hf.patterns import pooled_masks
from gap_hf.shards import local, part_of

NUM_STEPS = 14
HARD = {"ramp_share": 0, "prune_share": 0}


class Block(nn.Module):
    """Odd sizes leave ranks with fewer rows, or none; the others let every pattern fit, and shards cut structures."""

    def __init__(self, odd: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 5 if odd else 20, bias=False)
        self.fused = nn.Linear(5, 12, bias=False) if odd else Conv1D(12, 20)
        self.down = nn.Linear(12, 8, bias=False)
        self.conv = nn.Conv1d(8, 8, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(self.fused(self.up(self.norm(x)).relu()).relu())
        return x + self.conv(x.transpose(-1, -2)).transpose(-1, -2)


class Net(nn.Module):
    def __init__(self, odd: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(odd) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def gpt2() -> nn.Module:
    sizes = {"n_layer": 2, "n_embd": 12, "n_head": 2, "vocab_size": 33, "n_positions": 8}
    return GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=1, **sizes)).eval()


def tied(model: nn.Module) -> nn.Module:
    """Weights of few values, most of them equal in magnitude."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.where(p.abs() < 0.1, 0.25, -0.25) if p.ndim > 1 else p)
    return model


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2, foreach=True)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "odd": lambda: Net(odd=True),
    "even": lambda: Net(odd=False),
    "tied": lambda: tied(Net(odd=True)),
    "bf16": lambda: Net(odd=True).bfloat16(),
    "gpt2": gpt2,
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": adamw,
    "radam": lambda params: torch.optim.RAdam(params, lr=1e-2),
    "momentum": lambda params: torch.optim.SGD(params, lr=1e-2, momentum=0.9),
}
INPUTS_OF_FOUR = {"exclude": ["*.fused"]}
# name -> model, optimizer, config, how it is sharded
CASES: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "softened": ("odd", "adamw", {"num_partitions": 3, "lr_density_power": 0.5}, "blocks"),
    "hard": ("odd", "adamw", {"num_partitions": 2, "num_rounds": 2, "include": ["Block"], **HARD}, "blocks"),
    "hard, all moments": ("odd", "adamw", {"num_partitions": 2, "optimizer_reset": "all", **HARD}, "root"),
    "random, one pool": ("odd", "adamw", {"method": "random", "num_partitions": 3, "distribution": "global"}, "blocks"),
    "rigl": ("odd", "adamw", {"method": "rigl", "update_steps": 3, "drop_fraction": 0.5}, "blocks"),
    "rigl, one pool": ("odd", "radam", {"method": "rigl", "update_steps": 3, "distribution": "global"}, "root"),
    "mest": ("odd", "momentum", {"method": "mest", "update_steps": 3, "drop_fraction": 0.5}, "blocks"),
    "blocks, one pool": ("even", "adamw", {"method": "rigl", "update_steps": 3, "pattern": "block:4x1", "distribution": "global"}, "blocks"),
    "rows of blocks": ("odd", "adamw", {"method": "acdc", "num_rounds": 3, "pattern": "block:1x4", "exclude": ["*.fused"]}, "blocks"),
    "2:4": ("even", "adamw", {"num_partitions": 3, "pattern": "2:4", "sparsity": 0.5}, "blocks"),
    "2:4, odd": ("odd", "adamw", {"num_partitions": 2, "pattern": "2:4", "sparsity": 0.5, "exclude": ["*.fused"]}, "blocks"),
    "2:4 by gradient": ("even", "adamw", {"method": "rigl", "update_steps": 3, "pattern": "2:4", "sparsity": 0.5}, "root"),
    "transposable": ("even", "adamw", {"num_partitions": 2, "pattern": "transposable:2:4", "sparsity": 0.5}, "blocks"),
    "ties": ("tied", "adamw", {"method": "gmp", "distribution": "global", "initial_mask": "magnitude"}, "blocks"),
    "bf16": ("bf16", "adamw", {"method": "gmp"}, "blocks"),
    "gpt2": ("gpt2", "adamw", {"num_partitions": 2, "pattern": "2:4", "sparsity": 0.5}, "blocks"),
    "offloaded": ("odd", "adamw", {"num_partitions": 2}, "offload"),
    "replicas": ("odd", "adamw", {"num_partitions": 2, "distribution": "global"}, "hsdp"),
}  # fmt: skip
# Not all of them with every number of processes, because four on two cores wait for one another most of the time.
CASES_OF = {
    1: ("hard", "rigl", "2:4"),
    2: ("softened", "hard", "hard, all moments", "random, one pool", "rigl, one pool", "mest", "blocks, one pool", "rows of blocks", "2:4 by gradient", "transposable", "bf16", "gpt2", "offloaded"),
    4: ("rigl", "2:4, odd", "blocks, one pool", "ties", "replicas"),
}  # fmt: skip


def shard(model: nn.Module, how: str) -> None:
    options: dict[str, Any] = {"offload_policy": CPUOffloadPolicy(pin_memory=False)} if how == "offload" else {}
    world = dist.get_world_size()
    if how == "hsdp":
        options["mesh"] = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
    layers = getattr(model, "blocks", None) or model.transformer.h
    for layer in layers if how != "root" else ():
        fully_shard(layer, **options)
    fully_shard(model, **options)


def gathered(tensors: Mapping[Any, Tensor]) -> dict[Any, Tensor]:
    """The whole of each tensor, by the plainest means: everybody's parts, one after the other."""
    everybody: list[Any] = [None] * dist.get_world_size()
    parts = {k: local(t).detach().contiguous() for k, t in tensors.items() if isinstance(t, DTensor)}
    dist.all_gather_object(everybody, {k: p.reshape(-1).view(torch.uint8).numpy().tobytes() for k, p in parts.items()})
    # Of replicas those with this process: one row of the mesh.
    rows = {t.device_mesh: t.device_mesh.mesh for t in tensors.values() if isinstance(t, DTensor)}
    ranks = {m: mesh.reshape(-1, mesh.shape[-1]) for m, mesh in rows.items()}
    ranks = {m: mesh[(mesh == dist.get_rank()).any(dim=1)].flatten().tolist() for m, mesh in ranks.items()}
    out = {k: tensor.detach().clone() for k, tensor in tensors.items() if k not in parts}
    for key, part in parts.items():
        data = b"".join(everybody[r][key] for r in ranks[tensors[key].device_mesh])
        out[key] = torch.frombuffer(bytearray(data), dtype=part.dtype).view(tensors[key].shape)
    return out


class Pair:
    """A sharded run and its whole copy."""

    def __init__(self, name: str) -> None:
        kind, optimizer, values, how = CASES[name]
        torch.manual_seed(0)
        model = MODELS[kind]()
        self.copy = copy.deepcopy(model)
        self.model = model
        shard(model, how)
        self.optimizer, self.other = (
            OPTIMIZERS[optimizer](model.parameters()),
            OPTIMIZERS[optimizer](self.copy.parameters()),
        )
        self.config = GaPConfig(**{"sparsity": 0.8, **values})
        self.exact = optimizer != "radam"  # whose grown moments start from a sum
        self.batches = torch.Generator().manual_seed(dist.get_rank())
        make = {"total_steps": NUM_STEPS, "seed": 3}
        if how == "root":
            self.forward(model)  # leaves the root's parameters gathered, which must not be taken for the weights
        self.run = Sparsifier(model, self.config, optimizer=self.optimizer, **make)
        self.whole = Sparsifier(self.copy, self.config, optimizer=self.other, **make)
        self.num_compared = 0

    def forward(self, model: nn.Module) -> Tensor:
        if isinstance(model, GPT2LMHeadModel):
            ids = torch.randint(33, (2, 6), generator=self.batches)
            return model(input_ids=ids, labels=ids).loss
        x = torch.randn(2, 4, 8, generator=self.batches).to(next(iter(self.copy.parameters())).dtype)
        return model(x).square().mean()

    def state(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[Any, Tensor]:
        """Weights, gradients and optimizer state, as they lie."""
        found: dict[Any, Tensor] = {}
        for name, p in model.named_parameters():
            found[name, "weight"] = p
            if p.grad is not None:
                found[name, "grad"] = p.grad
            for key, value in optimizer.state.get(p, {}).items():
                found[name, key] = value if isinstance(value, Tensor) else torch.tensor(value)
        return found

    def masks(self, run: Sparsifier) -> dict[Any, Tensor]:
        """Masks in force and those of the last prunes, as their weights lie."""
        found = {(n, "mask"): mask for n in run.weights if (mask := run.masks[n]) is not None}
        found |= {(n, "previous"): mask for n, mask in run.previous.items()}
        for (name, key), mask in found.items():
            if isinstance(param := run.masks.params[name], DTensor):
                lie = {"shape": param.shape, "stride": param.stride()}
                found[name, key] = DTensor.from_local(mask, param.device_mesh, param.placements, **lie)
        return found

    @torch.no_grad()
    def take(self) -> None:
        """Let the copy have what the sharded model has."""
        found = gathered(self.state(self.model, self.optimizer))
        for name, p in self.copy.named_parameters():
            p.copy_(found[name, "weight"])
            p.grad = found.get((name, "grad"))
            state = {k: v for (n, k), v in found.items() if n == name and k not in ("weight", "grad")}
            self.other.state.pop(p, None)
            if state:
                self.other.state[p] = {k: v.clone() for k, v in state.items()}

    def both(self, method: str, *args: Any) -> None:
        """Do the same to both, and compare everything."""
        self.take()
        change, expected = getattr(self.run, method)(*args), getattr(self.whole, method)(*args)
        assert (change is None) == (expected is None)
        for key in ("step", "phase", "pruned", "grown", "sparsity", "model_sparsity", "mask_iou") if change else ():
            assert getattr(change, key) == getattr(expected, key), (key, change, expected)
        if change and expected.pruning_error is not None:
            assert math.isclose(change.pruning_error, expected.pruning_error, rel_tol=1e-5), (change, expected)
        assert self.run.report() == self.whole.report()
        found = gathered(self.state(self.model, self.optimizer) | self.masks(self.run))
        wanted = self.state(self.copy, self.other) | self.masks(self.whole)
        assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
        for key, tensor in wanted.items():
            same = torch.equal(found[key], tensor) if self.exact else torch.allclose(found[key], tensor, rtol=1e-5)
            assert same, (key, found[key] - tensor)
        self.num_compared += 1

    def is_due(self, step: int) -> bool:
        updates = self.run.plan.updates[self.run.num_done :]
        return self.run.plan.begins_at(step) is not None or any(u.step <= step for u in updates)

    def assert_zeros(self) -> None:
        for name, p in self.run.masks.params.items():
            mask = self.run.masks[name]
            assert mask is None or not local(p).detach()[mask == 0].any(), name

    def train(self) -> None:
        self.both("start")
        for step in range(NUM_STEPS):
            self.forward(self.model).backward()
            if self.is_due(self.run.step):
                self.both("mask_gradients")
            else:
                self.run.mask_gradients()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.run.mask_weights()
            self.assert_zeros()
            self.optimizer.zero_grad()
            if self.is_due(step + 1):
                self.both("advance", step + 1)
                self.assert_zeros()
            else:
                assert self.run.advance(step + 1) is None
            if step == NUM_STEPS // 2:
                self.on_half()
        assert self.run.at_target

    def on_half(self) -> None:
        """Replaced by whoever wants something done in the middle."""


def check_saving(pair: Pair, name: str, folder: Path) -> None:
    """The files are a single process' byte for byte, and load in any other world size."""
    rank, world = dist.get_rank(), dist.get_world_size()
    path, alone = folder / str(world) / name, folder / f"{world}-{rank}-alone" / name
    checkpoint.save(path, pair.run, step=pair.run.step, write=rank == 0)
    checkpoint.save(alone, pair.whole, step=pair.run.step)
    assert pair.run.masks.digest() == pair.whole.masks.digest()
    dist.barrier()
    for file in (checkpoint.CONFIG_NAME, checkpoint.MASKS_NAME):
        assert (path / file).read_bytes() == (alone / file).read_bytes(), file
    digest = pair.run.masks.digest()
    if rank == 0:
        (path / "digest").write_text(digest)


def check_loading(name: str, folder: Path) -> list[str]:
    """Masks that other world sizes have saved, on a fresh model."""
    found = [path for path in sorted(folder.glob(f"*/{name}")) if path.parent.name.isdigit()]
    for path in found:
        pair = Pair(name)
        state = checkpoint.load(path)
        checkpoint.check_same_weights(state, pair.run, path)
        pair.run.load(state.step, state.masks, state.previous, levels=state.levels, num_done=state.num_done)
        assert pair.run.masks.digest() == (path / "digest").read_text()
        assert [pair.run.masks.live(n) for n in pair.run.weights] == [
            w.numel if (mask := state.masks[n]) is None else int(mask.sum()) for n, w in pair.run.weights.items()
        ]
        pair.assert_zeros()
    return [path.parent.name for path in found]


def check_refusals() -> None:
    """What one process finds stops all of them, with one message; other placements are refused by name."""
    for case in ("hard", "2:4, odd", "2:4"):
        pair = Pair(case)
        pair.run.start()
        name = "blocks.1.down.weight"
        with torch.no_grad():
            part = local(pair.run.masks.params[name])
            if dist.get_rank() == dist.get_world_size() - 1 and part.numel():
                part[0, 0] = math.nan
        for n in pair.run.weights:
            pair.run.masks.set(n, None)
        pair.run.levels = [0.0] * len(pair.run.levels)
        message = ""
        try:
            pair.run.prune_to_target()
        except GaPError as error:
            message = str(error)
        assert message.startswith(f"{name}: holds NaN"), message
    # A gradient that one shard knows to be infinite puts the change off everywhere.
    pair = Pair("rigl")
    pair.run.start()
    pair.run.advance(3)
    pair.forward(pair.model).backward()
    grad = local(pair.run.masks.params["blocks.0.down.weight"].grad)
    before = grad.clone()
    if dist.get_rank() == 0:
        grad[0, 0] = math.inf
    assert pair.run.mask_gradients() is None and pair.run.num_done == 0
    grad.copy_(before)
    assert pair.run.mask_gradients() is not None and pair.run.num_done == 1
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for placement in (Shard(1), Replicate()):
        tensor = distribute_tensor(torch.ones(8, 8), mesh, [placement], src_data_rank=None)
        try:
            part_of(tensor, "layer.weight")
        except GaPError as error:
            assert "layer.weight" in str(error) and "Shard(0)" in str(error)
        else:
            raise AssertionError(placement)


def check_other_group() -> None:
    """A pool over two meshes and a tensor that is whole everywhere: counts of each are added up where they belong."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator).round() for shape in ((5, 8), (7, 3), (6, 2))]
    pairs = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    everyone = init_device_mesh("cpu", (4,))
    lying = [
        distribute_tensor(tensors[0], pairs, [Replicate(), Shard(0)], src_data_rank=None),
        tensors[1],
        distribute_tensor(tensors[2], everyone, [Shard(0)], src_data_rank=None),
    ]
    parts = [part_of(t, "w") for t in lying]
    names, layouts = ["w"] * 3, ["out_in"] * 3
    for keep in range(0, 74, 9):
        masks = pooled_masks(
            [local(t) for t in lying], parse_pattern("unstructured"), keep, layouts, names, parts=parts
        )
        wanted = pooled_masks(tensors, parse_pattern("unstructured"), keep, layouts, names)
        for part, mask, whole in zip(parts, masks, wanted, strict=True):
            assert torch.equal(part.gather(mask), whole), keep


def check_trainer(folder: Path) -> None:
    """GaPTrainer on a model that transformers shards when it loads it: the way to FSDP2 that Trainer takes on a CPU too.

    One process writes; what it has written loads without gap_hf, and holds the zeros of its masks.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    if rank == 0:
        sizes = {"hidden_size": 20, "intermediate_size": 28, "num_hidden_layers": 3, "num_attention_heads": 2}
        LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64, max_position_embeddings=16)).save_pretrained(
            folder / "model"
        )
    dist.barrier()
    model = LlamaForCausalLM.from_pretrained(folder / "model", distributed_config=DistributedConfig(fsdp_size=world))
    args = arguments(folder / "trainer", max_steps=12, save_strategy="steps", save_steps=6, save_only_model=True)
    trainer = GaPTrainer(
        model=model, args=args, train_dataset=Tokens(), gap_config=GaPConfig(sparsity=0.8, num_partitions=2)
    )
    trainer.train()
    assert all(isinstance(p, DTensor) for p in trainer.gap.masks.params.values())
    assert trainer.gap.at_target and abs(trainer.gap.sparsity() - 0.8) < 1e-3
    trainer.save_model(str(folder / "final"))
    digests: list[Any] = [None] * world
    dist.all_gather_object(digests, trainer.gap.masks.digest())
    assert len(set(digests)) == 1
    for path in (folder / "final", folder / "trainer/checkpoint-6"):
        masks = checkpoint.load(path).masks
        params = dict(LlamaForCausalLM.from_pretrained(path).named_parameters())
        assert len(masks) == 21 and any(mask is not None for mask in masks.values())
        for name, mask in masks.items():
            assert mask is None or not params[name][mask == 0].any(), name


@torch.no_grad()
def check_no_stale_copy() -> None:
    """After an evaluation the root's parameters are gathered; a prune must be seen by the next evaluation."""
    pair = Pair("hard, all moments")
    x = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(1))
    pair.run.start()
    pair.take()
    assert torch.allclose(pair.model(x), pair.copy(x), rtol=1e-6)
    assert not isinstance(next(iter(pair.model.parameters())), DTensor), "the test needs gathered parameters"
    pair.run.prune_to_target()
    assert isinstance(next(iter(pair.model.parameters())), DTensor)
    pair.take()
    assert torch.allclose(pair.model(x), pair.copy(x), rtol=1e-6)


def run(rank: int, world: int, folder: Path, names: Sequence[str]) -> None:
    """What one process of `world` does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous-{world}", rank=rank, world_size=world)
    summary: dict[str, Any] = {"cases": {}, "empty": 0}
    if not names:
        check_refusals()
        check_no_stale_copy()
        if world == 4:
            check_other_group()
        # Older ones would wrap a model that is sharded already.
        summary["trainer"] = world == 2 and hasattr(LlamaForCausalLM, "is_distributed_loading_by_transformers")
        if summary["trainer"]:
            check_trainer(folder)
    for name in names or CASES_OF[world]:
        started = time.perf_counter()
        loaded = check_loading(name, folder)
        pair = Pair(name)
        pair.on_half = lambda pair=pair, name=name: check_saving(pair, name, folder)
        pair.train()
        assert isinstance(pair.model, FSDPModule)
        params = pair.run.masks.params.values()
        assert all(isinstance(p, DTensor) for p in params)
        digests: list[Any] = [None] * world
        dist.all_gather_object(digests, (pair.run.masks.digest(), any(local(p).numel() == 0 for p in params)))
        assert len({digest for digest, _ in digests}) == 1
        summary["empty"] += sum(is_empty for _, is_empty in digests)
        summary["cases"][name] = {"compared": pair.num_compared, "loaded": loaded}
        if rank == 0:
            print(world, name, summary["cases"][name], f"{time.perf_counter() - started:.1f} s", flush=True)
    if rank == 0:
        (folder / f"{world}.json").write_text(json.dumps(summary))
    dist.destroy_process_group()


def main() -> None:
    folder, worlds, names = Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3:]
    # Forked, because importing transformers takes longer than all that follows.
    context = multiprocessing.get_context("fork")
    for world in map(int, worlds):
        processes = [context.Process(target=run, args=(rank, world, folder, names)) for rank in range(world)]
        for process in processes:
            process.start()
        # One that fails leaves the others waiting for it.
        while any(p.is_alive() for p in processes) and not any(p.exitcode for p in processes):
            time.sleep(0.05)
        failed = any(p.exitcode for p in processes)
        for process in processes:
            if failed:
                process.terminate()
            process.join()
        if failed:
            sys.exit(f"failed with {world} processes")


if __name__ == "__main__":
    main()
