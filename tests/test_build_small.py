"""benchmarks/quality/build_small.py on small hand-made packages; no network."""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks" / "quality"), str(ROOT / "data" / "demo")]

import build_small  # noqa: E402
import extract  # noqa: E402
import make_split  # noqa: E402


def page(*paragraphs: str) -> str:
    body = "".join(f'<p id="par_{i}">{text}</p>' for i, text in enumerate(paragraphs))
    return f"<html><head><title>x</title></head><body>{body}<footer><p>Title is: x</p></footer></body></html>"


def written(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")
    return path


# --- extraction ------------------------------------------------------------------------------------------------------


def test_documents_are_paired_by_name_and_structure(tmp_path: Path) -> None:
    key = '<span id="m" class="MAC"><span class="keycode">Command</span></span><span class="keycode">Ctrl</span>'
    written(tmp_path / "en/usr/help/en-US/a.html", page("Press <b>this</b> key.", f"Hold {key} down &amp; wait."))
    written(tmp_path / "de/usr/help/de/a.html", page("Diese <b>Taste</b> drücken.", "Strg halten &amp; warten."))
    written(tmp_path / "en/usr/b.en.html", page("One", "Two"))
    written(tmp_path / "de/usr/b.de.html", page("Eins und zwei"))
    written(tmp_path / "en/usr/only.en.html", page("Nobody translated this."))
    assert list(extract.document_pairs(tmp_path / "en", tmp_path / "de")) == [
        ("Press this key.", "Diese Taste drücken."),
        ("Hold Ctrl down & wait.", "Strg halten & warten."),
    ]


def test_names_of_documents_without_their_language(tmp_path: Path) -> None:
    for name in ("doc/guide-de/html/start.de.html", "FAQ/de/kernel.de.html", "help/en-US/text/de.html"):
        written(tmp_path / name, "")
    assert set(extract.documents(tmp_path)) == {"doc/guide/html/start.html", "FAQ/kernel.html", "help/text.html"}


def test_descriptions_are_paired_by_paragraph(tmp_path: Path) -> None:
    def entry(md5: str, language: str, *lines: str) -> str:
        return "\n".join([f"Package: p{md5}", f"Description-md5: {md5}", f"Description-{language}: {lines[0]}"]) + (
            "".join(f"\n {line}" for line in lines[1:]) + "\n\n"
        )

    english = entry("1", "en", "a game", "A game of", "chance.", ".", "It has:", " * one board", " * two dice")
    german = entry("1", "de", "ein Spiel", "Ein Glücksspiel.", ".", "Es hat:", " * ein Brett", " * zwei", "   Würfel")
    english += entry("2", "en", "a tool", "First.", ".", "Second.") + entry("3", "en", "not translated")
    german += entry("2", "de", "ein Werkzeug", "Nur ein Absatz.")
    paths = [written(tmp_path / "en", english)], [written(tmp_path / "de", german)]
    assert list(extract.description_pairs(*paths)) == [
        ("a game", "ein Spiel"),
        ("A game of chance.", "Ein Glücksspiel."),
        ("It has:", "Es hat:"),
        ("one board", "ein Brett"),
        ("two dice", "zwei Würfel"),
    ]


def test_language_packs_are_paired_by_place(tmp_path: Path) -> None:
    for language, nested, listed in (
        ("qps-ploc", {"k": {"close": "Çløsë thë wïñðøw"}, "new": "Ñëw"}, '\n\tundefined,\n\t"Ëðït þøth",\n'),
        ("de", {"k": {"close": "Fenster schließen"}}, '\n\tundefined,\n\t"Beide bearbeiten",\n'),
    ):
        written(tmp_path / language / "x/a.i18n.json", json.dumps({"version": "1", "contents": nested}))
        written(tmp_path / language / "x/main.i18n.json.js", f"var content = [{listed}];\nexport {{ content }};")
    assert list(extract.message_pairs(tmp_path / "qps-ploc", tmp_path / "de")) == [
        ("Close the window", "Fenster schließen"),
        ("Edit both", "Beide bearbeiten"),
    ]


# --- cleaning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("  Save\u00a0the \u00ad<b>file</b>\n&amp; close ¶", "Save the file & close"),
        ("&&Datei öffnen (&O)", "Datei öffnen"),
        ("3.1. Overview", "Overview"),
        ("• u\u0308ber", "über"),
    ],
)
def test_cleaned(raw: str, clean: str) -> None:
    assert extract.cleaned(raw) == clean


