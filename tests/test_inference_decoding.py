"""The decoding step as a straight line: what `generate` gives is what the modules give, and they run wherever they must."""

from __future__ import annotations

import copy
import io
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_inference import always_sparse, fresh, in_forked_child, prune  # noqa: F401  # fixtures
from torch import Tensor, nn
from torch.autograd import forward_ad
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MarianConfig,
    MarianMTModel,
    PegasusConfig,
    PegasusForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

from gap_hf import GaPError, optimize_for_inference, restore
from gap_hf.bench.profile import EXPORTED, SPARSE_LAYERS, where_time_goes
from gap_hf.bench.rivals import KINDS
from gap_hf.bench.subject import Job, subject_of
from gap_hf.caches import CACHES
from gap_hf.inference.decoding import DecodesExported, DecodingStep
from gap_hf.inference.product import direct

pytestmark = pytest.mark.usefixtures("fresh", "always_sparse")

_SIDES = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in (("layers", 2), ("ffn_dim", 64))}
_SEQ2SEQ = {"vocab_size": 60, "d_model": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2, **_SIDES}
_IDS = {"pad_token_id": 1, "eos_token_id": 0}
MAKE: dict[str, Callable[[], Any]] = {
    "marian": lambda: MarianMTModel(
        MarianConfig(**_SEQ2SEQ, **_IDS, decoder_start_token_id=1, forced_eos_token_id=None)  # type: ignore[arg-type]
    ),
    "pegasus": lambda: PegasusForConditionalGeneration(
        PegasusConfig(**_SEQ2SEQ, **_IDS, decoder_start_token_id=1, forced_eos_token_id=None)  # type: ignore[arg-type]
    ),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(
            vocab_size=60, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=1, **_IDS
        )
    ),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=2, **_IDS)),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=60,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            **_IDS,
        )
    ),
}


