"""English-German pairs out of unpacked packages, and what makes a pair good enough to train on."""

from __future__ import annotations

import html
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path

TextPair = tuple[str, str]
Block = tuple[str, str, str]  # tag, id, text

# --- documents: HTML that was translated paragraph by paragraph ------------------------------------------------------

BLOCK_TAGS = frozenset(
    [
        "blockquote",
        "body",
        "caption",
        "dd",
        "div",
        "dl",
        "dt",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "h6",
        "li",
        "ol",
        "p",
        "section",
        "table",
        "td",
        "th",
        "tr",
        "ul",
    ]
)
UNREAD_TAGS = frozenset(("footer", "head", "pre", "script", "style"))


class _Blocks(HTMLParser):
    """Collects the text between one tag of BLOCK_TAGS and the next."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks: list[Block] = []
        self._tag = self._id = self._text = ""
        self._unread = 0

    def flush(self, tag: str, identifier: str) -> None:
        if text := " ".join(self._text.split()):
            self.blocks.append((self._tag, self._id, text))
        self._tag, self._id, self._text = tag, identifier, ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._unread += tag in UNREAD_TAGS
        if tag in BLOCK_TAGS:
            self.flush(tag, dict(attrs).get("id") or "")

    def handle_endtag(self, tag: str) -> None:
        self._unread -= tag in UNREAD_TAGS
        if tag in BLOCK_TAGS:
            self.flush(tag, "")

    def handle_data(self, data: str) -> None:
        if not self._unread:
            self._text += data


def blocks(text: str) -> list[Block]:
    """The pieces of text of an HTML page, each with the tag that it follows and that tag's id."""
    parser = _Blocks()
    parser.feed(text)
    parser.close()
    parser.flush("", "")
    return parser.blocks


def without_variants(text: str) -> str:
    """`text` without what LibreOffice's help shows on one system or in one program only, beside the usual words."""
    return re.sub(r'<span [^>]*class="[A-Z]+">(?:<span[^>]*>[^<]*</span>|[^<])*</span>', "", text)


def documents(folder: Path) -> dict[str, Path]:
    """The HTML files below `folder`, under names that are the same for both languages."""
    paths = sorted(path for path in folder.rglob("*.html") if path.is_file())
    return {re.sub(r"[./-](en-US|en|de)(?=[./])", "", path.relative_to(folder).as_posix()): path for path in paths}


def document_pairs(english: Path, german: Path) -> Iterator[TextPair]:
    """Text at the same place of two documents; a document whose structure differs is left out as a whole."""
    translations = documents(german)
    for name, path in documents(english).items():
        if name in translations:
            en, de = (blocks(without_variants(p.read_text("utf-8", "replace"))) for p in (path, translations[name]))
            if [block[:2] for block in en] == [block[:2] for block in de]:
                yield from ((a, b) for (_, _, a), (_, _, b) in zip(en, de, strict=True))


# --- package descriptions --------------------------------------------------------------------------------------------


def descriptions(text: str, language: str) -> dict[str, list[str]]:
    """The paragraphs of each description in one of apt's Translation files, under the MD5 of the English original."""
    found: dict[str, list[str]] = {}
    for entry in text.split("\n\n"):
        match = re.search(rf"^Description-md5: (\w+)\nDescription-{language}: *(.+)((?:\n .*)*)", entry, re.M)
        if match:
            # A line " ." ends a paragraph; a line that starts with a bullet begins one.
            body = re.sub(r"\n +[-*+o•] +", "\n .\n ", match[3])
            found[match[1]] = [match[2], *(" ".join(part.split()) for part in re.split(r"\n +\.(?=\n|$)", body))]
    return found


def description_pairs(english: Iterable[Path], german: Iterable[Path]) -> Iterator[TextPair]:
    """Paragraphs of the descriptions that have as many of them in both languages."""
    en: dict[str, list[str]] = {}
    de: dict[str, list[str]] = {}
    for found, language, paths in ((en, "en", english), (de, "de", german)):
        for path in paths:
            found |= descriptions(path.read_text("utf-8", "replace"), language)
    for key, paragraphs in en.items():
        if len(paragraphs) == len(de.get(key, ())):
            yield from zip(paragraphs, de[key], strict=True)


# --- language packs of Visual Studio Code ----------------------------------------------------------------------------

# The pseudo-language "qps-ploc" is the English text in these letters.
PSEUDO = str.maketrans("ÆßÇÐËÏ£ÑØ§ÜÝæþçðëïñøµÿ", "ABCDEILNOSUYabcdeinouy")


