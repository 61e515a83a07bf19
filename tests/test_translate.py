"""scripts/translate.py: the whole run, its token batches, its data formats, and what it refuses."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from sacrebleu.metrics.bleu import BLEU
from transformers import TrainingArguments

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
sys.path.insert(0, str(ROOT / "data" / "demo"))

import make_split  # noqa: E402
import translate  # noqa: E402
from _run import check_schedule  # noqa: E402
from _translation.batching import TokenBatchSampler  # noqa: E402
from _translation.data import DataSection, load_pairs  # noqa: E402
from _translation.model import ModelSection  # noqa: E402
from _translation.scoring import Scorer  # noqa: E402

from gap_hf import GaPConfig, GaPError  # noqa: E402
from gap_hf.recipe import load_recipe  # noqa: E402

NUM_TRAIN, STEPS, MAX_TOKENS = 50, 16, 400


def recipe_for(folder: Path) -> dict[str, Any]:
    """A run of seconds on the first pairs of the demo's corpus."""
    return {
        "gap": {"sparsity": 0.8, "num_partitions": 2, "num_rounds": 1, "fine_tune_share": 0.25},
        "model": {
            "type": "pegasus",
            "vocab_size": 400,
            "config": {
                "d_model": 16,
                "encoder_layers": 1,
                "decoder_layers": 1,
                "encoder_ffn_dim": 16,
                "decoder_ffn_dim": 16,
                "encoder_attention_heads": 2,
                "decoder_attention_heads": 2,
                "max_position_embeddings": 64,
            },
        },
        "data": {
            "folder": str(folder),
            "source": "en",
            "target": "de",
            "origin": "source",
            "max_length": 60,
            "max_tokens_per_batch": MAX_TOKENS,
        },
        "training": {
            "output_dir": str(folder / "run"),
            "max_steps": STEPS,
            "learning_rate": 1e-3,
            "label_smoothing_factor": 0.1,
            "predict_with_generate": True,
            "generation_max_length": 12,
            "generation_num_beams": 2,
            "eval_strategy": "steps",
            "eval_steps": 8,
            "logging_steps": 2,
            "save_strategy": "steps",
            "save_steps": 8,
            "report_to": "none",
            "use_cpu": True,
            "dataloader_pin_memory": False,
            "disable_tqdm": True,
        },
    }


def write_data(folder: Path) -> None:
    for name, number in (("train", NUM_TRAIN), ("dev", 4), ("test", 6)):
        lines = (ROOT / "data" / "demo" / f"{name}.tsv").read_text(encoding="utf-8").splitlines()[: number + 1]
        if name == "test":  # two origins, so that scores by origin are given
            lines[2:4] = [line.rsplit("\t", 1)[0] + "\telsewhere" for line in lines[2:4]]
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_recipe(folder: Path, **sections: Any) -> Path:
    recipe = recipe_for(folder)
    for name, values in sections.items():
        recipe[name] = {**recipe.get(name, {}), **values}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_data(tmp_path)
    return tmp_path


