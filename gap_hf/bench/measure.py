"""The measurement: rivals take turns at the same work, layer by layer and as whole models."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gap_hf.bench.machine import machine
from gap_hf.bench.profile import where_time_goes
from gap_hf.bench.results import FORWARD, GENERATE, LAYERS, Agreement, Cell, Part, Report, make_cell
from gap_hf.bench.rivals import BASE, OURS, Inputs, Rival, TorchRival, make_rivals, scratch_folder
from gap_hf.bench.subject import IMAGES, SEQ2SEQ, Job, Subject, random_inputs, text_inputs
from gap_hf.bench.timing import in_turns
from gap_hf.errors import GaPError, first_line
from gap_hf.quiet import quiet

# Layers are timed in bursts of so many seconds: a call may take microseconds.
_BURST = 0.005
_MOST_ROWS_COMPARED = 16


@dataclass(frozen=True)
class Settings:
    """What is measured.

    `length` and `tokens` are of a source and of what is generated; `limit` the seconds that one call may take; with
    `stop` sequences end where the model ends them; `output_layer` and `decode_step` are ours.
    """

    batches: tuple[int, ...] = (1, 16)
    beams: tuple[int, ...] = (1,)
    threads: tuple[int, ...] = (1,)
    repeats: int = 9
    tokens: int = 32
    length: int = 32
    limit: float = 20.0
    stop: bool = False
    layers: bool = True
    output_layer: str | None = None
    decode_step: str | None = None


def measure(
    subject: Subject,
    names: Sequence[str],
    settings: Settings,
    *,
    lines: Sequence[str] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """Run everything that `settings` asks for.

    Args:
        subject: The model.
        names: Of rivals, keys of `KINDS`; fp32 is among them.
        settings: What is measured.
        lines: Of text, instead of random tokens.
        say: Is told what is being done.

    Raises:
        GaPError: if the model does not take what it would be given.
    """
    subject = replace(subject, output_layer=settings.output_layer, decode_step=settings.decode_step)

    def inputs_of(batch: int) -> Inputs:
        if lines is not None:
            return text_inputs(subject, lines, batch)
        return random_inputs(subject, batch, settings.length)

    _check_inputs(subject, settings, inputs_of(max(settings.batches)), is_text=lines is not None)
    before = torch.get_num_threads()
    try:
        with scratch_folder() as scratch, quiet():
            rivals, missing = make_rivals(subject, names, Path(scratch), say)
            work = _Work(subject, rivals, settings, inputs_of, say)
            agreement = work.agreement()
            cells = work.cells()
            profile = work.profile()
    finally:
        torch.set_num_threads(before)
    count = sum(shape.count for shape in subject.layers)
    return Report(
        model=str(subject.folder),
        task=subject.task,
        sparse_layers=count,
        machine=machine(),
        settings={**asdict(settings), "inputs": "random tokens" if lines is None else "text"},
        missing={**missing, **work.failed},
        agreement=tuple(agreement),
        cells=tuple(cells),
        profile=profile,
    )


def _check_inputs(subject: Subject, settings: Settings, inputs: Inputs, *, is_text: bool) -> None:
    """Before rivals are made, which takes a while."""
    limit = getattr(subject.model.config, "max_position_embeddings", None)
    too_long: GaPError | None = None
    if subject.task != IMAGES and isinstance(limit, int):
        needed = length = inputs["input_ids"].shape[1]
        if subject.generates:
            needed = max(length, settings.tokens + (0 if subject.task == SEQ2SEQ else length))
        if needed > limit:
            found = f"--text: its sources have up to {length} tokens" if is_text else f"--length: found {length}"
            also = f", and --tokens is {settings.tokens}" if subject.generates else ""
            too_long = GaPError(f"{found}{also}, but the model has {limit} positions")
    if subject.generates:
        if too_long is not None:
            raise too_long
        return
    try:  # and no limit that a config names: relative and rotary positions go beyond it
        TorchRival(subject, subject.model).forward(inputs)()
    except Exception as error:  # whatever a stranger's model raises
        raise too_long or _cannot_run(subject, inputs, error) from error


def _cannot_run(subject: Subject, inputs: Inputs, error: Exception) -> GaPError:
    name, x = next(iter(inputs.items()))
    return GaPError(
        f"{subject.folder}: {type(subject.model).__name__} cannot be run on {name} of shape {tuple(x.shape)}: {first_line(error)}"
    )


class _Work:
    def __init__(
        self,
        subject: Subject,
        rivals: dict[str, Rival],
        settings: Settings,
        inputs_of: Callable[[int], Inputs],
        say: Callable[[str], None],
    ) -> None:
        self.subject, self.rivals, self.settings = subject, rivals, settings
        self.inputs_of, self.say = inputs_of, say
        self.failed: dict[str, str] = {}

    def agreement(self) -> list[Agreement]:
        """Every rival's output beside torch fp32's, which comes first. One that cannot run is out from here on."""
        inputs = self.inputs_of(min(_MOST_ROWS_COMPARED, max(self.settings.batches)))
        found: list[Agreement] = []
        for beams in self.settings.beams if self.subject.generates else (1,):
            base: Any = None
            for name, rival in list(self.rivals.items()):
                self.say(f"comparing {name}" + (f", {beams} beams" if beams > 1 else ""))
                try:
                    rival.set_threads(1)
                    output = self._output(rival, inputs, beams, base)
                except Exception as error:  # a rival's failure is a finding, not the end of the measurement
                    if name == BASE:
                        raise _cannot_run(self.subject, inputs, error) from error
                    self.failed[name] = f"it failed: {first_line(error)}"
                    del self.rivals[name]
                    continue
                base = output if base is None else base
                found.append(_compare(beams, name, output, base))
        return found

    def _output(self, rival: Rival, inputs: Inputs, beams: int, base: Any) -> tuple[list[list[int]], Any]:
        if not self.subject.generates:
            logits = rival.forward(inputs)()
            assert logits is not None
            return logits.argmax(-1).reshape(-1, 1).tolist(), logits
        rows = rival.tokens(rival.generate(inputs, Job(self.settings.tokens, beams, self.settings.stop))())
        if beams > 1:
            return rows, None
        return rows, rival.forward(self._forced(inputs, rows if base is None else base[0]))()

    def _forced(self, inputs: Inputs, rows: list[list[int]]) -> Inputs:
        """Inputs with the tokens to be scored: the longest that all rows have."""
        shared = min(map(len, rows))
        ids = torch.tensor([row[:shared] for row in rows], dtype=torch.long).reshape(len(rows), shared)
        if self.subject.task == SEQ2SEQ:
            start = torch.full((len(rows), 1), self.subject.special.start or 0)
            return {**inputs, "decoder_input_ids": torch.cat([start, ids], 1)}
        ids = torch.cat([inputs["input_ids"], ids], 1)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def cells(self) -> list[Cell]:
        found: list[Cell] = []
        for threads in self.settings.threads:
            for rival in self.rivals.values():
                rival.set_threads(threads)
            torch.set_num_threads(threads)
            if self.settings.layers and self.subject.layers:
                tokens = {*self.settings.batches, *(b * self.settings.length for b in self.settings.batches)}
                for count in sorted(tokens):
                    found += self._layers(count, threads)
            for batch in self.settings.batches:
                found += self._whole(batch, threads)
        return found

    def _layers(self, tokens: int, threads: int) -> list[Cell]:
        self.say(f"timing layers: {tokens} tokens, {threads} threads")
        found: list[Cell] = []
        total: dict[str, list[float]] = {}
        for shape in self.subject.layers:
            x = torch.randn(tokens, shape.inputs, generator=torch.Generator().manual_seed(tokens))
            calls = {name: call for name, r in self.rivals.items() if (call := r.layer(shape, x)) is not None}
            times = in_turns(calls, self.settings.repeats, burst=_BURST)
            found.append(
                make_cell(LAYERS, tokens, 1, threads, times, shape=f"{shape.inputs}x{shape.outputs} ({shape.count})")
            )
            for name, seconds in times.items():
                before = total.get(name, [0.0] * len(seconds))
                total[name] = [t + shape.count * s for t, s in zip(before, seconds, strict=True)]
        return [*found, make_cell(LAYERS, tokens, 1, threads, total)]

    def _whole(self, batch: int, threads: int) -> list[Cell]:
        inputs, settings = self.inputs_of(batch), self.settings
        if not self.subject.generates:
            self.say(f"timing forward passes: batch {batch}, {threads} threads")
            calls, slow = self._warm({name: rival.forward(inputs) for name, rival in self.rivals.items()})
            times = in_turns(calls, settings.repeats, burst=_BURST)
            return [make_cell(FORWARD, batch, 1, threads, times, left_out=slow)]
        found = []
        for beams in settings.beams:
            self.say(f"timing generation: batch {batch}, {beams} beams, {threads} threads")
            job = Job(settings.tokens, beams, settings.stop)
            whole = {name: rival.generate(inputs, job) for name, rival in self.rivals.items()}
            first = {name: rival.generate(inputs, Job(1, beams)) for name, rival in self.rivals.items()}
            calls, slow = self._warm(whole)
            longest = max(map(len, self.rivals[BASE].tokens(calls[BASE]())), default=0)
            both = {("whole", n): c for n, c in calls.items()} | {("first", n): first[n] for n in calls}
            times = in_turns(both, settings.repeats)
            found.append(
                make_cell(
                    GENERATE,
                    batch,
                    beams,
                    threads,
                    {n: times["whole", n] for n in calls},
                    first={n: times["first", n] for n in calls},
                    # A sequence that ends is one token longer than what is left of it.
                    tokens=min(settings.tokens, longest + 1) if settings.stop else settings.tokens,
                    left_out=slow,
                )
            )
        return found

    def _warm(self, calls: Mapping[str, Callable[[], Any]]) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
        """Call each once or twice, and leave out what takes too long; never torch fp32."""
        kept, slow = {}, {}
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds = time.perf_counter() - start
            if seconds > self.settings.limit and name not in (BASE, OURS):
                slow[name] = f"one call took {seconds:.0f} s, more than --limit {self.settings.limit:g}"
            else:
                kept[name] = call
        return kept, slow

    def profile(self) -> dict[str, tuple[Part, ...]]:
        """Where the time of the smallest batch goes, with one thread count and greedy search; of fp32 and ours."""
        if not self.subject.generates:
            return {}
        inputs = self.inputs_of(min(self.settings.batches))
        found: dict[str, tuple[Part, ...]] = {}
        for name in (BASE, OURS):
            rival = self.rivals.get(name)
            if isinstance(rival, TorchRival):
                self.say(f"profiling {name}")
                rival.set_threads(self.settings.threads[0])
                call = rival.generate(inputs, Job(self.settings.tokens, 1, self.settings.stop))
                found[name] = tuple(where_time_goes(rival.model, self.subject.model, call))
        return found


def _compare(beams: int, name: str, output: Any, base: Any) -> Agreement:
    rows, logits = output
    expected, reference = base
    same = sum(a == b for x, y in zip(rows, expected, strict=True) for a, b in zip(x, y, strict=False))
    places = sum(max(len(x), len(y)) for x, y in zip(rows, expected, strict=True))
    difference = None
    if logits is not None and reference is not None:
        difference = float((logits - reference).abs().max() / reference.abs().max())
    return Agreement(beams, name, same / places if places else None, difference)
