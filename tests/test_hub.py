"""Sparse models go to the Hub whole or not at all, and come back to the bit in every way that one loads them."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hub import TOKEN, Fault, Files, Hub, running_hub
from test_saving import gpt2, pruned

from gap_hf import save_pretrained
from gap_hf.cli import main
from gap_hf.recorded import verify_folder

# huggingface_hub's own, of how it hands a file to its HTTP client.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

DIGEST = """
import hashlib
def digest(model):
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return found.hexdigest()
"""
TRAIN = """
import sys
from pathlib import Path
from toys import CONFIG, Tokens, causal_lm
from transformers import TrainingArguments
from gap_hf import GaPTrainer

def trainer(name, **changes):
    settings = dict(max_steps=24, save_steps=6, per_device_train_batch_size=4, use_cpu=True, report_to=[], logging_steps=6,
        hub_model_id=f"ada/{name}", hub_private_repo="private" in name, push_to_hub=True, disable_tqdm=True) | changes
    args = TrainingArguments(str(Path(sys.argv[1]) / name), **settings)
    made = GaPTrainer(model=causal_lm(), args=args, train_dataset=Tokens(), gap_config=CONFIG)
    made.train()
    return made

for strategy in ("every_save", "checkpoint", "all_checkpoints", "end"):
    made = trainer(f"{strategy.replace('_', '-')}{'-private' if strategy == 'checkpoint' else ''}", hub_strategy=strategy, hub_always_push=True)
    made.push_to_hub()
    print(made.hub_model_id, digest(made.model))
# Not pushed before, packed; then the other form over it, in shards or not, and the packed one again.
for private in (False, True):
    made = trainer("packed-private" if private else "packed", push_to_hub=False, save_strategy="no")
    future = made.push_to_hub(packed=True, blocking=False)
    made.push_to_hub("dense over it")
    made.push_to_hub("packed again", packed=True)
    print(made.hub_model_id, digest(made.model), future.result().commit_message)
    left = [p.name for p in Path(made.args.output_dir).iterdir() if p.name.startswith(("_push", ".push"))]
    assert not left, left
"""
LOAD = """
import sys
from transformers import AutoModelForCausalLM, logging
logging.set_verbosity_error()
for trust in (False, True):  # the reader of one packed model reads the others too, so without it comes first
    for repo in {repos!r}:
        try:
            print(repo, trust, digest(AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=trust)))
        except Exception as error:
            print(repo, trust, type(error).__name__)
assert ("gap_hf" in sys.modules) == {imported}
"""

MASKS = """
for repo in {repos!r}:
    masks = gap_hf.load_masks(repo)
    print(repo, sum(int(mask.sum()) for mask in masks.values()), sorted(masks))
