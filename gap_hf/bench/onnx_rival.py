"""ONNX Runtime as a rival: a model's exported graphs, with keys and values handed from call to call.

Greedy search is a loop of its own, without transformers, which is the least that a user of ONNX Runtime needs. Beam search is
transformers' own `generate` over the graphs, as optimum does it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast, Seq2SeqLMOutput

from gap_hf.bench.rivals import Inputs, until_end
from gap_hf.bench.subject import CAUSAL, SEQ2SEQ, Job, Shape, Subject, search_settings
from gap_hf.errors import require
from gap_hf.onnx_files import open_session, write_graph, write_int8, write_onnx
from gap_hf.onnx_graphs import DECODER, DECODER_WITH_PAST, ENCODER, MODEL, Graph


class OnnxRival:
    """An exported model. The files of fp32 serve both precisions."""

    def __init__(self, subject: Subject, folder: Path, precision: str) -> None:
        require("onnx", "onnxscript", "onnxruntime")
        self.subject, self.folder, self.precision = subject, folder, precision
        if not folder.exists():
            folder.mkdir(parents=True)
            write_onnx(subject.model, folder)
        self.graphs = [path.stem for path in sorted(folder.glob("*.onnx")) if ".int8" not in path.name]
        if precision == "int8":
            for name in self.graphs:
                write_int8(folder / f"{name}.onnx", folder / f"{name}.int8.onnx")
        self.threads = 1
        self.sessions: dict[str, Any] = {}

    def set_threads(self, threads: int) -> None:
        self.threads, self.sessions = threads, {}

    def session(self, name: str) -> Any:
        if name not in self.sessions:
            suffix = ".int8.onnx" if self.precision == "int8" else ".onnx"
            self.sessions[name] = open_session(self.folder / (name + suffix), self.threads)
        return self.sessions[name]

    def generate(self, inputs: Inputs, job: Job) -> Callable[[], Any]:
        return self._beams(inputs, job) if job.beams > 1 else self._greedy(inputs, job)

    def tokens(self, result: np.ndarray) -> list[list[int]]:
        return until_end(result.tolist(), self.subject.special.ends)

    def forward(self, inputs: Inputs) -> Callable[[], Tensor]:
        feed = {name: x.numpy() for name, x in inputs.items()}
        if self.subject.task == SEQ2SEQ:
            encoder, decoder = self.session(ENCODER), self.session(DECODER)
            source = {name: feed[name] for name in ("input_ids", "attention_mask")}

            def both() -> Tensor:
                hidden = encoder.run(None, source)[0]
                given = {"encoder_hidden_states": hidden, "encoder_attention_mask": feed["attention_mask"]}
                return torch.from_numpy(decoder.run(["logits"], {"input_ids": feed["decoder_input_ids"], **given})[0])

            return both
        session = self.session(MODEL)
        if self.subject.task == CAUSAL:
            past = empty_past(session, len(feed["input_ids"]))
            feed |= {name: value.numpy() for name, value in past.items()}
        return lambda: torch.from_numpy(session.run(None, feed)[0])

    def layer(self, shape: Shape, x: Tensor) -> Callable[[], Any]:
        path = self.folder / f"layer.{self.precision}.{shape.inputs}x{shape.outputs}.onnx"
        if not path.exists():
            plain = path.with_suffix(".plain")
            module, x = self.subject.model.get_submodule(shape.name), torch.randn(3, shape.inputs)
            write_graph(Graph("layer", module, (x,), ({0: "tokens"},), ("x",), ("y",)), plain)
            if self.precision == "int8":
                write_int8(plain, path)
            else:
                plain.rename(path)
        session, feed = open_session(path, self.threads), {"x": x.numpy()}
        return lambda: session.run(None, feed)

    def _greedy(self, inputs: Inputs, job: Job) -> Callable[[], np.ndarray]:
        special = self.subject.special
        never = [*special.banned, *(() if job.stop else special.ends)]
        decode = Decoding(self, inputs)

        def call() -> np.ndarray:
            logits = decode.start()
            rows, running = [], np.ones(len(logits), dtype=bool)
            while True:
                last = logits[:, -1]
                last[:, never] = -np.inf
                tokens = np.where(running, last.argmax(-1), special.padding)
                rows.append(tokens)
                running &= ~np.isin(tokens, special.ends)
                if len(rows) == job.tokens or not running.any():
                    return np.stack(rows, 1)
                logits = decode.step(tokens[:, None])

        return call

    def _beams(self, inputs: Inputs, job: Job) -> Callable[[], np.ndarray]:
        shell = _shell(self)
        settings = search_settings(self.subject.special, job)
        start = inputs["input_ids"].shape[1] if self.subject.task == CAUSAL else 1

        def call() -> np.ndarray:
            with torch.inference_mode():
                return shell.generate(**inputs, generation_config=settings)[:, start:].numpy()

        return call


class Decoding:
    """The state of one batch: what the graphs gave at the last token is fed at the next, without copies."""

    def __init__(self, rival: OnnxRival, inputs: Inputs) -> None:
        self.rival = rival
        self.ids = inputs["input_ids"].numpy()
        self.mask = inputs["attention_mask"].numpy()
        self.past: dict[str, Any] = {}

    def start(self) -> np.ndarray:
        """Read the source. Logits of the first token, (batch, 1, vocabulary)."""
        if self.rival.subject.task == CAUSAL:
            self.past, self.length = empty_past(self.rival.session(MODEL), len(self.ids)), self.ids.shape[1]
            return self._run(MODEL, {"input_ids": self.ids, "attention_mask": self.mask})[:, -1:]
        first = self.rival.subject.special.start
        hidden = self.rival.session(ENCODER).run(None, {"input_ids": self.ids, "attention_mask": self.mask})[0]
        feed = {"encoder_hidden_states": hidden, "encoder_attention_mask": self.mask}
        self.past = {}
        return self._run(DECODER, {"input_ids": np.full((len(self.ids), 1), first), **feed})

    def step(self, tokens: np.ndarray) -> np.ndarray:
        """One more token a row, (batch, 1). Logits of the next, (batch, 1, vocabulary)."""
        if self.rival.subject.task == CAUSAL:
            self.length += 1
            mask = np.ones((len(tokens), self.length), dtype=np.int64)
            return self._run(MODEL, {"input_ids": tokens, "attention_mask": mask})
        return self._run(DECODER_WITH_PAST, {"input_ids": tokens, "encoder_attention_mask": self.mask})

    def _run(self, name: str, feed: dict[str, np.ndarray]) -> np.ndarray:
        import onnxruntime

        session = self.rival.session(name)
        values = {key: onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(x)) for key, x in feed.items()}
        names = [output.name for output in session.get_outputs()]
        results = dict(zip(names, session.run_with_ort_values(names, {**values, **self.past}), strict=True))
        logits = results.pop("logits")
        self.past |= {key.replace("present", "past_key_values", 1): value for key, value in results.items()}
        return logits.numpy()


def empty_past(session: Any, batch: int) -> dict[str, Any]:
    """Keys and values of no token."""
    import onnxruntime

    past = {}
    for given in session.get_inputs():
        if given.name.startswith("past_key_values."):
            _, heads, _, width = given.shape
            empty = np.zeros((batch, heads, 0, width), dtype=np.float32)
            past[given.name] = onnxruntime.OrtValue.ortvalue_from_numpy(empty)
    return past


def _shell(rival: OnnxRival) -> Any:
    """The model with its forward replaced, so that transformers' beam search reorders what the graphs gave."""
    shell = copy.copy(rival.subject.model)  # shares the weights, which nothing reads
    if rival.subject.task == SEQ2SEQ:
        encoder = _Encoder(rival)
        shell.get_encoder = lambda *args, **kwargs: encoder
        shell.forward = _Seq2SeqForward(rival)
    else:
        shell.forward = _CausalForward(rival)
    return shell


