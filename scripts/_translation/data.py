"""Sentence pairs: from files, a folder or the Hub, as `datasets` with the columns source, target and origin."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from gap_hf.errors import GaPError, did_you_mean, nearest
from gap_hf.recipe import one_line

SUFFIXES = (".tsv", ".tsv.gz", ".jsonl", ".jsonl.gz", ".parquet")
SCORED = ("test", "dev")
FILE_NAMES = {"train": ("train",), "dev": ("dev", "valid", "validation"), "test": ("test",)}


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """`data` of a translation recipe: one of `folder`, `train` (and `dev`, `test`), or `dataset`.

    Attributes:
        source, target: Languages, that is the names of the columns (or keys of a `translation` mapping).
        folder: Folder with train, dev (or valid, validation) and test files.
        train, dev, test: Files: .tsv, .jsonl (both also with .gz) or .parquet.
        dataset, dataset_config: Name and configuration on the Hub, such as wmt14 and de-en.
        train_split, dev_split, test_split: Splits of that dataset.
        columns: Names of a TSV's columns, for files without a first line that has them.
        origin: Column that says where a pair is from; BLEU is then also given for each value.
        source_prefix: Put before every source text, as T5 wants it.
        max_length: Tokens of either side. Longer training pairs are left out, longer sources to translate are cut.
        max_tokens_per_batch: Padded tokens of either side per batch and process; None goes by
            `training.per_device_train_batch_size`.
        max_train_samples, max_eval_samples: Use only so many; dev is the one that is scored during training.
        eval_num_beams: Beams of the evaluations during training; the test set has `training.generation_num_beams`.
        lowercase_bleu: Score without case (the authors of GaP do).
        score: Which split is translated with all beams and scored at the end: ``test``, or ``dev`` while settings are
            being chosen; the test set is then not translated at all.
        reference: `results.json` of a run to show beside this one, such as the dense one.
        num_workers: Processes that tokenize.
    """

    source: str
    target: str
    folder: Path | None = None
    train: Path | None = None
    dev: Path | None = None
    test: Path | None = None
    dataset: str | None = None
    dataset_config: str | None = None
    train_split: str = "train"
    dev_split: str = "validation"
    test_split: str = "test"
    columns: list[str] | None = None
    origin: str | None = None
    source_prefix: str = ""
    max_length: int = 128
    max_tokens_per_batch: int | None = None
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    eval_num_beams: int = 1
    lowercase_bleu: bool = False
    score: str = "test"
    reference: Path | None = None
    num_workers: int | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("folder", "train", "dataset") if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise GaPError(f"data.{(given or ['train'])[0]}: found {found}, expected one of folder, train, dataset")
        if self.train is not None and (self.dev is None or self.test is None):
            raise GaPError(f"data.{'dev' if self.dev is None else 'test'}: not set; expected a file, as for data.train")
        for name in ("dev", "test"):
            if self.train is None and getattr(self, name) is not None:
                raise GaPError(f"data.{name}: contradicts data.{given[0]}, which has its own; expected data.train too")
        if self.source == self.target:
            raise GaPError(f"data.target: found '{self.target}', the same as data.source; expected another column")
        if self.origin in (self.source, self.target):
            raise GaPError(
                f"data.origin: found '{self.origin}', a language's column; expected one that says where a pair is from"
            )
        if self.score not in SCORED:
            hint = nearest(self.score, SCORED)
            raise GaPError(f"data.score: found '{self.score}', expected one of {', '.join(SCORED)}{hint}")
        for name in (
            "max_length",
            "max_tokens_per_batch",
            "max_train_samples",
            "max_eval_samples",
            "eval_num_beams",
            "num_workers",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise GaPError(f"data.{name}: found {value}, expected at least 1")
        if self.max_tokens_per_batch is not None and self.max_tokens_per_batch < self.max_length:
            raise GaPError(
                f"data.max_tokens_per_batch: found {self.max_tokens_per_batch}, expected at least data.max_length, "
                f"{self.max_length}, or the longest pair fits in no batch"
            )
        for name in ("train", "dev", "test", "reference"):
            path = getattr(self, name)
            if path is not None and not path.is_file():
                raise GaPError(f"data.{name}: no such file: {path}{_nearest_file(path)}")


def load_pairs(data: DataSection) -> dict[str, Dataset]:
    """Train, dev and test with the string columns source, target and, if `data.origin` is set, origin.

    Raises:
        GaPError: for missing files, splits and columns, lines that cannot be read, and empty sets.
    """
    out: dict[str, Dataset] = {}
    for split in ("train", "dev", "test"):
        if data.dataset is not None:
            where = f"data.dataset: {data.dataset}, split {getattr(data, f'{split}_split')}"
            rows = _from_hub(data, getattr(data, f"{split}_split"))
        else:
            path = getattr(data, split) or _in_folder(data.folder, split)
            where = f"data.{split if data.folder is None else 'folder'}: {path}"
            rows = _from_file(path, data.columns)
        out[split] = _clean(_pick_columns(rows, data, where))
        if not len(out[split]):
            raise GaPError(f"{where}: no pairs in it; expected at least one with text on both sides")
    for split, limit in (("train", data.max_train_samples), ("dev", data.max_eval_samples)):
        if limit is not None:
            out[split] = out[split].select(range(min(limit, len(out[split]))))
    return out


def _in_folder(folder: Path | None, split: str) -> Path:
    assert folder is not None
    if not folder.is_dir():
        raise GaPError(f"data.folder: no such folder: {folder}")
    for path in (folder / f"{name}{suffix}" for name in FILE_NAMES[split] for suffix in SUFFIXES):
        if path.is_file():
            return path
    wanted = f"{' or '.join(FILE_NAMES[split])}, with one of {', '.join(SUFFIXES)}"
    raise GaPError(f"data.folder: {folder} has no {split} file; expected {wanted}")


def _nearest_file(path: Path) -> str:
    if not path.parent.is_dir():
        return ""
    return nearest(path.name, [p.name for p in path.parent.iterdir()])


# --- reading ---------------------------------------------------------------------------------------------------------


def _from_hub(data: DataSection, split: str) -> Dataset:
    import datasets

    assert data.dataset is not None
    try:
        return datasets.load_dataset(data.dataset, data.dataset_config, split=split)
    except Exception as error:  # the Hub's client and the dataset's own code raise anything
        raise GaPError(f"data.dataset: could not load {data.dataset}, split {split}: {one_line(error)}") from None


def _from_file(path: Path, columns: Sequence[str] | None) -> Dataset:
    try:
        if path.name.endswith(".parquet"):
            import pyarrow.parquet

            return Dataset(pyarrow.parquet.read_table(path))
        if path.name.endswith((".jsonl", ".jsonl.gz")):
            return Dataset.from_list(list(_json_lines(path)))
        if path.name.endswith((".tsv", ".tsv.gz")):
            return _tsv(path, columns)
    except (OSError, UnicodeDecodeError, ValueError, TypeError, EOFError) as error:
        if isinstance(error, GaPError):
            raise
        raise GaPError(f"{path}: cannot be read: {one_line(error)}") from None
    raise GaPError(f"{path}: found the suffix '{path.suffix}', expected one of {', '.join(SUFFIXES)}")


def _lines(path: Path) -> Iterator[str]:
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as file:
        for line in file:
            yield line.rstrip("\r\n")


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise GaPError(f"{path}:{number}: not valid JSON: {one_line(error)}") from None
        if not isinstance(row, dict):
            raise GaPError(f"{path}:{number}: found {type(row).__name__}, expected an object with one key per column")
        yield row


def _tsv(path: Path, columns: Sequence[str] | None) -> Dataset:
    # Not csv: translated text is full of quotes that mean nothing.
    lines = enumerate(_lines(path), 1)
    if columns is None:
        columns = next(lines, (0, ""))[1].split("\t")
    cells: dict[str, list[str]] = {name: [] for name in columns}
    if len(cells) != len(columns):
        raise GaPError(f"{path}: two columns have the same name: {', '.join(columns)}")
    for number, line in lines:
        if not line:
            continue
        row = line.split("\t")
        if len(row) != len(columns):
            raise GaPError(
                f"{path}:{number}: found {len(row)} tab-separated fields, expected {len(columns)} ({', '.join(columns)})"
            )
        for name, cell in zip(columns, row, strict=True):
            cells[name].append(cell)
    return Dataset.from_dict(cells)


def _pick_columns(rows: Dataset, data: DataSection, where: str) -> Dataset:
    """The columns that a recipe names, under our names; out of the `translation` mapping of the Hub's datasets too."""
    names = list(rows.column_names)
    if "translation" in names and data.source not in names:
        inner = rows[0]["translation"] if len(rows) else {}
        if not isinstance(inner, Mapping):
            raise GaPError(f"{where}: 'translation' holds {type(inner).__name__}, expected one text per language")
        rows, names = rows.flatten(), [str(key) for key in inner]
        rows = rows.rename_columns({f"translation.{name}": name for name in names})
    wanted = {"source": data.source, "target": data.target, **({"origin": data.origin} if data.origin else {})}
    for key, name in wanted.items():
        if name not in rows.column_names:
            hint = did_you_mean(name, rows.column_names)
            fix = (
                " (set data.columns if the first line is no header)" if data.columns is None and "tsv" in where else ""
            )
            raise GaPError(f"data.{key}: found '{name}', expected a column of {where.split(': ', 1)[1]}{hint}{fix}")
    # Through temporary names: a column may be called source without being the source.
    rows = rows.select_columns(list(wanted.values())).rename_columns({v: f"_{k}" for k, v in wanted.items()})
    return rows.rename_columns({f"_{k}": k for k in wanted})


def _clean(rows: Dataset) -> Dataset:
    """Only pairs with text on both sides: an empty reference can neither be learnt nor scored.

    Raises:
        GaPError: for what is no text.
    """
    for key in ("source", "target"):
        if (
            found := next((cell for cell in rows[key] if cell is not None and not isinstance(cell, str)), None)
        ) is not None:
            raise GaPError(f"data.{key}: its column holds {type(found).__name__} ({found!r}), expected text")
    keep = [i for i, (s, t) in enumerate(zip(rows["source"], rows["target"], strict=True)) if s and t]
    return rows if len(keep) == len(rows) else rows.select(keep)
