# SPDX-License-Identifier: LGPL-2.1-or-later
"""One word for one thing: docs/glossary.md explains each word, and none that it excludes is used."""

import ast
import functools
import io
import re
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from upgrader.protocol.parameters import Mode
from upgrader.systemd.fdstore import Stored

ROOT = Path(__file__).resolve().parents[2]
GLOSSARY = (ROOT / "docs" / "glossary.md").read_text()
SOURCES = sorted((ROOT / "upgrader").rglob("*.py"))
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *(page for page in sorted((ROOT / "docs").glob("*.md")) if page.name != "glossary.md"),
]
TERMS = dict(re.findall(r"^- \*\*(.+?)\*\*: (.*)$", GLOSSARY, re.MULTILINE))
EXCLUDED = {
    word: instead
    for words, instead in re.findall(r"^\| (\w[\w, ]*) \| (\w.*) \|$", GLOSSARY, re.MULTILINE)
    for word in words.split(", ")
    if word != "not this"
}
#: Names that others have given to things of theirs.
FOREIGN = re.compile(r"(service|package|context) managers?|saxutils", re.IGNORECASE)
#: Files that speak of another library's own name for a thing, or of the name in an older interface.
ELSEWHERE = {
    "payload": {"upgrader/integrations/aiohttp.py"},
    "rehearsal": {"upgrader/protocol/varlink_types.py"},
}


def named(path: Path) -> Iterator[str]:
    """Every name that a file gives, every docstring and every comment."""
    text = path.read_text()
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield name
            case ast.ClassDef(name=name):
                yield name
            case ast.arg(arg=name) | ast.Name(id=name, ctx=ast.Store()):
                yield name
            case ast.Attribute(attr=name, ctx=ast.Store()):
                yield name
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.string


def words(text: str) -> Iterator[str]:
    """The words of a text or a name, lower-case: `_SomeHelper` has two."""
    for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", FOREIGN.sub("", text)):
        yield word.lower()


@functools.cache
def used() -> dict[str, set[str]]:
    """Which excluded word, also in the plural, is used in which file."""
    found: dict[str, set[str]] = {}
    for path in [*SOURCES, *PAGES]:
        texts = named(path) if path.suffix == ".py" else [path.read_text()]
        name = path.relative_to(ROOT)
        for word in {*words(str(name)), *(word for text in texts for word in words(text))}:
            singular = word if word in EXCLUDED else word.removesuffix("s")
            if singular in EXCLUDED:
                found.setdefault(singular, set()).add(str(name))
    return found


def test_each_word_is_one_sentence() -> None:
    """The list is sorted, and each word is explained by one sentence."""
    assert sorted(TERMS, key=str.lower) == list(TERMS)
    assert len(TERMS) == GLOSSARY.count("\n- ")
    for term, text in TERMS.items():
        assert text.endswith("."), term
        assert ". " not in text, term


@pytest.mark.parametrize("term", TERMS)
def test_a_word_of_the_glossary_is_used(term: str) -> None:
    """What is explained occurs in the code or on another page."""
    pattern = re.compile(rf"\b{re.escape(term)}", re.IGNORECASE)

    assert any(pattern.search(path.read_text()) for path in [*SOURCES, *PAGES])


@pytest.mark.parametrize("word", sorted({*Mode, *Stored}))
def test_what_an_admin_reads_is_explained(word: str) -> None:
    """The modes, and what stands in the names of the FD store, are in the glossary."""
    assert word in TERMS


def test_a_word_in_bold_is_explained() -> None:
    """Pages introduce a word of the product in bold, and the glossary has it."""
    bold = {word for page in PAGES for word in re.findall(r"\*\*(\w+)\*\*", page.read_text())} - {
        "TLS"
    }

    assert {"hold", "takeover"} <= bold <= TERMS.keys() | {word.capitalize() for word in TERMS}


def test_excluded_words_are_not_used() -> None:
    """No name, docstring, comment or page has one."""
    found = {
        word: left for word, files in used().items() if (left := files - ELSEWHERE.get(word, set()))
    }

    assert found == {}, {word: EXCLUDED[word] for word in found}


def test_the_exceptions_are_needed() -> None:
    """A word that is gone is no exception any more."""
    found = used()

    assert {"payload", "door"} <= EXCLUDED.keys()
    for word, files in ELSEWHERE.items():
        assert files <= found[word]


def test_a_class_name_means_one_thing() -> None:
    """No two classes of the product have the same name."""
    names = Counter(
        node.name
        for path in (ROOT / "upgrader").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
    )

    assert [] == [name for name, times in names.items() if times > 1]


def stem(module: str) -> str:
    """A module's name without the suffix that makes another word of it."""
    return re.sub(r"(ing|ed|er|e|s|ion|ions)$", "", module)


@pytest.mark.parametrize("folder", sorted({source.parent for source in SOURCES}), ids=str)
def test_no_module_differs_by_a_suffix(folder: Path) -> None:
    """Who looks for `loading` must not find `load`, `loader` and `loaded`."""
    stems = Counter(stem(source.stem) for source in folder.glob("*.py"))

    assert not [each for each, count in stems.items() if count > 1]