def make(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny model with 16×1 blocks, whose outputs depend on what it is given."""
    torch.manual_seed(0)
    model = MAKE[name]().eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D) and module is not model.get_output_embeddings():
            module.weight.mul_(8)
            prune(module.weight.t() if isinstance(module, Conv1D) else module.weight, 16, 0.6)
    return model.to(dtype)


def sources(length: int = 6, padded: bool = False, left: bool = False) -> dict[str, Tensor]:
    ids = torch.randint(2, 60, (3, length), generator=torch.Generator().manual_seed(1))
    if not padded:
        return {"input_ids": ids}
    mask = torch.ones_like(ids)
    for row, missing in enumerate((0, 2, 3)):
        where = slice(0, missing) if left else slice(length - missing, length)
        ids[row, where], mask[row, where] = 1, 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: Any, inputs: dict[str, Tensor], **more: Any) -> tuple[Tensor, Tensor]:
    """Token ids, and the scores of each step."""
    settings = {
        "max_new_tokens": 8,
        "min_new_tokens": 8,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    out = model.generate(**inputs, **{**settings, **more})
    return out.sequences, torch.stack(out.logits)


# An export takes seconds: one of both ways, and one of neither, for each, and the two between for one of them.
@pytest.mark.parametrize(
    ("name", "padded", "beams"),
    [
        *((name, padded, 3 if padded else 1) for name in MAKE for padded in (False, True)),
        ("marian", False, 3),
        ("marian", True, 1),
    ],
)
def test_generates_what_the_modules_generate(name: str, padded: bool, beams: int) -> None:
    model = make(name)
    inputs = sources(padded=padded, left=name in ("gpt2", "llama"))
    ids, logits = generate(model, inputs, num_beams=beams)
    assert optimize_for_inference(model, decode_step="exported") is model
    for _ in range(2):  # the second time, all steps are lines
        got_ids, got = generate(model, inputs, num_beams=beams)
        assert torch.equal(got_ids, ids)
        torch.testing.assert_close(got, logits, rtol=1e-4, atol=1e-4)
    # A step for each token after the first; the very first of them was the modules', and was compared.
    assert model.gap_step.steps == 2 * (len(logits) - 1) - 1
    assert list(map(bool, model.gap_step.lines.values())) == [True]
    row = {key: value[:1] for key, value in inputs.items()}
    got_ids, got = generate(model, row, num_beams=beams)  # a batch of one, with the same line
    want_ids, want = generate(restore(model), row, num_beams=beams)
    assert torch.equal(got_ids, want_ids)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_bf16_and_sampling() -> None:
    model = make("marian", torch.bfloat16)
    optimize_for_inference(model, decode_step="exported")
    generate(model, sources())
    torch.manual_seed(3)
    ids, logits = generate(model, sources(), do_sample=True)
    steps = model.gap_step.steps
    torch.manual_seed(3)
    want_ids, want = generate(restore(model), sources(), do_sample=True)
    assert steps >= len(logits)
    same = int((ids == want_ids).all(dim=0).long().cumprod(dim=0).sum()) - 1  # rounding may lead elsewhere
    assert same >= 2
    torch.testing.assert_close(logits[:same], want[:same], rtol=5e-2, atol=5e-2 * float(want.abs().max()))


def test_with_everything_else_that_optimizes() -> None:
    model = make("marian")
    ids, logits = generate(model, sources())
    optimize_for_inference(model, decode_step="exported", output_layer="int8", keep_dense=False)
    for _ in range(2):
        got_ids, got = generate(model, sources())
        assert torch.equal(got_ids, ids)
    torch.testing.assert_close(got.max(-1).values, logits.max(-1).values, rtol=1e-4, atol=1e-4)  # the best are exact
    assert model.gap_step.steps == 2 * (len(logits) - 1) - 1


class _Spy:
    def __init__(self, layer: nn.Module) -> None:
        self.calls, self.handle = 0, layer.register_forward_hook(self)

    def __call__(self, *args: Any) -> None:
        self.calls += 1


def test_modules_run_where_a_line_would_not_do() -> None:
    """With hooks, asked for attentions, with a static cache, gradients, autocast, or an adapter."""
    model = make("marian")
    optimize_for_inference(model, decode_step="exported")
    want = generate(model, sources())[0]
    steps = model.gap_step.steps
    assert steps > 0
    layer = model.model.decoder.layers[0].fc1

    spy = _Spy(layer)
    assert torch.equal(generate(model, sources())[0], want)
    assert spy.calls > 2 and model.gap_step.steps == steps
    spy.handle.remove()

    model.set_attn_implementation("eager")
    out = model.generate(
        **sources(), max_new_tokens=8, min_new_tokens=8, output_attentions=True, return_dict_in_generate=True
    )
    assert len(out.decoder_attentions) > 2 and model.gap_step.steps == steps
    model.set_attn_implementation("sdpa")

    assert torch.equal(generate(model, sources(), cache_implementation="static")[0], want)
    assert model.gap_step.steps == steps
    with torch.autocast("cpu", torch.bfloat16):
        generate(model, sources())
    assert model.gap_step.steps == steps
    with torch.no_grad(), forward_ad.dual_level():  # a tangent could be anywhere in the cache
        generate(model, sources())
    assert model.gap_step.steps == steps

    before = generate(model, sources())[1]
    assert model.gap_step.steps > steps
    steps = model.gap_step.steps
    model.model.decoder.layers[0].fc1 = nn.Sequential(layer, nn.Hardtanh(-0.1, 0.1))
    assert not torch.allclose(generate(model, sources())[1], before)
    assert model.gap_step.steps == steps
    model.model.decoder.layers[0].fc1 = layer
    torch.testing.assert_close(generate(model, sources())[1], before)
    assert model.gap_step.steps > steps


def test_gradients_run_in_the_modules() -> None:
    model = make("gpt2").requires_grad_(True)
    optimize_for_inference(model, decode_step="exported")
    with torch.no_grad():
        past = model(input_ids=sources()["input_ids"], use_cache=True)
    name = next(name for name in past if name in CACHES)
    out = model(input_ids=torch.tensor([[4]] * 3), use_cache=True, **{name: past[name]})
    out.logits.sum().backward()
    assert model.transformer.wte.weight.grad is not None and model.gap_step.lines == {}


def steps_of(model: Any, **more: Any) -> int:
    """How many steps of a call ran as lines."""
    before = model.gap_step.steps
    generate(model, sources(), **more)
    return model.gap_step.steps - before


def test_what_is_changed_afterwards_is_seen() -> None:
    """A forward, the mode of a part, the attention, a hook on the embedding that the encoder has too; and undone, lines again."""
    model = make("marian")
    optimize_for_inference(model, decode_step="exported")
    assert steps_of(model) == 6 and steps_of(model) == 7
    layer = model.model.decoder.layers[0]
    layer.fc1.forward = lambda x: nn.functional.linear(x, layer.fc1.weight)
    assert steps_of(model) == 0
    del layer.fc1.forward
    assert steps_of(model) == 7
    layer.train()
    assert steps_of(model) == 0
    layer.eval()
    model.set_attn_implementation("eager")
    assert steps_of(model) == 6  # a line of its own, after a step that it is compared with
    model.set_attn_implementation("sdpa")
    assert steps_of(model) == 7 and len(model.gap_step.lines) == 2
    handle = model.get_decoder().get_input_embeddings().register_forward_hook(lambda module, args, out: 2 * out)
    assert steps_of(model) == 0
    handle.remove()
    want = generate(model, sources())
    restore(layer)  # a part of it alone
    assert type(layer.fc1) is nn.Linear and steps_of(model) == 7
    got = generate(model, sources())
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=1e-4)


def test_another_object_of_the_class_is_ordinary() -> None:
    model = make("llama")
    optimize_for_inference(model, decode_step="exported")
    other = type(model)(model.config).eval()
    assert torch.equal(generate(other, sources())[0], generate(other, sources())[0])


def test_embeddings_that_are_one_module() -> None:
    """As `resize_token_embeddings` leaves them."""
    model = make("t5")
    model.resize_token_embeddings(64, mean_resizing=False)
    want = generate(model, sources())
    optimize_for_inference(model, decode_step="exported")
    for _ in range(2):
        got = generate(model, sources())
        assert torch.equal(got[0], want[0])
        torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=1e-4)
    assert model.gap_step.steps == 13
    handle = model.get_input_embeddings().register_forward_hook(lambda module, args, out: 2 * out)
    assert steps_of(model) == 0  # though the encoder has it too
    handle.remove()


def test_a_window_of_keys_runs_in_the_modules(caplog: pytest.LogCaptureFixture) -> None:
    """Python that asks how long the past is would be written down for the length at hand."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def windowed(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **more: Any) -> Any:
        if key.shape[2] > 9:
            key, value, mask = key[:, :, -9:], value[:, :, -9:], None if mask is None else mask[..., -9:]
        return sdpa_attention_forward(module, query, key, value, mask, **more)

    AttentionInterface.register("gap_hf_test_window", windowed)
    model = make("llama")
    model.set_attn_implementation("gap_hf_test_window")
    want = generate(model, sources())
    optimize_for_inference(model, decode_step="exported")
    with caplog.at_level(logging.WARNING, logger="gap_hf"):
        got = generate(model, sources())
    assert torch.equal(got[0], want[0]) and model.gap_step.steps == 0
    torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=1e-4)
    assert "runs in its modules" in caplog.text


