"""Split the demo corpus into train, dev and test: `python data/demo/make_split.py SOURCE.tsv.gz`.

Pairs that read the same once numbers, names and placeholders are masked, on either side, form one cluster, and
a cluster goes to one split as a whole, by a hash of its text. Then every training pair that is within one word
(added, left out or exchanged) of a dev or test sentence, on either side, is dropped; so is every dev pair that is
so near to a test sentence. User-interface text is full of such pairs ("Break on Value Read", "Break on Value
Change"), and a score on them would measure look-up. The split does not depend on the order of the source.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
HEADER = ("en", "de", "source")
SPLITS = ("train", "dev", "test")
# Of 1,000 hash values: 0..33 are test, 34..60 dev. Fixed for ever: figures are quoted on this test set.
TEST_BELOW, DEV_BELOW = 34, 61

Pair = tuple[str, str, str]


def masked(text: str) -> str:
    """`text` without what may differ between near-copies: placeholders, quoted names, numbers, acronyms, case."""
    text = re.sub(r"\{[^}]*\}|%\([^)]*\)s|%[\d$]*[a-z]", " ", text)
    text = re.sub(r"'[^']*'|\"[^\"]*\"|„[^“]*“|`[^`]*`", " ", text)
    text = re.sub(r"\b\w*[a-z]\w*[A-Z]\w*\b|\b[A-Z]{2,}\b", " ", text)  # camelCase and acronyms
    return " ".join(re.findall(r"[^\W\d_]+", text.lower()))


def clusters(pairs: Iterable[Pair]) -> dict[str, list[Pair]]:
    """Pairs joined by an equal masked side (union-find), under the smallest masked English of each cluster."""
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while parent.setdefault(key, key) != key:
            parent[key] = key = parent[parent[key]]
        return key

    pairs = sorted(set(pairs))
    for english, german, _ in pairs:
        # The smaller key becomes the root, whatever the order of the pairs. English sorts before German.
        a, b = sorted((root("en " + masked(english)), root("xx " + masked(german))))
        parent[b] = a
    found: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        found[root("en " + masked(pair[0]))].append(pair)
    return found


def far_from(held_out: Iterable[Pair], pairs: Iterable[Pair]) -> list[Pair]:
    """The pairs whose sides are both more than one word away from that side of every held-out pair."""
    held_out = list(held_out)
    near = [NearTexts(pair[side] for pair in held_out) for side in (0, 1)]
    return [pair for pair in pairs if not any(pair[side] in near[side] for side in (0, 1))]


class NearTexts:
    """Tells whether a text is within one word of any of `texts`; case and punctuation do not count."""

    def __init__(self, texts: Iterable[str]) -> None:
        words = {tuple(re.findall(r"\w+", text.lower())) for text in texts}
        self.whole = words
        self.shortened = {(i, w[:i] + w[i + 1 :]) for w in words for i in range(len(w))}
        self.shorter = {w for _, w in self.shortened}

    def __contains__(self, text: str) -> bool:
        words = tuple(re.findall(r"\w+", text.lower()))
        without_one = [(i, words[:i] + words[i + 1 :]) for i in range(len(words))]
        return (
            words in self.whole
            or words in self.shorter
            or any(w in self.whole or (i, w) in self.shortened for i, w in without_one)
        )


def split_of(key: str, test_below: int = TEST_BELOW, dev_below: int = DEV_BELOW) -> str:
    value = int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) % 1000
    return "test" if value < test_below else "dev" if value < dev_below else "train"


def split(pairs: Iterable[Pair], test_below: int = TEST_BELOW, dev_below: int = DEV_BELOW) -> dict[str, list[Pair]]:
    """Pairs of each split, in an order that is random but fixed (that of their hashes)."""
    out: dict[str, list[Pair]] = {name: [] for name in SPLITS}
    for key, members in clusters(pairs).items():
        out[split_of(key, test_below, dev_below)].extend(members)
    out["dev"] = far_from(out["test"], out["dev"])
    out["train"] = far_from([*out["test"], *out["dev"]], out["train"])
    for members in out.values():
        members.sort(key=lambda pair: hashlib.sha256("\t".join(pair).encode()).digest())
    return out


def read(path: Path) -> list[Pair]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8", newline="\n") as file:
        rows = [tuple(line.rstrip("\n").split("\t")) for line in file]
    return [(en, de, source) for en, de, source in rows if (en, de, source) != HEADER]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="TSV of English, German, source; may be gzipped")
    for name, members in split(read(parser.parse_args().source)).items():
        rows = [HEADER, *members]
        (FOLDER / f"{name}.tsv").write_text("".join("\t".join(row) + "\n" for row in rows), "utf-8", newline="\n")
        print(f"{name}: {len(members):,} pairs")


if __name__ == "__main__":
    main()
