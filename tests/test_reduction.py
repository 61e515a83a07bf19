"""What of a bucket is sent and what comes back, beside a plain reference; with processes in tests/distributed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import sent_and_received
from torch import Tensor, nn

from gap_hf.config import GaPConfig
from gap_hf.reduction import PACK_BELOW, GradientReducer, _pack, _unpack, attach
from gap_hf.sparsifier import Sparsifier

CONFIG = GaPConfig(
    sparsity=0.8, num_partitions=2, num_rounds=1, ramp_share=0, prune_share=0, include=["Linear", "Conv2d"]
)


class Bucket:
    """As DDP's: one flat buffer of whole parameters, each in the order of its own memory."""

    def __init__(self, number: int, params: list[Tensor], dtype: torch.dtype = torch.float32) -> None:
        self.number, self.params = number, params
        self.flat = torch.randn(sum(p.numel() for p in params), generator=torch.Generator().manual_seed(number)).to(
            dtype
        )
        self.starts = np.cumsum([0, *(p.numel() for p in params[:-1])]).tolist()

    def index(self) -> int:
        return self.number

    def buffer(self) -> Tensor:
        return self.flat

    def parameters(self) -> list[Tensor]:
        return list(self.params)

    def gradients(self) -> list[Tensor]:
        """As DDP's `GradBucket.gradients`: rows, whatever the memory format."""
        return [self.flat[s : s + p.numel()].view(p.shape) for s, p in zip(self.starts, self.params, strict=True)]

    def real_gradients(self) -> list[Tensor]:
        return [self.flat.as_strided(p.shape, p.stride(), s) for s, p in zip(self.starts, self.params, strict=True)]


def make_sparsifier() -> Sparsifier:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
    model = nn.Sequential(conv, nn.Linear(7, 9), nn.LayerNorm(9), nn.Linear(9, 5))
    sparsifier = Sparsifier(model, CONFIG, total_steps=20)
    sparsifier.start()
    return sparsifier


@given(
    st.lists(st.sampled_from([None, 0.0, 0.1, 0.55, 0.65, 1.0]), min_size=3, max_size=3),
    st.permutations(range(8)),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
)
def test_beside_the_reference(shares: list[float | None], order: list[int], dtype: torch.dtype) -> None:
    sparsifier = make_sparsifier()
    for name, share in zip(sparsifier.weights, shares, strict=True):
        param = sparsifier.masks.params[name]
        live = torch.rand(param.shape, generator=torch.Generator().manual_seed(5)) < (share or 0)
        sparsifier.masks.set(name, None if share is None else live.to(torch.uint8))
    params: list[Any] = list(sparsifier.model.parameters())
    bucket: Any = Bucket(0, [params[i] for i in order], dtype)
    names = {p: n for n, p in sparsifier.masks.params.items()}
    masks = [sparsifier.masks[names[p]] if p in names else None for p in bucket.params]
    sent, received = sent_and_received(
        [g.double().numpy() for g in bucket.real_gradients()],
        [None if m is None else m.numpy() for m in masks],
        PACK_BELOW,
    )

    packing = GradientReducer(sparsifier)._packing(bucket)

    assert packing.num_sent == len(sent)
    if packing.index is None:
        assert len(sent) == bucket.flat.numel(), "a bucket with nothing to pack goes as it is"
        return
    packed = _pack(bucket.flat, packing)
    assert packed.dtype == dtype and sorted(packed.double().tolist()) == sorted(sent)
    bucket.flat.add_(1)  # what comes back is what was sent, not what the bucket has
    _unpack(packed, bucket.flat, packing)
    for got, expected in zip(bucket.real_gradients(), received, strict=True):
        assert np.array_equal(got.double().numpy(), expected)


def test_an_index_is_kept_until_a_mask_or_the_buckets_change() -> None:
    sparsifier = make_sparsifier()
    reducer = GradientReducer(sparsifier)
    params: list[Any] = list(sparsifier.model.parameters())
    first, second = (Bucket(0, params[:4]), Bucket(1, params[4:]))
    buckets: list[Any] = [first, second]
    before = [reducer._packing(b) for b in buckets]
    assert all(reducer._packing(b) is p for b, p in zip(buckets, before, strict=True))
    assert before[1].index is not None and before[1].index.dtype == torch.int32
    # One tensor's mask: its bucket's index alone is made anew, of the new mask.
    last = list(sparsifier.weights)[-1]
    mask = torch.zeros_like(sparsifier.masks.params[last], dtype=torch.uint8)
    mask[0, :2] = 1
    sparsifier.masks.set(last, mask)
    assert reducer._packing(buckets[0]) is before[0]
    after = reducer._packing(buckets[1])
    assert after is not before[1] and after.index is not None and after.index.numel() == 2
    # DDP rebuilds: other parameters under the same number, and fewer buckets.
    rebuilt: Any = Bucket(0, params)
    assert reducer._packing(rebuilt).params == params
    assert list(reducer._packings) == [0], "what the old buckets held is gone"
    # A dense tensor again.
    sparsifier.masks.set(last, None)
    assert reducer._packing(rebuilt).masks[-2] is None


def test_another_sparsifier_of_the_same_model() -> None:
    old = make_sparsifier()
    reducer = GradientReducer(old)
    bucket: Any = Bucket(0, list(old.model.parameters()))
    before = reducer._packing(bucket)
    reducer.sparsifier = new = Sparsifier(old.model, CONFIG, total_steps=20, seed=9)
    new.start()
    after = reducer._packing(bucket)
    assert before.index is not None and after.index is not None and not torch.equal(before.index, after.index)


def test_only_growth_by_gradient_needs_dense_gradients() -> None:
    config = CONFIG.replace(
        method="rigl", update_steps=4, num_partitions=3, num_rounds=None, ramp_share=None, prune_share=None
    )
    needed = {}
    for changed in (config, config.replace(method="set"), CONFIG):
        sparsifier = Sparsifier(make_sparsifier().model, changed, total_steps=20)
        sparsifier.start()
        steps = []
        for step in range(20):
            if sparsifier.needs_dense_gradients:
                steps.append(step)
            assert sparsifier.needs_dense_gradients == (step in steps), "asking changes nothing"
            for param in sparsifier.model.parameters():
                param.grad = torch.ones_like(param)
            done = sparsifier.mask_gradients()
            assert (done is not None) == (step in steps), "asked for exactly where it is used"
            sparsifier.advance(step + 1)
        needed[changed.method] = steps
    assert needed["rigl"] == [u.step for u in Sparsifier(sparsifier.model, config, total_steps=20).plan.updates] != []
    assert needed["set"] == needed["cyclic"] == []


@pytest.mark.parametrize("live", [None, True, False])
def test_nothing_is_registered_without_ddp(live: bool | None) -> None:
    sparsifier = make_sparsifier()
    sparsifier.config = CONFIG.replace(live_gradients=live)
    assert attach(sparsifier.model, sparsifier) is None
