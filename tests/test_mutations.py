"""A thousand damaged packed folders, and a thousand whose digests were made to fit: one sentence each, and little memory."""

from __future__ import annotations

import json
import re
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from test_saving import gpt2, pruned
from transformers import AutoModelForCausalLM

from gap_hf import GaPError, save_pretrained
from gap_hf.packed.layout import PackedError
from gap_hf.packed.loading import sha256
from gap_hf.recorded import verify_folder

Files = dict[str, bytes]


def flip(files: Files, name: str, rng: np.random.Generator) -> None:
    data = bytearray(files[name])
    data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
    files[name] = bytes(data)


def flip_in_header(files: Files, name: str, rng: np.random.Generator) -> None:
    data = bytearray(files[name])
    length = int.from_bytes(data[:8], "little")
    data[rng.integers(8 + length)] ^= 1 << int(rng.integers(8))
    files[name] = bytes(data)


def cut(files: Files, name: str, rng: np.random.Generator) -> None:
    files[name] = files[name][: rng.integers(len(files[name]))]


def lengthen(files: Files, name: str, rng: np.random.Generator) -> None:
    files[name] += rng.bytes(int(rng.integers(1, 4000)))


def swap_ranges(files: Files, name: str, rng: np.random.Generator) -> None:
    data, size = bytearray(files[name]), 64
    a, b = sorted(int(i) for i in rng.choice(len(data) // size, 2, replace=False))
    a, b = a * size, b * size
    data[a : a + size], data[b : b + size] = data[b : b + size], data[a : a + size]
    files[name] = bytes(data)


def swap_files(files: Files, name: str, rng: np.random.Generator) -> None:
    other = str(rng.choice(sorted(files.keys() - {name})))
    files[name], files[other] = files[other], files[name]


def drop_file(files: Files, name: str, rng: np.random.Generator) -> None:
    del files[name]


def huge_numbers_in_a_mask(files: Files, name: str, rng: np.random.Generator) -> None:
    """Eight bytes of ones, or a large power of two, over a field of a mask's head: count, shape or block."""
    data = bytearray(files[name])
    heads = [found.start() for found in re.finditer(b"GAPM", files[name])]
    if not heads:  # a shard of what stays dense; another one is drawn
        return
    at = int(rng.choice(heads)) + int(rng.integers(4, 40))
    huge = b"\xff" * 8 if rng.integers(2) else (1 << int(rng.integers(20, 63))).to_bytes(8, "little")
    data[at : at + 8] = huge
    files[name] = bytes(data)


def huge_numbers_in_a_header(files: Files, name: str, rng: np.random.Generator) -> None:
    """A number of safetensors' own header, of a shape or an offset, becomes an absurd one."""
    length = int.from_bytes(files[name][:8], "little")
    header = files[name][8 : 8 + length]
    numbers = list(re.finditer(rb"(?<=[\[,])\d+(?=[\],])", header))
    chosen = numbers[int(rng.integers(len(numbers)))]
    header = header[: chosen.start()] + str(10 ** int(rng.integers(6, 25))).encode() + header[chosen.end() :]
    files[name] = len(header).to_bytes(8, "little") + header + files[name][8 + length :]


MUTATIONS: list[Callable[[Files, str, np.random.Generator], None]] = [
    flip,
    flip_in_header,
    cut,
    lengthen,
    swap_ranges,
    swap_files,
    drop_file,
    huge_numbers_in_a_mask,
    huge_numbers_in_a_header,
]


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("honest")
    model = gpt2()
    save_pretrained(model, folder, pruned(model), packed=True, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def mutants(honest: Path, scratch: Path, *, forged: bool) -> Iterator[tuple[str, Path]]:
    """A thousand folders, one after the other in the same place, none of them the honest one."""
    rng = np.random.default_rng(11)
    weights = {path.name: path.read_bytes() for path in sorted(honest.glob("*.safetensors"))}
    shutil.copytree(honest, scratch, dirs_exist_ok=True)
    config = json.loads((honest / "config.json").read_text())
    for number in range(1000):
        files = dict(weights)
        kind = MUTATIONS[number % len(MUTATIONS)]
        while files == weights:
            kind(files, str(rng.choice(sorted(files))), rng)
        for name in weights:
            (scratch / name).unlink(missing_ok=True)
        for name, data in files.items():
            (scratch / name).write_bytes(data)
        if forged:
            recorded = {n: {"size": len(data), "sha256": sha256(scratch / n)} for n, data in files.items()}
            quantization = {**config["quantization_config"], "files": recorded}
            (scratch / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
        yield f"{number} ({kind.__name__})", scratch


def one_sentence(error: Exception) -> bool:
    return "\n" not in str(error) and len(str(error)) > 20


def test_a_damaged_folder_is_refused_in_one_sentence_before_it_is_used(honest: Path, tmp_path: Path) -> None:
    for number, (what, folder) in enumerate(mutants(honest, tmp_path / "m", forged=False)):
        with pytest.raises(GaPError) as caught:
            verify_folder(folder)
        assert one_sentence(caught.value), (what, str(caught.value))
        if number % 8 == 0:  # a load takes far longer than the check that it begins with
            with pytest.raises((PackedError, OSError)) as refused:
                AutoModelForCausalLM.from_pretrained(folder)
            # transformers itself misses a shard that its index names, before it asks any quantizer.
            assert isinstance(refused.value, PackedError) or "drop_file" in what, (what, str(refused.value))
            assert one_sentence(refused.value), (what, str(refused.value))


def test_a_forged_folder_is_refused_or_costs_no_more_than_an_honest_one(honest: Path, tmp_path: Path) -> None:
    """Whoever makes the digests fit may write other weights; lies about sizes and counts still get nowhere."""
    dense = 4 * gpt2().num_parameters()
    refused = 0
    verify_folder(honest)
    tracemalloc.start()
    try:
        for what, folder in mutants(honest, tmp_path / "m", forged=True):
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            try:
                verify_folder(folder)
            except GaPError as error:
                refused += 1
                assert one_sentence(error), (what, str(error))
            assert tracemalloc.get_traced_memory()[1] - before < 2 * dense, what
    finally:
        tracemalloc.stop()
    assert 500 < refused < 1000