def messages(pack: Path) -> dict[str, str]:
    """Every message of an unpacked language pack, under its file and its place in it."""
    found: dict[str, str] = {}

    def add(key: str, value: object) -> None:
        if isinstance(value, str):
            found[key] = value
        elif isinstance(value, dict | list):
            for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
                add(f"{key}\n{name}", inner)

    for path in sorted(pack.rglob("*.i18n.json")):
        add(path.name, json.loads(path.read_text("utf-8")).get("contents"))
    for path in sorted(pack.rglob("*.i18n.json.js")):
        text = path.read_text("utf-8")
        array = re.sub(r"^\s*undefined(?=,|$)", "null", text[text.index("[") + 1 : text.rindex("]")], flags=re.M)
        add(path.name, json.loads(f"[{array.rstrip().rstrip(',')}]"))
    return found


def message_pairs(pseudo: Path, german: Path) -> Iterator[TextPair]:
    """Messages that both packs have; the English is that of the pseudo-language with its accents undone."""
    translations = messages(german)
    for key, text in messages(pseudo).items():
        if key in translations:
            yield text.translate(PSEUDO), translations[key]


# --- cleaning --------------------------------------------------------------------------------------------------------

MIN_WORDS, MAX_WORDS = 4, 40
# Code, placeholders, markup, paths and addresses: a pair with one of them on either side is dropped.
NOT_PROSE = re.compile(
    r"[<>{}\[\]|\\=^~#$@`_*]|%[\d$]*[a-z]|://|www\.|\.\.\.\w|(?:^|\s)-{1,2}\w|(?:^|[\s(])/\w|\w/\w+/"
)
# Words of one language that the other does not have: text that was left untranslated, wholly or in part.
ENGLISH_ONLY = frozenset(["the", "and", "of", "with", "this", "from", "for", "are", "by", "which"])
GERMAN_ONLY = frozenset(["und", "der", "das", "nicht", "ist", "wird", "mit", "für", "eine", "oder"])
# A full stop, question or exclamation mark before a capital; not after one letter, a digit or an abbreviation.
SENTENCE_END = re.compile(
    r"(?<!\b\w\.)(?<!\d\.)(?<!\betc\.)(?<!\bbzw\.)(?<!\busw\.)(?<!\bggf\.)(?<!\bevtl\.)(?<!\binkl\.)(?<!\bca\.)"
    r"(?<!\bvs\.)(?<!\bNr\.)(?<!\bDr\.)(?<=[.!?])\s+(?=[\"„“(]?[A-ZÄÖÜ])"
)


def cleaned(text: str) -> str:
    """`text` as NFC without tags, entities, accelerators, invisible characters, section numbers and link marks."""
    text = html.unescape(re.sub(r"</?[A-Za-z][^<>]*>", " ", text))
    text = unicodedata.normalize("NFC", text)
    text = "".join(" " if c.isspace() else c for c in text if c.isspace() or unicodedata.category(c)[0] != "C")
    text = re.sub(r"\s*\(&&?\w\)|&&?(?=\w)|\s*[¶]", "", text)
    text = re.sub(r"^\s*(?:[-•*+]|(?:[A-Z]\.)?(?:\d+\.)+\d*)\s+", "", text)
    return " ".join(text.split())


def sentences(english: str, german: str) -> list[TextPair]:
    """The sentences of a cleaned paragraph, where both languages have as many; else the paragraph."""
    en, de = SENTENCE_END.split(english), SENTENCE_END.split(german)
    return list(zip(en, de, strict=True)) if len(en) == len(de) else [(english, german)]


def is_good(english: str, german: str) -> bool:
    """Whether two cleaned texts look like a sentence of prose and its translation."""
    en, de = english.split(), german.split()
    if not (MIN_WORDS <= len(en) <= MAX_WORDS and len(de) <= MAX_WORDS and 0.6 <= len(german) / len(english) <= 2.2):
        return False
    if NOT_PROSE.search(english) or NOT_PROSE.search(german) or english.isupper():
        return False
    if sorted(re.findall(r"\d+", english)) != sorted(re.findall(r"\d+", german)):
        return False
    if min(sum(c.isalpha() or c == " " for c in text) / len(text) for text in (english, german)) < 0.85:
        return False
    en_words, de_words = (set(re.findall(r"\w+", text.lower())) for text in (english, german))
    return not (en_words & GERMAN_ONLY or de_words & ENGLISH_ONLY or len(en_words & de_words) > 0.6 * len(en_words))


def good_pairs(raw: Iterable[TextPair]) -> Iterator[TextPair]:
    """The good pairs of sentences in pairs of paragraphs as they stand in the packages."""
    for english, german in raw:
        for en, de in sentences(cleaned(english), cleaned(german)):
            if is_good(en, de):
                yield en, de