"""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running_hub() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        # Between its retries; here they fail at once.
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        yield hub


def child(hub: Hub, tmp_path: Path, code: str, *words: str) -> list[list[str]]:
    env = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-c", DIGEST + code, *words]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert run.returncode == 0, run.stderr
    return [line.split(maxsplit=2) for line in run.stdout.splitlines() if line.startswith("ada/")]


def written(files: Files, folder: Path) -> Path:
    folder.mkdir()
    for name, data in files.items():
        if "/" not in name:
            (folder / name).write_bytes(data)
    return folder


def test_a_trainers_pushes_in_every_way_load_to_the_bit(hub: Hub, tmp_path: Path) -> None:
    printed = child(hub, tmp_path, TRAIN, str(tmp_path / "runs"))
    digests = {repo: digest for repo, digest, *_ in printed}
    assert len(digests) == 6
    assert all(repo.private == ("private" in name) for name, repo in hub.repos.items())
    for name, repo in hub.repos.items():
        for number, (_, message, files) in enumerate(repo.commits[1:]):
            # Every commit is a whole model of one step, with its own masks and card.
            found = verify_folder(written(files, tmp_path / f"{name.replace('/', '-')}{number}"))
            assert found["form"] == (
                "packed" if message in ("End of training", "packed again") and "packed" in name else "dense"
            )
            assert {"README.md", "training_args.bin", "gap_config.json"} <= files.keys()
            # And the Hub was asked whether the card's metadata are valid.
            card = files["README.md"].decode()
            assert card in hub.validated and f"**{1 - found['live'] / found['weights']:.2%}** of its prunable" in card
            assert ("trust_remote_code=True" in card) == (found["form"] == "packed")
            if message.startswith("Training in progress, step "):
                step = int(message.rpartition(" ")[2])
                assert json.loads(files["gap_config.json"])["step"] == step
                for folder in {"last-checkpoint", f"checkpoint-{step}"} & {f.split("/")[0] for f in files}:
                    saved = {f.split("/")[1]: data for f, data in files.items() if f.startswith(f"{folder}/")}
                    assert {"optimizer.pt", "trainer_state.json", "gap_masks.safetensors"} <= saved.keys()
                    assert saved["model.safetensors"] == files["model.safetensors"]
                    assert json.loads(saved["trainer_state.json"])["global_step"] == step
    messages = {name: [message for _, message, _ in repo.commits[1:]] for name, repo in hub.repos.items()}
    during = [f"Training in progress, step {step}" for step in (6, 12, 18, 24)]
    for name in ("every-save", "checkpoint-private", "all-checkpoints"):
        assert messages[f"ada/{name}"] == [*during, "End of training"], name
    assert messages["ada/end"] == ["End of training"]
    assert messages["ada/packed"] == ["End of training", "dense over it", "packed again"]
    folders = {name: {f.split("/")[0] for f in hub.files(name) if "/" in f} for name in hub.repos}
    assert folders["ada/every-save"] == folders["ada/end"] == folders["ada/packed"] == set()
    assert folders["ada/checkpoint-private"] == {"last-checkpoint"}
    assert folders["ada/all-checkpoints"] == {f"checkpoint-{step}" for step in (6, 12, 18, 24)}
    form = {"model.safetensors", "gap_hf_packed.py", "gap_hf_layout.py", "gap_config.json"}
    assert {name for name in hub.files("ada/packed") if name.startswith(("model", "gap"))} == form

    dense = ["ada/every-save", "ada/checkpoint-private", "ada/all-checkpoints", "ada/end"]
    packed = ["ada/packed", "ada/packed-private"]
    # Where gap_hf is not imported: the dense form, and the packed one only if its own reader may run.
    alone = child(hub, tmp_path, LOAD.format(repos=dense + packed, imported=False))
    for repo, trust, result in alone:
        if repo in packed and trust == "False":
            assert len(result) < 64, result
        else:
            assert result == digests[repo], (repo, trust)
    code = (
        "import gap_hf" + LOAD.format(repos=dense + packed, imported=True) + MASKS.format(repos=[dense[0], packed[1]])
    )
    *with_it, one, other = child(hub, tmp_path, code)
    assert one[1:] == other[1:] and int(one[1]) > 0  # the live weights of a dense repository and of a packed one
    assert [(repo, result) for repo, _, result in with_it] == 2 * [(r, digests[r]) for r in dense + packed]


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """A model in shards, and another one in a single file."""
    model = gpt2()
    save_pretrained(model, tmp_path / "sharded", pruned(model), max_shard_size="100KB")
    (tmp_path / "sharded" / "optimizer.pt").write_bytes(b"of a run")
    with torch.no_grad():
        model.transformer.wte.weight.add_(1)
    save_pretrained(model, tmp_path / "single", pruned(model))
    return {name: tmp_path / name for name in ("sharded", "single")}


def push(*words: str | Path) -> int:
    return main(["push", *map(str, words), "--token", TOKEN])


@pytest.mark.parametrize("form", [[], ["--packed"]])
@pytest.mark.parametrize("private", [[], ["--private"]])
def test_gap_hf_push(
    hub: Hub,
    folders: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    form: list[str],
    private: list[str],
) -> None:
    assert push(folders["sharded"], "model", *form, *private) == 0
    assert "is published: http://127.0.0.1" in capsys.readouterr().out
    assert hub.repos["ada/model"].private == bool(private)
    assert not [name for name in hub.files("ada/model") if name.endswith(".pt")]
    found = verify_folder(written(hub.files("ada/model"), tmp_path / "first"))
    assert found["form"] == ("packed" if form else "dense")
    if not form:
        assert verify_folder(folders["sharded"]) == found
    # The same name for another model: nothing of the shards is left to be read instead.
    assert push(folders["single"], "ada/model", *form) == 0
    names = {name for name in hub.files("ada/model") if name.startswith("model")}
    assert names == {"model.safetensors"}
    assert hub.repos["ada/model"].private == bool(private)
    # And a packed folder as the dense one that it was made of.
    assert main(["pack", str(folders["single"]), str(tmp_path / "packed")]) == 0
    assert push(tmp_path / "packed", "ada/dense", "--dense") == 0
    assert hub.files("ada/dense")["model.safetensors"] == (folders["single"] / "model.safetensors").read_bytes()


FAULTS = [
    (Fault("GET", "/api/models/", 401), "the Hub answers 401; expected a token that may write to it"),
    (Fault("POST", "/preupload/", 403), "the Hub answers 403; this token may not write to it"),
    (Fault("POST", "/preupload/", 404), "the Hub answers 404; expected a repository and branch that exist"),
    (Fault("POST", "/objects/batch", 503), "the Hub answers 503; try again later"),
    (Fault("PUT", "/lfs/", 500, skip=1), "the Hub answers 500; try again later"),
    (Fault("PUT", "/lfs/", None, skip=1), "Error while uploading 'model-"),
    (Fault("POST", "/commit/", 401), "the Hub answers 401"),
    (Fault("POST", "/commit/", 502), "the Hub answers 502"),
    (Fault("POST", "/commit/", 412), "somebody else has pushed meanwhile"),
    (Fault("POST", "/commit/", None), "disconnected"),
    (Fault("GET", "/api/models/", None), "disconnected"),
]


@pytest.mark.parametrize("number", range(len(FAULTS)))
def test_a_push_that_fails_publishes_nothing(
    hub: Hub, folders: dict[str, Path], capsys: pytest.CaptureFixture[str], number: int
) -> None:
    fault, sentence = FAULTS[number]
    assert push(folders["single"], "ada/model") == 0
    before = dict(hub.files("ada/model"))
    commits = len(hub.repos["ada/model"].commits)
    capsys.readouterr()
    hub.faults.append(Fault(fault.method, fault.path, fault.status, skip=fault.skip))
    assert push(folders["sharded"], "ada/model") == 2
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if line.startswith("gap-hf: error: ")]
    assert len(lines) == 1 and "Traceback" not in printed.err
    assert lines[0].startswith("gap-hf: error: ada/model: nothing was published: ") and sentence in lines[0], lines
    assert len(hub.repos["ada/model"].commits) == commits and hub.files("ada/model") == before
    # The line is up again, and the same call does it.
    hub.faults.clear()
    assert push(folders["sharded"], "ada/model") == 0
    assert "model.safetensors" not in hub.files("ada/model")


def test_a_push_recovers_from_what_passes(hub: Hub, folders: dict[str, Path]) -> None:
    hub.faults += [Fault("PUT", "/lfs/", 503, times=1), Fault("POST", "/preupload/", 500, times=2)]
    assert push(folders["sharded"], "ada/model") == 0
    assert {p.name for p in folders["sharded"].glob("*.safetensors")} <= hub.files("ada/model").keys()


@pytest.mark.parametrize(
    ("status", "lookup", "sentence"),
    [
        (None, True, "the connection was lost when the Hub had taken a commit; look at what it has"),
        (502, True, "the Hub answers 502 when the Hub had taken a commit; look at what it has"),
        (None, False, "the connection was lost and whether it has taken the commit is not known; look at what it has"),
        (504, False, "the Hub answers 504 and whether it has taken the commit is not known; look at what it has"),
    ],
)
def test_a_commit_whose_answer_is_lost_is_not_said_to_be_nothing(
    hub: Hub,
    folders: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
    status: int | None,
    lookup: bool,
    sentence: str,
) -> None:
    hub.faults.append(Fault("POST", "/commit/", status, late=True))
    if not lookup:
        hub.faults.append(Fault("GET", "/api/models/", 503, skip=1))
    assert push(folders["single"], "ada/model") == 2
    error = capsys.readouterr().err
    assert f"gap-hf: error: ada/model: {sentence}" in error and "nothing was published" not in error
    assert "model.safetensors" in hub.files("ada/model")


def test_a_push_leaves_other_folders_of_the_repository_alone(hub: Hub, folders: dict[str, Path]) -> None:
    assert push(folders["sharded"], "ada/model") == 0
    theirs = {"models/vae.safetensors": b"of another model", "model/gap_masks.safetensors": b"and its masks"}
    hub.repos["ada/model"].commit("theirs", hub.files("ada/model") | theirs)
    assert push(folders["single"], "ada/model") == 0
    files = hub.files("ada/model")
    assert theirs.items() <= files.items()
    assert {name for name in files if name.startswith("model") and "/" not in name} == {"model.safetensors"}


def test_what_push_refuses(
    hub: Hub, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, sentence in (
        ((folders["single"], "no/such/name"), "no/such/name: nothing was published: Repo id must be in the form"),
        (
            (folders["single"], "ada/model", "--revision", "draft"),
            "the Hub answers 404; expected a repository and branch",
        ),
        ((tmp_path / "nowhere", "ada/model"), "nowhere: is no folder"),
    ):
        assert push(*words) == 2
        assert sentence in capsys.readouterr().err
    assert main(["push", str(folders["single"]), "ada/model", "--token", "hf_other"]) == 2
    assert "the Hub answers 401" in capsys.readouterr().err
    # A folder whose weights do not obey its masks is not published at all.
    path = folders["single"] / "gap_masks.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    requests = len(hub.requests)
    assert push(folders["single"], "ada/model") == 2
    assert "gap_masks.safetensors" in capsys.readouterr().err and len(hub.requests) == requests


def test_digests_here_are_those_of_the_child() -> None:
    scope: dict[str, object] = {}
    exec(DIGEST, scope)
    model = gpt2()
    expected = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        expected.update(name.encode() + tensor.numpy().tobytes())
    assert scope["digest"](model) == expected.hexdigest()  # type: ignore[operator]