class _Encoder(nn.Module):
    main_input_name = "input_ids"

    def __init__(self, rival: OnnxRival) -> None:
        super().__init__()
        self.rival = rival

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **kwargs: Any) -> BaseModelOutput:
        feed = {"input_ids": input_ids.numpy(), "attention_mask": attention_mask.numpy()}
        hidden = self.rival.session(ENCODER).run(None, feed)[0]
        return BaseModelOutput(last_hidden_state=torch.from_numpy(hidden))  # type: ignore[arg-type]


class _CausalForward:
    def __init__(self, rival: OnnxRival) -> None:
        self.rival = rival

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        cache: Any = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        cache = past_key_values if cache is None else cache
        session = self.rival.session(MODEL)
        past = _cached(cache) or [value.numpy() for value in empty_past(session, len(input_ids)).values()]
        names = [given.name for given in session.get_inputs()][2:]
        feed = dict(zip(names, past, strict=True))
        logits, *present = session.run(
            None, {"input_ids": input_ids.numpy(), "attention_mask": attention_mask.numpy(), **feed}
        )
        _store(cache, present)
        return CausalLMOutputWithPast(logits=torch.from_numpy(logits), past_key_values=cache)  # type: ignore[arg-type]


class _Seq2SeqForward:
    def __init__(self, rival: OnnxRival) -> None:
        self.rival = rival

    def __call__(
        self,
        decoder_input_ids: Tensor,
        attention_mask: Tensor,
        encoder_outputs: Any = None,
        cache: Any = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Seq2SeqLMOutput:
        cache = past_key_values if cache is None else cache
        feed = {"input_ids": decoder_input_ids.numpy(), "encoder_attention_mask": attention_mask.numpy()}
        own, source = cache.self_attention_cache, cache.cross_attention_cache
        if past := _cached(own):
            both = _cached(source)
            four = [x for i in range(0, len(past), 2) for x in (*past[i : i + 2], *both[i : i + 2])]
            session = self.rival.session(DECODER_WITH_PAST)
            feed |= dict(zip([given.name for given in session.get_inputs()][2:], four, strict=True))
            logits, *present = session.run(None, feed)
            _store(own, present)
        else:
            feed["encoder_hidden_states"] = encoder_outputs[0].numpy()
            logits, *present = self.rival.session(DECODER).run(None, feed)
            _store(own, [x for i, x in enumerate(present) if i % 4 < 2])
            _store(source, [x for i, x in enumerate(present) if i % 4 >= 2])
        return Seq2SeqLMOutput(logits=torch.from_numpy(logits), past_key_values=cache)  # type: ignore[arg-type]


def _cached(cache: Any) -> list[np.ndarray]:
    """Keys and values by layer; none if nothing is cached yet."""
    if not cache.get_seq_length():
        return []
    return [np.ascontiguousarray(x.numpy()) for layer in cache.layers for x in (layer.keys, layer.values)]


def _store(cache: Any, tensors: Sequence[np.ndarray]) -> None:
    for index in range(len(tensors) // 2):
        keys, values = (torch.from_numpy(x) for x in tensors[2 * index : 2 * index + 2])
        if index < len(cache.layers) and cache.layers[index].is_initialized:
            cache.layers[index].keys, cache.layers[index].values = keys, values
        else:
            cache.update(keys, values, index)
