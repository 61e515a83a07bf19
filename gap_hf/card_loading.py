"""How a published model is loaded, by the form of its files: the one part of a model card that packing and unpacking change."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.models.auto import modeling_auto as auto

from gap_hf.folder_files import read_config
from gap_hf.packed.reader_files import AUTO_MAP

BEGIN, END = "<!-- gap_hf:loading -->", "<!-- gap_hf:loading end -->"
# Auto class, its models, and the Hub's name of what they are for where that is certain.
_AUTO: tuple[tuple[str, Mapping[Any, Any], str | None], ...] = (
    ("AutoModelForCausalLM", auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "text-generation"),
    ("AutoModelForSeq2SeqLM", auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, None),
    ("AutoModelForMaskedLM", auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, "fill-mask"),
    (
        "AutoModelForSequenceClassification",
        auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        "text-classification",
    ),
    ("AutoModelForTokenClassification", auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES, "token-classification"),
    ("AutoModelForQuestionAnswering", auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES, "question-answering"),
    ("AutoModelForImageClassification", auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, "image-classification"),
    ("AutoModelForObjectDetection", auto.MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES, "object-detection"),
    ("AutoModelForSpeechSeq2Seq", auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES, "automatic-speech-recognition"),
)


def auto_class(architecture: str | None, auto_map: Mapping[str, Any] | None = None) -> tuple[str, str | None]:
    """The Auto class that loads an architecture, and its pipeline tag where that is certain.

    Args:
        auto_map: Of its config, which says so for a model that carries code of its own.
    """
    own = next((name for name in own_code(auto_map) if name.startswith("AutoModel")), None)
    for name, models, tag in _AUTO:
        classes = (c for found in models.values() for c in (found if isinstance(found, list | tuple) else (found,)))
        if own == name or (own is None and architecture in classes):
            return name, tag
    return own or "AutoModel", None


def own_code(auto_map: Mapping[str, Any] | None) -> dict[str, Any]:
    """What of a config's auto_map is the model's own, and not the reader of the packed form."""
    return {key: value for key, value in (auto_map or {}).items() if AUTO_MAP.get(key) != value}


def loading(name: str, loader: str, *, packed: bool, own: bool = False) -> str:
    """The lines that load a model, between marks.

    Args:
        name: What `from_pretrained` is given.
        loader: The Auto class.
        own: True if the model carries code of its own.
    """
    load = f'model = {loader}.from_pretrained("{name}"'
    trusted = f"{load}, trust_remote_code=True)"
    code = f"from transformers import {loader}\n\n{trusted if own else load + ')'}"
    if packed and own:
        text = (
            "The files hold live weights only, and the network's code lies in this repository. gap_hf has to be installed.\n\n"
            f"```python\nimport gap_hf\n{code}\n```"
        )
    elif packed:
        text = (
            f"The files hold live weights only. With gap_hf installed:\n\n```python\nimport gap_hf\n{code}\n```\n\n"
            f"Without it, by the reader that lies in this repository:\n\n```python\nfrom transformers import {loader}\n\n{trusted}\n```\n\n"
            "Either gives the same weights to the bit, dense in memory."
        )
    else:
        what = "the network's code lies in this repository" if own else "gap_hf is not needed"
        text = f"The files are ordinary safetensors with zeros in them; {what}.\n\n```python\n{code}\n```"
    return f"{BEGIN}\n{text}\n{END}"


def change_form(folder: Path, *, packed: bool) -> None:
    """Have a folder's card say how the form that it now has is loaded, where the card was written by gap_hf."""
    path = folder / "README.md"
    if not path.is_file():
        return
    text = path.read_bytes().decode("utf-8", errors="surrogateescape")  # a card that is not ours stays to the byte
    before, begin, rest = text.partition(BEGIN)
    old, end, after = rest.partition(END)
    said = re.search(r'model = (\w+)\.from_pretrained\("([^"]*)"', old)
    if not (begin and end and said):
        return
    own = bool(own_code(read_config(folder).get("auto_map")))
    text = before + loading(said[2], said[1], packed=packed, own=own) + after
    part = folder / ".README.md.part"  # the card may be a link to another folder's
    part.write_bytes(text.encode("utf-8", errors="surrogateescape"))
    os.replace(part, path)