def test_sentences_are_split_where_both_languages_have_as_many() -> None:
    assert extract.sentences("It works. Try it (e.g. Now).", "Es geht. Probieren Sie es (z. B. Jetzt).") == [
        ("It works.", "Es geht."),
        ("Try it (e.g. Now).", "Probieren Sie es (z. B. Jetzt)."),
    ]
    whole = ("It works. Try it.", "Es geht, also probieren Sie es.")
    assert extract.sentences(*whole) == [whole]


GOOD = ("Press the key to close the window.", "Drücken Sie die Taste, um das Fenster zu schließen.")


@pytest.mark.parametrize(
    ("english", "german"),
    [
        ("Close the window.", "Das Fenster schließen."),  # three words
        ("word " * 41, "Wort " * 41),
        ("Press the key to close {0} now", "Drücken Sie jetzt {0}, um zu schließen"),
        ("Set this value with key=value pairs", "Wert mit Paaren key=value setzen, bitte"),
        ("Look into /etc/fstab to find it", "Suchen Sie es in der Datei /etc/fstab"),
        ("There are 3 windows to close", "Es sind 4 Fenster zu schließen"),
        ("Press the key to close it", "Press the key to close it"),
        ("Press the key to close the window", "Drücken Sie the Taste zum Schließen"),
        ("Press the key to close the window", "Taste"),
        ("alpha beta gamma delta library", "Bibliothek alpha beta gamma delta"),
    ],
)
def test_what_is_not_a_good_pair(english: str, german: str) -> None:
    assert extract.is_good(*GOOD)
    assert not extract.is_good(english.strip(), german.strip())


# --- the split and the output ----------------------------------------------------------------------------------------


def corpus(count: int) -> list[tuple[str, str, str]]:
    """Invented pairs; some read the same but for numbers or letters' case, some are one word apart."""
    draw = random.Random(0)
    english, german = ([f"{letter}{''.join(draw.choices('aeioulmnrst', k=5))}" for _ in range(400)] for letter in "xy")
    pairs = []
    while len(pairs) < count:
        picked = draw.sample(range(400), 6)
        en, de = (" ".join(words[i] for i in picked) for words in (english, german))
        pairs.append((en, de, "a"))
        if draw.random() < 0.3:
            pairs += [(f"{en} 7", f"{de} 7", "a"), (en.upper(), de, "b"), (f"{en} more", f"{de} mehr", "b")]
    return pairs


def test_split_keeps_one_pair_of_a_cluster_and_no_near_copies() -> None:
    pairs = corpus(4000)
    splits = build_small.split(pairs)
    kept = [pair for members in splits.values() for pair in members]
    assert len(splits["test"]) > 20 and len(splits["dev"]) > 8 and len(splits["train"]) > 2000
    for side in (0, 1):
        assert len({make_split.masked(pair[side]) for pair in kept}) == len(kept)
    held_out = [*splits["dev"], *splits["test"]]
    assert make_split.far_from(held_out, splits["train"]) == splits["train"]
    assert make_split.far_from(splits["test"], splits["dev"]) == splits["dev"]
    random.Random(1).shuffle(pairs)
    assert build_small.split(pairs) == splits


def test_nothing_near_what_the_demo_holds_out_is_trained_on() -> None:
    english, german, _ = make_split.read(build_small.DEMO / "test.tsv")[0]
    pairs = [(f"{english} too", f"ganz anderer Text {i} {word}", "a") for i, word in enumerate(["hier", "dort", "da"])]
    pairs.append((f"whole other words in {german}", f"auch {german}", "a"))
    assert len(make_split.split(pairs, build_small.TEST_BELOW, build_small.DEV_BELOW)["train"]) == 4
    assert build_small.split(pairs)["train"] == []


@pytest.fixture
def made_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """`build` without downloads: package descriptions made here, and tools that are always there."""
    texts = [(en, de) for en, de, _ in corpus(400)]

    def download(downloads: Path, unpacked: Path) -> dict[str, Any]:
        for language, side in (("en", 0), ("de", 1)):
            entries = (f"Description-md5: {i}\nDescription-{language}: {pair[side]}\n" for i, pair in enumerate(texts))
            written(downloads / f"apt/lists/host_dists_x_i18n_Translation-{language}", "\n".join(entries))
        return {"x_i18n_Translation-de": {"version": "", "sha256": "0"}}

    monkeypatch.setattr(build_small, "download", download)
    monkeypatch.setattr(build_small, "run", lambda *args, **kwargs: "apt 2.0 (amd64)")
    monkeypatch.setattr(build_small.shutil, "which", lambda tool: tool)
    monkeypatch.setattr(build_small, "MIN_TRAIN", 100)