def test_longer_pasts_than_were_looked_at() -> None:
    model = make("gpt2")
    want = generate(model, sources(40), max_new_tokens=40, min_new_tokens=40)
    optimize_for_inference(model, decode_step="exported")
    got = generate(model, sources(40), max_new_tokens=40, min_new_tokens=40)
    assert torch.equal(got[0], want[0]) and model.gap_step.steps == 38
    torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("found", "same"),
    [([1.0, float("nan")], False), ([1.0, 2.0], False), ([1.0, float("-inf")], True), ([0.0, float("-inf")], False)],
)
def test_comparing_where_something_is_not_finite(found: list[float], same: bool) -> None:
    from gap_hf.inference.decoding import _compare

    expected = (torch.tensor([1.0, float("-inf")]),)
    if same:
        _compare((torch.tensor(found),), expected)
    else:
        with pytest.raises(ValueError, match="it gives other values"):
            _compare((torch.tensor(found),), expected)


def test_a_mask_of_another_length_runs_in_the_modules() -> None:
    model = make("llama")
    optimize_for_inference(model, decode_step="exported")
    assert steps_of(model) == 6
    out = model(input_ids=sources()["input_ids"], use_cache=True)
    name = next(name for name in out if name in CACHES)
    steps = model.gap_step.steps
    step = {"input_ids": torch.tensor([[4]] * 3), "use_cache": True, name: out[name]}
    with torch.no_grad():
        model(**step, attention_mask=torch.ones(3, 9, dtype=torch.long))
    assert model.gap_step.steps == steps and len(model.gap_step.lines) == 1


def test_changes_in_place_are_seen() -> None:
    """Of sparse weights, and of those that are not."""
    model = make("marian")
    optimize_for_inference(model, decode_step="exported")
    before = generate(model, sources())[1]
    with torch.no_grad():
        model.model.decoder.layers[0].fc1.weight.mul_(-1)
        model.model.decoder.layers[1].final_layer_norm.bias.add_(0.3)
        model.model.decoder.layers[1].fc1.bias.sub_(0.2)
        model.model.decoder.layers[1].fc2.bias.data = torch.full((32,), 0.1)
    steps = model.gap_step.steps
    after = generate(model, sources())[1]
    assert model.gap_step.steps > steps and not torch.allclose(before[1], after[1], atol=1e-3)
    torch.testing.assert_close(after, generate(restore(model), sources())[1], rtol=1e-4, atol=1e-4)


