"""The model card says what is true of the files beside it, in metadata that the Hub's own library reads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from point_toys import SIZES
from safetensors.torch import load_file
from test_saving import gpt2, mixtral, pruned
from toys import CONFIG, Tokens, causal_lm
from transformers import Trainer, TrainingArguments

from gap_hf import GaPMixin, GaPTrainer, save_pretrained
from gap_hf.card import BEGIN, END, TAGS
from gap_hf.cli import main


def cells(text: str, label: str) -> list[str]:
    """The cells after `label` in the one table row that begins with it."""
    (row,) = [line for line in text.splitlines() if line.startswith(f"| {label} |")]
    return [cell.strip() for cell in row.strip("|").split("|")][1:]


def saved(folder: Path, *, packed: bool = False, **config: Any) -> tuple[Any, Any]:
    model = gpt2()
    sparsifier = pruned(model, **config)
    save_pretrained(model, folder, sparsifier, packed=packed)
    return model, sparsifier


@pytest.mark.parametrize("packed", [False, True])
def test_every_number_is_that_of_the_files(tmp_path: Path, packed: bool, capsys: pytest.CaptureFixture[str]) -> None:
    _, sparsifier = saved(tmp_path / "model", packed=packed)
    saved(tmp_path / "dense")
    saved(tmp_path / "packed", packed=True)
    assert main(["card", str(tmp_path / "model")]) == 0
    assert "README.md" in capsys.readouterr().out
    text = (tmp_path / "model" / "README.md").read_text()
    tensors = load_file(tmp_path / "dense" / "model.safetensors")
    masked = {name: tensors[name] for name in sparsifier.weights}
    weights = sum(t.numel() for t in masked.values())
    live = sum(int((t != 0).sum()) for t in masked.values())
    assert cells(text, "prunable weights") == [f"{weights:,} in {len(masked)} tensors"]
    assert cells(text, "of them live") == [f"{live:,}"]
    assert cells(text, "sparsity of the prunable set") == [f"{1 - live / weights:.2%}"]
    zeros, everything = (
        sum(f(t) for t in tensors.values()) for f in (lambda t: int((t == 0).sum()), lambda t: t.numel())
    )
    assert cells(text, "sparsity of the whole model") == [f"{zeros / everything:.2%} (counted in the files)"]
    sizes = [(tmp_path / form / "model.safetensors").stat().st_size for form in ("dense", "packed")]
    assert cells(text, "weight files, dense form") == [f"{sizes[0] / 1000:.1f} kB"]
    assert cells(text, "weight files, packed form") == [f"{sizes[1] / 1000:.1f} kB, {sizes[1] / sizes[0]:.3f} of that"]
    for name, tensor in masked.items():
        kept = int((tensor != 0).sum())
        expected = [
            "×".join(map(str, tensor.shape)),
            f"{tensor.numel():,}",
            f"{kept:,}",
            f"{1 - kept / tensor.numel():.2%}",
        ]
        assert cells(text, f"`{name}`") == expected
    assert ("trust_remote_code=True" in text) == packed
    assert "AutoModelForCausalLM" in text and "No scores were recorded." in text
    assert (tmp_path / "model" / "sparsity.png").read_bytes().startswith(b"\x89PNG")
    # The config that is shown is one that can be run.
    shown = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])["gap"]
    assert shown["sparsity"] == 0.9 and shown["method"] == "static"


def test_written_twice_it_is_the_same_and_what_others_wrote_stays(tmp_path: Path) -> None:
    saved(tmp_path)
    mine = "---\nlicense: mit\ntags:\n- mine\nlibrary_name: other\n---\n\n# My model\n\nMine.\n"
    (tmp_path / "README.md").write_text(mine)
    assert main(["card", str(tmp_path)]) == 0
    first = (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text(first.replace("Mine.", "Still mine.") + "\nAnd at the end.\n")
    assert main(["card", str(tmp_path), "--language", "en"]) == 0
    second = (tmp_path / "README.md").read_text()
    assert first.replace("Mine.", "Still mine.").partition("# My model")[2].strip() in second
    assert second.count(BEGIN) == second.count(END) == 1 and second.rstrip().endswith("And at the end.")
    assert main(["card", str(tmp_path)]) == 0
    assert (tmp_path / "README.md").read_text() == second
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.license, data.library_name, data.language) == ("mit", "other", "en")
    assert data.tags == ["mine", *TAGS]


def test_scores_beside_the_dense_run_and_in_the_index(tmp_path: Path) -> None:
    saved(tmp_path / "model")
    scores = {
        "bleu": 18.0,
        "chrf": 50.5,
        "scored": "test",
        "seconds": 3.0,
        "test_pairs": 252,
        "num_params": 9,
        "sparsity": 0.9,
    }
    (tmp_path / "model" / "results.json").write_text(json.dumps(scores))
    (tmp_path / "dense.json").write_text(json.dumps({"bleu": 20.0, "seconds": 4.0}))
    words = ["--dense", str(tmp_path / "dense.json"), "--dataset", "ui-text", "--pipeline-tag", "translation"]
    assert main(["card", str(tmp_path / "model"), *words, "--license", "apache-2.0", "--repo", "ada/model"]) == 0
    text = (tmp_path / "model" / "README.md").read_text()
    assert "It is worse than the dense run: bleu 18, dense 20." in text and "Data: ui-text." in text
    assert "num_params" not in text
    assert cells(text, "bleu") == ["18", "20", "0.900"] and cells(text, "chrf") == ["50.5", "", ""]
    assert 'from_pretrained("ada/model")' in text and "On test." in text
    data = ModelCard.load(tmp_path / "model" / "README.md").data
    assert (data.license, data.pipeline_tag, data.datasets, data.metrics) == (
        "apache-2.0",
        "translation",
        ["ui-text"],
        ["bleu", "chrf"],
    )
    found = [
        (r.task_type, r.dataset_name, r.dataset_split, r.metric_type, r.metric_value) for r in data.eval_results or []
    ]
    assert found == [("translation", "ui-text", "test", "bleu", 18.0), ("translation", "ui-text", "test", "chrf", 50.5)]


def test_no_index_without_a_dataset_and_no_comparison_without_a_dense_run(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "all_results.json").write_text(json.dumps({"eval_accuracy": 0.5, "eval_runtime": 3, "train_loss": 1.0}))
    assert main(["card", str(tmp_path)]) == 0
    text = (tmp_path / "README.md").read_text()
    assert cells(text, "accuracy") == ["0.5"] and "No dense run was given" in text and "evaluation set" in text
    data = ModelCard.load(tmp_path / "README.md").data
    assert not data.eval_results and data.metrics == ["accuracy"]


def test_scores_of_a_checkpoint_are_those_of_its_trainers_log(tmp_path: Path) -> None:
    saved(tmp_path)
    log = [{"eval_loss": 3.0, "step": 1}, {"eval_loss": 2.5, "eval_runtime": 1.0, "step": 2}, {"loss": 1.0, "step": 3}]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    assert main(["card", str(tmp_path)]) == 0
    assert cells((tmp_path / "README.md").read_text(), "loss") == ["2.5"]


def test_files_that_name_weights_otherwise(tmp_path: Path) -> None:
    model = mixtral()
    save_pretrained(model, tmp_path, pruned(model))
    assert main(["card", str(tmp_path)]) == 0
    text = (tmp_path / "README.md").read_text()
    assert "weight files, dense form" in text and "weight files, packed form" not in text


def test_speed_if_asked(tmp_path: Path) -> None:
    saved(tmp_path)
    assert main(["card", str(tmp_path), "--speed"]) == 0
    text = (tmp_path / "README.md").read_text()
    assert "A forward pass of 1 × 32 tokens takes " in text and "it is not faster" not in text


def test_packing_and_unpacking_change_how_the_card_says_it_is_loaded_and_nothing_else(tmp_path: Path) -> None:
    saved(tmp_path / "dense")
    assert main(["card", str(tmp_path / "dense"), "--repo", "ada/model"]) == 0
    dense = (tmp_path / "dense" / "README.md").read_bytes()
    assert main(["pack", str(tmp_path / "dense"), str(tmp_path / "packed")]) == 0
    packed = (tmp_path / "packed" / "README.md").read_text()
    assert 'from_pretrained("ada/model", trust_remote_code=True)' in packed and "import gap_hf\nfrom" in packed
    assert main(["unpack", str(tmp_path / "packed"), str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "README.md").read_bytes() == dense != packed.encode()
    # A card of somebody else's is nobody's to change, whatever it is written in.
    (tmp_path / "dense" / "README.md").write_bytes(b"\xff not ours\r\n")
    assert main(["pack", str(tmp_path / "dense"), str(tmp_path / "other")]) == 0
    assert (tmp_path / "other" / "README.md").read_bytes() == b"\xff not ours\r\n"


def test_a_model_with_code_of_its_own_is_loaded_as_its_card_says(tmp_path: Path) -> None:
    from gap_hf.models.pointnet2 import PointNet2Config, PointNet2ForPartSegmentation

    model = PointNet2ForPartSegmentation(PointNet2Config(**SIZES))
    save_pretrained(model, tmp_path / "dense", pruned(model))
    save_pretrained(model, tmp_path / "packed", pruned(model), packed=True)
    for form in ("dense", "packed"):
        assert main(["card", str(tmp_path / form), "--repo", str(tmp_path / form)]) == 0
        text = (tmp_path / form / "README.md").read_text()
        code = text.split("```python\n")[1].split("```")[0]
        assert ("import gap_hf" in code) == (form == "packed") and "AutoModel.from_pretrained" in code
        run = subprocess.run(
            [sys.executable, "-c", f"{code}\nprint(sum(int((p == 0).sum()) for p in model.parameters()))"],
            capture_output=True,
            text=True,
            env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
        )
        assert run.returncode == 0, run.stderr
        assert int(run.stdout.split()[-1]) == sum(int((p == 0).sum()) for p in model.parameters())


@pytest.mark.parametrize(
    ("change", "words", "sentence"),
    [
        (lambda f: (f / "gap_config.json").unlink(), [], "has no gap_config.json, so there are no masks"),
        (lambda f: (f / "README.md").write_text("---\ntags: [\n---\n"), [], "README.md: its metadata are not valid"),
        (lambda f: (f / "README.md").write_bytes(b"\xff"), [], "README.md: is not UTF-8"),
        (lambda f: (f / "results.json").write_text("{"), [], "results.json: not valid JSON"),
        (lambda f: None, ["--dense", "nowhere.json"], "--dense: nowhere.json is not there"),
        (lambda f: (f / "d.json").write_text("{}"), ["--dense", "{f}/d.json"], "d.json has no scores"),
    ],
)
def test_what_is_refused(
    tmp_path: Path, change: Any, words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tmp_path)
    change(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert main(["card", str(tmp_path), *[word.replace("{f}", str(tmp_path)) for word in words]]) == 2
    err = capsys.readouterr().err
    (line,) = [line for line in err.splitlines() if line.startswith("gap-hf: error: ")]
    assert sentence in line and "Traceback" not in err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_card_is_not_written_of_weights_that_do_not_obey(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path)
    gpt2().save_pretrained(tmp_path)
    assert main(["card", str(tmp_path)]) == 2
    assert "masked weights are not 0; a card would not be true" in capsys.readouterr().err


def trained(folder: Path, gap: Any) -> Trainer:
    args = TrainingArguments(
        str(folder),
        max_steps=24,
        per_device_train_batch_size=4,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        eval_strategy="steps",
        eval_steps=12,
        disable_tqdm=True,
    )
    trainer = GaPTrainer(model=causal_lm(), args=args, train_dataset=Tokens(), eval_dataset=Tokens(8), gap_config=gap)
    trainer.train()
    return trainer


def test_a_trainers_card_is_trainers_own_and_then_ours(tmp_path: Path) -> None:
    trainer = trained(tmp_path / "run", CONFIG)
    trainer.create_model_card(model_name="sparse", license="mit", dataset="rows")  # nothing is saved yet
    assert BEGIN not in (tmp_path / "run" / "README.md").read_text()
    trainer.save_model()
    trainer.create_model_card(model_name="sparse", license="mit", dataset="rows")
    text = (tmp_path / "run" / "README.md").read_text()
    assert text.index("## Training procedure") < text.index(BEGIN) < text.index("## Sparsity")
    gap = trainer.gap  # type: ignore[attr-defined]
    assert cells(text, "sparsity of the prunable set") == [f"{gap.sparsity():.2%}"]
    loss = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry][-1]
    assert cells(text, "loss") == [f"{loss:.4g}"]
    assert np.isfinite(loss)
    data = ModelCard.load(tmp_path / "run" / "README.md").data
    assert data.license == "mit" and {"generated_from_trainer", "gap_hf"} <= set(data.tags or [])


def test_a_card_that_a_checkpoint_writes_is_not_of_the_model_before(tmp_path: Path, caplog: Any) -> None:
    class Base(Trainer):
        def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            self.create_model_card()
            super()._save_checkpoint(*args, **kwargs)

    class Own(GaPMixin, Base):
        pass

    args = TrainingArguments(
        str(tmp_path), max_steps=24, use_cpu=True, report_to=[], save_steps=12, disable_tqdm=True, learning_rate=5e-3
    )
    trainer = Own(model=causal_lm(), args=args, train_dataset=Tokens(), gap_config=CONFIG)
    for _ in range(2):
        trainer.train()
        assert BEGIN not in (tmp_path / "README.md").read_text() and "has no section" not in caplog.text
        trainer.save_model()
        trainer.create_model_card()
        assert BEGIN in (tmp_path / "README.md").read_text()


def test_off_it_is_trainers_card_to_the_byte(tmp_path: Path) -> None:
    off = trained(tmp_path / "run", None)
    off.create_model_card(model_name="plain")
    ours = (tmp_path / "run" / "README.md").read_bytes()
    (tmp_path / "run" / "README.md").unlink()
    Trainer.create_model_card(off, model_name="plain")
    assert (tmp_path / "run" / "README.md").read_bytes() == ours and BEGIN.encode() not in ours