@pytest.mark.usefixtures("made_here")
def test_a_build_and_the_same_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "data" / "small"
    assert build_small.main(["--output", str(output)]) == 0
    manifest = json.loads((output / "manifest.json").read_text("utf-8"))
    files = {path.name: path.read_bytes() for path in output.iterdir()}
    assert set(files) == {"train.tsv", "dev.tsv", "test.tsv", "manifest.json"}
    assert all(files[f"{name}.tsv"].startswith(b"en\tde\tsource\n") for name in make_split.SPLITS)
    assert manifest["files"]["train.tsv"]["pairs"] == files["train.tsv"].count(b"\n") - 1
    assert manifest["files"]["train.tsv"]["pairs_by_source"].keys() == {"debian-descriptions"}

    assert build_small.main(["--output", str(output)]) == 0
    assert {path.name: path.read_bytes() for path in output.iterdir()} == files
    assert [path.name for path in output.parent.iterdir()] == ["small"]

    capsys.readouterr()
    build_small.report(manifest, output / "manifest.json")
    assert "byte-identical to those of" in capsys.readouterr().out


@pytest.mark.usefixtures("made_here")
def test_refusals_leave_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*arguments: str) -> str:
        assert build_small.main(list(arguments)) == 2
        said = capsys.readouterr().err
        assert re.fullmatch(r"error: .+\n", said)
        return said

    mine = written(tmp_path / "mine" / "notes.txt", "keep")
    assert "is not from an earlier build" in refused("--output", str(mine.parent))
    assert "is not empty" in refused("--output", str(tmp_path / "new"), "--keep-downloads", str(mine.parent))
    monkeypatch.setattr(build_small, "MIN_TRAIN", 10_000)
    assert "expected at least 10,000" in refused("--output", str(tmp_path / "new"))

    def full_disk(*args: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(build_small, "MIN_TRAIN", 100)
    monkeypatch.setattr(build_small, "write", full_disk)
    assert "No space left" in refused("--output", str(tmp_path / "new"))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_missing_tool_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build_small.main(["--output", str(tmp_path / "small")]) == 2
    assert capsys.readouterr().err.startswith("error: apt-get is not installed; it is needed to download")
    for tool in ("apt-get", "dpkg-deb"):
        written(tmp_path / tool, "#!/bin/sh\n").chmod(0o755)
    assert build_small.main(["--output", str(tmp_path / "small")]) == 2
    assert capsys.readouterr().err.startswith("error: npm is not installed; it is needed to download")


def test_a_failed_download_says_what_the_tool_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for tool, body in (("apt-get", "echo W: first >&2\necho 'E: no network' >&2\nexit 100"), ("npm", "exit 1")):
        written(tmp_path / "bin" / tool, f"#!/bin/sh\n{body}\n").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    with pytest.raises(build_small.BuildError, match="apt-get could not fetch the lists of packages: E: no network"):
        build_small.download(tmp_path / "downloads", tmp_path / "unpacked")


def test_report_says_which_packages_and_files_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def manifest(version: str, digest: str, **packages: Any) -> dict[str, Any]:
        file = {"sha256": digest, "pairs": 9, "english_words_per_pair": 5.0}
        return {"packages": {"p": {"version": version, "sha256": version}, **packages}, "files": {"dev.tsv": file}}

    committed = written(tmp_path / "m.json", json.dumps(manifest("1", "a", old={"version": "1", "sha256": "1"})))
    build_small.report(manifest("2", "b"), committed)
    said = capsys.readouterr().out
    for line in ("p: version 2, committed 1", "old: only in the committed build", "dev.tsv: other content"):
        assert line in said
    assert "compare scores within one build only" in said


def test_the_committed_manifest_is_of_a_build_of_this_script() -> None:
    manifest = json.loads(build_small.COMMITTED_MANIFEST.read_text("utf-8"))
    assert set(manifest["files"]) == {f"{name}.tsv" for name in make_split.SPLITS}
    assert manifest["files"]["train.tsv"]["pairs"] >= build_small.MIN_TRAIN
    packages = {*build_small.LANGUAGE_PACKS.values(), *(name for both in build_small.MANUALS.values() for name in both)}
    assert {re.sub(r"(?<=.)@.*", "", name) for name in packages} <= set(manifest["packages"])