def test_another_type_is_another_line() -> None:
    model = make("marian")
    optimize_for_inference(model, decode_step="exported")
    generate(model, sources())
    steps = model.gap_step.steps
    model.to(torch.bfloat16)
    generate(model, sources())
    assert model.gap_step.steps == steps
    optimize_for_inference(model, decode_step="exported")
    generate(model, sources())
    assert model.gap_step.steps > 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_forked_child_has_one_thread() -> None:
    """Also where a call was worked out before."""
    torch.set_num_threads(2)
    layer = nn.Linear(64, 128).requires_grad_(False)
    prune(layer.weight, 16)
    optimize_for_inference(layer)
    call, x = direct(layer), torch.randn(1, 64)  # type: ignore[arg-type]
    with torch.inference_mode():
        want = layer(x)
        for _ in range(3):
            torch.testing.assert_close(call(x), want)
    torch.testing.assert_close(in_forked_child(call, x, 2), want)


def test_copies_pickles_saves_and_restore(tmp_path: Path) -> None:
    model = make("marian")
    want = generate(model, sources())[0]
    optimize_for_inference(model, decode_step="exported")
    generate(model, sources())
    assert type(model) is not MarianMTModel and isinstance(model, MarianMTModel)
    assert type(model).__name__ == "MarianMTModel" and type(model).__module__ == MarianMTModel.__module__
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):  # written a line above
        assert type(other) is MarianMTModel and not hasattr(other, "gap_step")
        assert torch.equal(generate(other, sources())[0], want)
    model.save_pretrained(tmp_path)
    loaded = MarianMTModel.from_pretrained(tmp_path)
    assert loaded.config.architectures == ["MarianMTModel"]
    assert torch.equal(generate(loaded.eval(), sources())[0], want)
    optimize_for_inference(model)  # without it again
    assert type(model) is MarianMTModel
    optimize_for_inference(model, decode_step="exported")
    restore(nn.ModuleList([model]))
    assert type(model) is MarianMTModel and "gap_step" not in vars(model)


def test_what_cannot_be_written_down_runs_in_its_modules(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = make("marian")
    want = generate(model, sources())[0]

    def fails(self: Any, *args: Any) -> Any:
        raise RuntimeError("no such operation\nand more")

    monkeypatch.setattr(DecodingStep, "_write", fails)
    optimize_for_inference(model, decode_step="exported")
    with caplog.at_level(logging.WARNING, logger="gap_hf"):
        for _ in range(2):
            assert torch.equal(generate(model, sources())[0], want)
    assert model.gap_step.steps == 0
    said = [r.message for r in caplog.records if "decoding step" in r.message]
    assert said == ["The decoding step of MarianMTModel runs in its modules: no such operation"]


def test_a_line_that_gives_something_else_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from gap_hf.inference import decoding

    real = decoding.straighten

    def wrong(*args: Any) -> Any:
        line = real(*args)
        return lambda *tensors: (2 * line(*tensors)[0], *line(*tensors)[1:])

    monkeypatch.setattr(decoding, "straighten", wrong)
    model = make("gpt2")
    want = generate(model, sources())[0]
    optimize_for_inference(model, decode_step="exported")
    with caplog.at_level(logging.WARNING, logger="gap_hf"):
        assert torch.equal(generate(model, sources())[0], want)
    assert model.gap_step.steps == 0 and "it gives other values" in caplog.text


def test_errors() -> None:
    bert = BertModel(
        BertConfig(vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    )
    for layer in bert.modules():
        if isinstance(layer, nn.Linear):
            prune(layer.weight, 1)
    with pytest.raises(GaPError, match="decode_step: BertModel does not generate"):
        optimize_for_inference(bert, decode_step="exported")
    with pytest.raises(GaPError, match="decode_step: found 'compiled', expected None or 'exported'"):
        optimize_for_inference(bert, decode_step="compiled")
    assert not isinstance(bert, DecodesExported)
    assert all(type(layer) is nn.Linear for layer in bert.modules() if isinstance(layer, nn.Linear))
    model = make("gpt2")
    model.transformer.h[0].forward = model.transformer.h[0].forward
    with pytest.raises(GaPError, match=r"decode_step: the forward of 'transformer\.h\.0' has been replaced"):
        optimize_for_inference(model, decode_step="exported")
    assert not isinstance(model, DecodesExported)


def test_the_bench_runs_it_and_says_where_its_time_goes(tmp_path: Path) -> None:
    subject = replace(subject_of(make("marian")), decode_step="exported")
    ours: Any = KINDS["ours"].make(subject, tmp_path)
    base: Any = KINDS["fp32"].make(subject, tmp_path)
    calls = [rival.generate(sources(), Job(tokens=6, beams=1, stop=False)) for rival in (ours, base)]
    assert torch.equal(calls[0](), calls[1]()) and ours.model.gap_step.steps == 4
    parts = {part.name: part for part in where_time_goes(ours.model, subject.model, calls[0])}
    assert ours.model.gap_step.steps > 4  # measured as it runs
    assert parts[EXPORTED].calls == 6 and parts[SPARSE_LAYERS].calls == 2 * 6  # those of the encoder