def run_script(*words: str, num_processes: int = 1) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", str(num_processes), "--rdzv_backend", "c10d"]
    launch = [*launch, "--rdzv_endpoint", "localhost:0"] if num_processes > 1 else []
    command = [sys.executable, *launch, str(ROOT / "scripts" / "translate.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300, check=False)


# --- a whole run -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A finished run as a process of its own: its output folder and what it printed."""
    folder = tmp_path_factory.mktemp("run")
    write_data(folder)
    done = run_script(str(write_recipe(folder)), "--training.seed=3")
    assert done.returncode == 0, done.stderr
    yield folder / "run", done.stdout


def test_it_ends_with_everything_in_the_folder(finished: tuple[Path, str]) -> None:
    output, printed = finished
    results = json.loads((output / "results.json").read_text())
    assert results["sparsity"] == pytest.approx(0.8, abs=0.002)
    for layer in results["layers"]:
        assert layer["live"] == int((1 - 0.8) * layer["numel"] + 0.5)
    assert results["steps"] == STEPS
    assert results["recipe"]["training"]["seed"] == 3
    assert set(results["bleu_by_origin"]) == {"elsewhere", "vscode-language-pack-de"}
    assert sum(scores["pairs"] for scores in results["bleu_by_origin"].values()) == results["test_pairs"] == 6
    assert all(signature.startswith("nrefs:1|") for signature in results["signatures"].values())
    assert results["scored"] == "test" and "dev_pairs" not in results
    assert np.shape(results["sentence_statistics"]) == (6, 10)
    assert 0.2 < results["cost"]["average_density"] < 1
    assert [entry["step"] for entry in results["dev"]] == [8, 16]
    assert len((output / "translations.txt").read_text().splitlines()) == 6
    assert (output / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert (output / "plot.png").stat().st_size > 20_000
    for text in ("BLEU", "sparsity of the prunable set", "GaP: step", "scoring with sacrebleu itself"):
        assert text in printed


def test_model_and_tokenizer_load_in_a_process_without_gap_hf(finished: tuple[Path, str]) -> None:
    output, _ = finished
    code = """
import json, sys
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1])
assert not any(name.startswith("gap_hf") for name in sys.modules)
text = "Öffnen Sie „die Datei“: ☃"
assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
assert model.generation_config.num_beams == 2
assert model.get_input_embeddings().weight.data_ptr() == model.get_output_embeddings().weight.data_ptr()
state = model.state_dict()
for layer in json.load(open(sys.argv[1] + "/results.json"))["layers"]:
    assert int((state[layer["name"]] != 0).sum()) == layer["live"], layer
model.generate(**tokenizer(["Open the file."], return_tensors="pt"))
"""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(output)],
        capture_output=True,
        text=True,
        env={**env, "HF_HUB_OFFLINE": "1"},
        cwd=output,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_predict_translates_line_by_line(
    finished: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, _ = finished
    source, target = tmp_path / "in.txt", tmp_path / "out.txt"
    source.write_text("Open the file.\n\nClose it.\n", encoding="utf-8")
    assert translate.main(["--predict", str(source), "--model", str(output), "--output", str(target)]) == 0
    lines = target.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 3
    assert lines[1] == ""
    capsys.readouterr()
    assert translate.main(["--predict", str(source), "--model", str(output), "--batch-size", "1"]) == 0
    assert capsys.readouterr().out.splitlines() == lines
    assert translate.main(["--predict", "none.txt", "--model", str(output)]) == 2
    assert translate.main(["--predict", str(source), "--model", "none"]) == 2
    assert translate.main(["--predict", str(source)]) == 2
    capsys.readouterr()
    assert translate.main(["--predict", str(source), "--model", str(output), "--output", "no/such/file.txt"]) == 2
    assert "--output: found no/such/file.txt, expected a file in a folder that exists" in capsys.readouterr().err


def test_columns_that_hold_no_text(folder: Path) -> None:
    rows = [{"en": number, "de": "eins"} for number in range(3)]
    for split in ("train", "dev", "test"):
        (folder / f"{split}.tsv").unlink()
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(GaPError, match=r"data.source: its column holds int \(0\), expected text"):
        load_pairs(DataSection(source="en", target="de", folder=folder))


def test_resume_in_the_middle_of_an_epoch_ends_the_same(finished: tuple[Path, str], folder: Path) -> None:
    """The 8th step is inside the second epoch or later; the rest must see the very same batches."""
    import torch
    from safetensors.torch import load_file

    output, _ = finished
    first = output / "checkpoint-8"
    state = json.loads((first / "trainer_state.json").read_text())
    assert state["epoch"] != int(state["epoch"])
    arguments = ["--training.seed=3", f"--training.resume_from_checkpoint={first}"]
    assert translate.main([str(write_recipe(folder)), *arguments]) == 0
    expected, found = load_file(output / "model.safetensors"), load_file(folder / "run" / "model.safetensors")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_two_processes_score_every_pair_once(folder: Path) -> None:
    """Six and four pairs in batches of four per process: the last ones are filled up, which must not be scored."""
    recipe = write_recipe(folder, training={"per_device_eval_batch_size": 4, "save_strategy": "no"})
    done = run_script(str(recipe), num_processes=2)
    assert done.returncode == 0, done.stderr
    results = json.loads((folder / "run" / "results.json").read_text())
    assert results["test_pairs"] == 6 == len((folder / "run" / "translations.txt").read_text().splitlines())
    assert results["sparsity"] == pytest.approx(0.8, abs=0.002)
    assert done.stdout.count("saved in") == 1


def test_a_used_folder_is_neither_overwritten_nor_resumed_unasked(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = folder / "run"
    run.mkdir()
    (run / "mine.txt").write_text("x")
    recipe = str(write_recipe(folder, training={"max_steps": 8}))
    assert translate.main([recipe]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert translate.main([recipe, "--training.resume_from_checkpoint=true"]) == 2
    assert "found no checkpoint" in capsys.readouterr().err
    assert os.listdir(run) == ["mine.txt"]
    old = run / "checkpoint-99"
    old.mkdir()
    (old / "trainer_state.json").write_text("{}")
    dense = ["--gap.method=dense", "--data.max_tokens_per_batch=null"]
    assert translate.main([recipe, "--training.overwrite_output_dir=true", *dense]) == 0
    assert not old.exists()
    assert (run / "mine.txt").exists()
    assert json.loads((run / "results.json").read_text())["sparsity"] == 0


def test_scored_on_dev_the_test_set_is_not_translated(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense = ["--gap.method=dense", "--training.max_steps=4", "--training.save_strategy=no"]
    assert translate.main([str(write_recipe(folder)), "--data.score=dev", *dense]) == 0
    results = json.loads((folder / "run" / "results.json").read_text())
    assert results["scored"] == "dev" and results["dev_pairs"] == 4 and "test_pairs" not in results
    assert results["cost"]["training_flops_of_model"] == 1
    assert len((folder / "run" / "translations.txt").read_text().splitlines()) == 4
    assert len(results["sentence_statistics"]) == 4
    assert "on 4 dev pairs" in capsys.readouterr().out


def test_sentence_statistics_add_up_to_corpus_bleu(caplog: pytest.LogCaptureFixture) -> None:
    texts = ["Das ist ein Test.", "", "Öffnen Sie die Datei, bitte.", "Ja"]
    references = ["Das ist kein Test.", "Leer", "öffnen Sie die Datei.", "Ja"]
    for lowercase in (False, True):
        statistics = Scorer(lowercase=lowercase).sentence_statistics(texts, references)
        assert statistics[1] == [0] * 9 + [1]
        *counts, sys_len, ref_len = np.sum(statistics, axis=0).tolist()
        whole = BLEU(lowercase=lowercase).corpus_score(texts, [references])
        assert (counts[:4], counts[4:]) == (whole.counts, whole.totals)
        assert (sys_len, ref_len) == (whole.sys_len, whole.ref_len)
    assert not caplog.records


# --- token batches ---------------------------------------------------------------------------------------------------


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=200),
    max_tokens=st.integers(40, 300),
    seed=st.integers(0, 2**31),
    group_size=st.integers(1, 5),
)
def test_batches_cover_everything_once_within_the_cap(
    lengths: list[int], max_tokens: int, seed: int, group_size: int
) -> None:
    sampler = TokenBatchSampler(lengths, max_tokens=max_tokens, seed=seed, group_size=group_size)
    again = TokenBatchSampler(lengths, max_tokens=max_tokens, seed=seed, group_size=group_size)
    for epoch in (0, 1, 7):
        sampler.set_epoch(epoch)
        again.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler)  # the same in every epoch
        assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
        assert all(len(batch) * max(lengths[i] for i in batch) <= max_tokens for batch in batches)
        assert batches == list(again) == list(sampler)


def test_epochs_differ_and_batches_are_of_like_length() -> None:
    lengths = np.random.default_rng(0).integers(3, 30, size=500).tolist()
    sampler = TokenBatchSampler(lengths, max_tokens=300, seed=1)
    first = list(sampler)
    sampler.set_epoch(1)
    assert first != list(sampler)
    padding = sum(len(b) * max(lengths[i] for i in b) for b in first) / sum(lengths)
    assert padding < 1.1
    assert list(TokenBatchSampler(lengths, max_tokens=300, seed=2)) != first


def test_an_example_that_fits_nowhere_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        TokenBatchSampler([5, 50], max_tokens=40, seed=0)


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_processes_share_an_epoch(num_processes: int) -> None:
    """As accelerate shards it: every process has the same number of batches, and together they see everything."""
    from accelerate.data_loader import BatchSamplerShard

    lengths = np.random.default_rng(0).integers(3, 30, size=300).tolist()
    sampler = TokenBatchSampler(lengths, max_tokens=200, seed=1, group_size=num_processes)
    shards = [list(BatchSamplerShard(sampler, num_processes, rank)) for rank in range(num_processes)]
    assert len({len(shard) for shard in shards}) == 1
    assert {i for shard in shards for batch in shard for i in batch} == set(range(len(lengths)))
    for together in list(zip(*shards, strict=True))[:-1]:
        longest = [max(lengths[i] for i in batch) for batch in together]
        assert max(longest) - min(longest) <= 6  # of 3 to 29


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_resumed_epoch_goes_on_with_the_same_batches(num_processes: int) -> None:
    """The callback reaches the sampler behind accelerate's wrappers, where Trainer's set_epoch does not."""
    from _translation.batching import SetEpoch
    from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler
    from transformers import TrainerState

    def wrapped(sampler: TokenBatchSampler) -> Any:
        return BatchSamplerShard(sampler, num_processes, 0) if num_processes > 1 else sampler

    lengths = np.random.default_rng(0).integers(3, 30, size=300).tolist()
    sampler = TokenBatchSampler(lengths, max_tokens=200, seed=1)
    sampler.set_epoch(2)
    whole = list(wrapped(sampler))
    fresh = TokenBatchSampler(lengths, max_tokens=200, seed=1)
    SetEpoch(fresh).on_epoch_begin(None, TrainerState(epoch=2 + 3 / len(whole)), None)
    assert list(SkipBatchSampler(wrapped(fresh), 3)) == whole[3:]


def test_steps_are_counted_as_trainer_counts_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan is checked with our count before a Trainer exists, so the two must agree."""
    seen: list[tuple[int, int | None]] = []

    class Stop(Exception):
        pass

    def train(self: Any, **_: Any) -> None:
        values = self.set_initial_training_values(self.args, self.get_train_dataloader())
        # Under max_steps a trainer's plan goes without the length of an epoch.
        seen.append((values[-1], values[1] if self.args.max_steps <= 0 else None))
        raise Stop

    counted: list[tuple[int, int | None]] = []
    count = translate.count_steps

    def spy(*args: Any) -> Any:
        total, per_epoch = count(*args)
        counted.append((total, None if per_epoch is None else int(per_epoch)))
        return total, per_epoch

    monkeypatch.setattr(translate.TranslationTrainer, "train", train)
    monkeypatch.setattr(translate, "count_steps", spy)
    recipe = str(write_recipe(folder))
    for extra in (
        ["--training.max_steps=-1", "--training.num_train_epochs=5"],
        ["--training.max_steps=-1", "--training.num_train_epochs=4.5", "--training.gradient_accumulation_steps=3"],
        ["--training.gradient_accumulation_steps=2"],
        ["--data.max_tokens_per_batch=null", "--training.per_device_train_batch_size=7", "--training.max_steps=-1"],
        ["--data.max_tokens_per_batch=null", "--training.dataloader_drop_last=true"],
    ):
        with pytest.raises(Stop):
            translate.main([recipe, "--training.overwrite_output_dir=true", *extra])
    assert counted == seen
    assert len(set(seen)) > 3


# --- data ------------------------------------------------------------------------------------------------------------

PAIRS = [("one house", 'ein "Haus"'), ("a dog", "ein Hund"), ("a cat", "eine Katze")]


def sets(**values: Any) -> dict[str, Any]:
    return load_pairs(DataSection(**{"source": "en", "target": "de", **values}))


@pytest.mark.parametrize("kind", ["tsv", "tsv.gz", "no header", "jsonl", "jsonl.gz", "translation", "parquet"])
def test_every_format_gives_the_same_pairs(tmp_path: Path, kind: str) -> None:
    values: dict[str, Any] = {"folder": tmp_path}
    for split in ("train", "valid", "test"):
        path = tmp_path / f"{split}.{'tsv' if kind == 'no header' else 'jsonl' if kind == 'translation' else kind}"
        rows = [{"id": i, "en": en, "de": de} for i, (en, de) in enumerate([*PAIRS, ("empty", "")])]
        if kind == "parquet":
            from datasets import Dataset

            Dataset.from_list(rows).to_parquet(path)
            continue
        if kind == "translation":
            text = "".join(json.dumps({"translation": {"en": r["en"], "de": r["de"]}}) + "\n" for r in rows)
        elif "json" in kind:
            text = "".join(json.dumps(r) + "\n" for r in rows)
        else:
            text = ("" if kind == "no header" else "id\ten\tde\n") + "".join(
                f"{r['id']}\t{r['en']}\t{r['de']}\n" for r in rows
            )
            if kind == "no header":
                values["columns"] = ["id", "en", "de"]
        path.write_bytes(gzip.compress(text.encode()) if kind.endswith("gz") else text.encode())
    loaded = sets(**values)
    assert set(loaded) == {"train", "dev", "test"}
    for rows in loaded.values():
        assert list(zip(rows["source"], rows["target"], strict=True)) == PAIRS


def test_limits_and_swapped_columns(folder: Path) -> None:
    loaded = sets(folder=folder, source="de", target="en", origin="source", max_train_samples=7, max_eval_samples=2)
    assert {name: len(rows) for name, rows in loaded.items()} == {"train": 7, "dev": 2, "test": 6}
    assert sorted(loaded["train"].column_names) == ["origin", "source", "target"]


def within_one_word(a: str, b: str) -> bool:
    """Word edit distance of at most 1, the plain way."""
    x, y = (re.findall(r"\w+", text.lower()) for text in (a, b))
    if len(x) == len(y):
        return sum(p != q for p, q in zip(x, y, strict=True)) <= 1
    short, long = sorted((x, y), key=len)
    return len(long) - len(short) == 1 and any(long[:i] + long[i + 1 :] == short for i in range(len(long)))


def test_near_texts_against_the_plain_way() -> None:
    texts = ["", "a", "a b", "b a", "a c", "a b c", "a x c", "b c", "a b c d", "A, b-c.", "x y z", "c b a"]
    for held_out in texts:
        near = make_split.NearTexts([held_out])
        assert {t for t in texts if t in near} == {t for t in texts if within_one_word(t, held_out)}, held_out


def test_nothing_crosses_the_demo_splits() -> None:
    folder = ROOT / "data" / "demo"
    committed = {name: make_split.read(folder / f"{name}.tsv") for name in make_split.SPLITS}
    assert {name: len(pairs) for name, pairs in committed.items()} == {"train": 6513, "dev": 181, "test": 252}
    for side in (0, 1):
        keys = [{make_split.masked(pair[side]) for pair in pairs} for pairs in committed.values()]
        assert sum(map(len, keys)) == len(set.union(*keys))
    assert make_split.far_from(committed["test"], committed["dev"]) == committed["dev"]
    assert make_split.far_from([*committed["test"], *committed["dev"]], committed["train"]) == committed["train"]


# --- recipes ---------------------------------------------------------------------------------------------------------

RECIPES = sorted((ROOT / "recipes" / "translation").rglob("*.yaml"))


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 7


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_from_anywhere(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(path, model_cls=ModelSection, data_cls=DataSection)
    if recipe.gap.method == "parallel":  # started with a process for each partition
        monkeypatch.setattr("transformers.TrainingArguments.world_size", recipe.gap.num_partitions)
    translate.check_arguments(recipe, recipe_arguments(recipe, {"bf16": False, "fp16": False, "use_cpu": True}))
    assert not list(tmp_path.iterdir())


def test_a_plan_needs_no_processes(capsys: pytest.CaptureFixture[str]) -> None:
    assert translate.main([str(ROOT / "recipes/translation/demo-pgap.yaml"), "--plan"]) == 0
    assert "parallel" in capsys.readouterr().out


def recipe_arguments(recipe: Any, changes: dict[str, Any]) -> Any:
    from transformers import Seq2SeqTrainingArguments

    return Seq2SeqTrainingArguments(**{**recipe.training, **changes})


def test_pairs_of_no_known_origin_are_scored_too() -> None:
    pairs = Dataset.from_dict({"origin": ["b", None, "a"], "target": ["x", "y", "z"]})
    found = translate.score_by_origin(Scorer(), ["x", "y", "no"], pairs)
    assert list(found) == ["a", "b", "unknown"] and found["unknown"]["pairs"] == 1


def test_a_schedule_longer_than_the_run_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    args = TrainingArguments(
        "unused",
        use_cpu=True,
        report_to=[],
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": 800},
        warmup_steps=200,
    )
    check_schedule(args, 2000, GaPConfig(sparsity=0.8))
    assert not capsys.readouterr().out
    check_schedule(args, 500, GaPConfig(sparsity=0.8))
    assert "num_decay_steps is 800 and warm-up 200, but the run has 500 steps" in capsys.readouterr().out


def test_the_recorded_dense_run_is_the_demo_without_gap() -> None:
    """Same model, data, steps and settings, or the comparison that the demo prints means nothing."""
    demo, dense = (
        load_recipe(ROOT / "recipes" / "translation" / name, model_cls=ModelSection, data_cls=DataSection)
        for name in ("demo.yaml", "demo-dense.yaml")
    )
    assert dense.gap.is_off
    assert demo.model == dense.model
    assert demo.data.reference is not None
    assert replace(demo.data, reference=None) == dense.data
    assert {**demo.training, "output_dir": ""} == {**dense.training, "output_dir": ""}
    recorded = translate.read_reference(demo.data.reference, ("bleu", "chrf"))
    assert recorded is not None
    assert recorded["steps"] == dense.training["max_steps"]
    assert recorded["test_pairs"] == 252
    same = {key: recorded["recipe"]["training"][key] for key in dense.training if key != "output_dir"}
    assert same == {key: value for key, value in dense.training.items() if key != "output_dir"}
    assert {**recorded["recipe"]["model"], "dtype": None} == dense.to_dict()["model"]  # a key that there was not yet


# --- errors ----------------------------------------------------------------------------------------------------------

BAD: list[tuple[str, Sequence[str], str]] = [
    ("unknown key", ["--training.learning_rat=1"], "did you mean 'learning_rate'?"),
    ("unknown key", ["--model.config.d_modle=8"], "did you mean 'd_model'?"),
    ("unknown key", ["--model.generation.num_beam=8"], "did you mean 'num_beams'?"),
    ("unknown key", ["--gap.num_round=1"], "did you mean 'num_rounds'?"),
    ("wrong type", ["--training.max_steps=many"], "expected a whole number"),
    ("wrong type", ["--data.max_length=true"], "expected a whole number"),
    ("wrong type", ["--model.config.d_model=wide"], "model.config"),
    ("wrong type", ["--gap.sparsity=[1]"], "expected a number"),
    ("out of range", ["--gap.sparsity=1.5"], "above 0 and below 1"),
    ("out of range", ["--training.label_smoothing_factor=2"], "expected 0 to below 1"),
    ("out of range", ["--model.vocab_size=100"], "at least 260"),
    ("out of range", ["--data.max_length=0"], "at least 1"),
    ("contradiction", ["--model.checkpoint=org/name"], "both of type and checkpoint"),
    ("contradiction", ["--data.train=x.tsv"], "expected one of folder, train, dataset"),
    ("contradiction", ["--data.max_tokens_per_batch=30"], "at least data.max_length"),
    ("contradiction", ["--gap.phase_steps=2"], "expected any two"),
    (
        "contradiction",
        ["--training.load_best_model_at_end=true", "--training.eval_strategy=no"],
        "load_best_model_at_end",
    ),
    ("contradiction", ["--training.predict_with_generate=false"], "expected true"),
    ("contradiction", ["--gap.phase_epochs=1", "--gap.num_rounds=null"], "expected gap.phase_steps"),
    ("contradiction", ["--model.config.d_model=15"], "model.config"),
    ("contradiction", ["--gap.num_partitions=3"], "num_partitions"),
    ("unknown choice", ["--data.score=tset"], "did you mean 'test'?"),
    ("unknown choice", ["--model.dtype=float23"], "did you mean 'float32'?"),
    ("contradiction", ["--model.dtype=bfloat16"], "expected model.checkpoint with it"),
    ("glob without a match", ["--gap.include=[model.encodr.*]"], "model.encod"),
    ("glob without a match", ["--gap.overrides.*.layers.7.*=0.5"], "layers.7"),
    ("glob without a match", ["--gap.partition=[[model.encoder.*], [model.decodr.*]]"], "decod"),
    ("too short", ["--training.max_steps=3"], "optimizer steps"),
    ("too short", ["--gap.num_rounds=20"], "optimizer steps"),
    (
        "missing file",
        ["--data.folder=null", "--data.train=a.tsv", "--data.dev=b.tsv", "--data.test=c.tsv"],
        "no such file",
    ),
    ("missing file", ["--data.folder=nowhere"], "no such folder"),
    ("missing file", ["--data.reference=dense.json"], "no such file"),
    ("missing file", ["--training.resume_from_checkpoint=nowhere"], "no checkpoint"),
    ("missing file", ["--model.tokenizer=./nowhere"], "model.tokenizer"),
    ("contradiction", ["--training.train_sampling_strategy=group_by_length"], "sorts what is scored too"),
    ("contradiction", ["--training.lr_scheduler_type=warmup_stable_decay"], "lr_scheduler_kwargs: found null, which"),
    ("contradiction", ["--training.lr_scheduler_kwargs={num_decay_steps: 3}"], "'linear' does not take"),
    ("wrong type", ["--training.run_name=2026-13-01"], "training.run_name: found '2026-13-01', expected a YAML value"),
    ("impossible pattern", ["--gap.pattern='3:2'"], "0 < N < M"),
    ("impossible pattern", ["--gap.pattern='2:4'"], "can only be 0.5"),
    ("impossible pattern", ["--gap.pattern=block:5x1"], "5"),
    ("impossible pattern", ["--gap.pattern='2:7'", "--gap.sparsity=null"], "7"),
    ("wrong section", ["--modle.type=marian"], "did you mean 'model'?"),
    ("wrong section", ["--train.max_steps=3"], "unknown section"),
    ("wrong column", ["--data.target=fr"], "expected a column of"),
    ("wrong column", ["--data.origin=sourc"], "did you mean 'source'?"),
    ("wrong model type", ["--model.type=marain"], "did you mean 'marian'?"),
    ("wrong model type", ["--model.type=gpt2"], "no sequence-to-sequence model"),
]


@pytest.mark.parametrize(("kind", "overrides", "message"), BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_a_malformed_recipe_is_one_line_and_no_folder(
    kind: str, overrides: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(folder.iterdir())
    recipe = write_recipe(folder)
    assert translate.main([str(recipe), *overrides]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    assert message in err
    assert sorted(folder.iterdir()) == sorted([*before, recipe])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("recipe.yaml", "gap: {sparsity: 0.8", "not valid YAML"),
        ("recipe.yaml", "gap:\n\tsparsity: 0.8", "not valid YAML"),
        ("recipe.yaml", "- gap", "expected a mapping"),
        ("recipe.yaml", "gaps: {}", "unknown section"),
        ("train.tsv", "en\tde\tsource\none\tzwei\n", "train.tsv:2: found 2 tab-separated fields, expected 3"),
        ("train.tsv", "en\tde\tsource\n", "no pairs in it"),
        ("dev.tsv", "a\tb\tsource\nx\ty\tz\n", "set data.columns"),
    ],
)
def test_bad_files_are_one_line_and_no_folder(
    name: str, content: str, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(folder)
    (folder / name).write_text(content, encoding="utf-8")
    before = sorted(folder.iterdir())
    assert translate.main([str(recipe)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert message in err
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("overrides", [["--gap.sparsity=2"], ["--training.max_steps=2"]])
def test_the_same_as_a_process(overrides: list[str], folder: Path) -> None:
    done = run_script(str(write_recipe(folder)), *overrides)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stdout
    assert not (folder / "run").exists()
