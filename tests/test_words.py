"""The words of docstrings and comments: conditions say if or when, sentences have nouns in place of pronouns."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [
    path
    for folder in ("passes", "runtime", "qcompiler")
    for path in (ROOT / folder).rglob("*.py")
    if path.relative_to(ROOT).parts[:2] not in {("qcompiler", "passes"), ("qcompiler", "runtime")}
]
#: words → how many of 1,000 may be so; good manuals stay far below
LIMITS = {"what": 3, "where": 1, "it|its|they|them|their": 18, "(?:that|those) of": 1}


def read_prose(source: str) -> str:
    """Docstrings and comments in lower case, without code in backquotes."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docs = [ast.get_docstring(node) or "" for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = [token.string for token in tokens if token.type == tokenize.COMMENT]
    return re.sub(r"`[^`]*`", "", "\n".join(docs + comments).lower())


def count_words(text: str, words: str) -> int:
    return len(re.findall(rf"\b(?:{words})\b", text))


@pytest.mark.parametrize("words", LIMITS)
def test_the_words_of_the_sources(words):
    text = "\n".join(read_prose(path.read_text(encoding="utf-8")) for path in SOURCES)
    assert len(SOURCES) > 150
    assert 1000 * count_words(text, words) <= LIMITS[words] * count_words(text, r"[a-z']+")


def test_the_check_can_fail():
    source = '"""What it says, `what`."""\nx = "where"  # those of it\ndef f():\n    """It."""\n'
    assert [count_words(read_prose(source), words) for words in LIMITS] == [1, 0, 3, 1]
