"""The reader that lies in every packed folder, so that ``trust_remote_code=True`` loads it where gap_hf is not installed."""

from __future__ import annotations

from pathlib import Path

READER, LAYOUT = "gap_hf_packed.py", "gap_hf_layout.py"
AUTO_MAP = {"AutoConfig": "gap_hf_packed.PackedAutoConfig"}
_IMPORT, _RELATIVE = "from gap_hf.packed.layout import", "from .gap_hf_layout import"


def write_reader(folder: Path) -> None:
    """Copy the two modules into `folder`, with the one import between them made relative, as transformers wants it."""
    here = Path(__file__).parent
    source = (here / "loading.py").read_text(encoding="utf-8")
    assert source.count(_IMPORT) == 1
    (folder / READER).write_text(source.replace(_IMPORT, _RELATIVE), encoding="utf-8")
    (folder / LAYOUT).write_text((here / "layout.py").read_text(encoding="utf-8"), encoding="utf-8")
