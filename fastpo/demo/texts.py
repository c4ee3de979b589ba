"""A real text task out of what every Python carries: its language topics and its docstrings."""

from __future__ import annotations

import ast
import random
import re
import sysconfig
from pathlib import Path

PROMPT_WORDS = 32
CONTINUATION_WORDS = 16
STUTTERS = 2
_SKIPPED = ("site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data")
_LONGEST_FILE = 120_000


def _words(text: str) -> list[str]:
    """Words of a text without rulers and table borders."""
    return [word for word in text.split() if not re.fullmatch(r"[-=*~^+|_.#]{3,}", word)]


def _docstrings(path: Path) -> str:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return ""  # Samples of other encodings and of old syntax.
    found, pending = [], [tree]
    while pending:
        node = pending.pop()
        found.append(ast.get_docstring(node) or "")
        # Only bodies are entered, not expressions: several times faster than ast.walk.
        kinds = (ast.ClassDef, ast.FunctionDef)
        pending += [child for child in reversed(node.body) if isinstance(child, kinds)]
    return "\n\n".join(found)


def documents() -> dict[str, list[str]]:
    """Words of every document by name: the topics of ``pydoc`` and the modules of the library."""
    found = {}
    try:
        from pydoc_data.topics import topics
    except ImportError:
        topics = {}  # A few distributions leave it out; the docstrings are most of the text.
    for name, text in topics.items():
        found[f"topic {name}"] = _words(text)
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not set(relative.parts) & set(_SKIPPED) and path.stat().st_size < _LONGEST_FILE:
            found[relative.as_posix()] = _words(_docstrings(path))
    return {name: words for name, words in found.items() if len(words) > 2 * PROMPT_WORDS}


def passages(words: list[str]) -> list[tuple[str, str]]:
    """Prompts and their true continuations, one after the other, none overlapping."""
    step = PROMPT_WORDS + CONTINUATION_WORDS
    starts = range(0, len(words) - step + 1, step)
    return [
        (
            " ".join(words[i : i + PROMPT_WORDS]),
            " " + " ".join(words[i + PROMPT_WORDS : i + step]),
        )
        for i in starts
    ]


def stutter(text: str, generator: random.Random) -> str:
    """The text with a few of its words replaced by the word before: a repetition, as models make.

    >>> stutter(" one two three four", random.Random(1))
    ' one one three three'
    """
    words = text.split()
    for i in generator.sample(range(1, len(words)), STUTTERS):
        words[i] = words[i - 1]
    return " " + " ".join(words)


def task(seed: int = 0, held_share: float = 0.1) -> dict[str, list[dict[str, str]]]:
    """Rows to fit (``fit``), pairs to train on (``train``) and pairs of other documents (``held``).

    In a pair, the chosen completion is the true continuation and the rejected one its stutter.
    """
    texts = documents()
    names = sorted(texts)
    generator = random.Random(seed)
    generator.shuffle(names)
    rows: dict[str, list[dict[str, str]]] = {"fit": [], "train": [], "held": []}
    for i, name in enumerate(names):
        is_held = i < held_share * len(names)
        for prompt, chosen in passages(texts[name]):
            rejected = stutter(chosen, generator)
            pair = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
            if rejected != chosen:
                rows["held" if is_held else "train"].append(pair)
            if not is_held:
                rows["fit"].append({"prompt": "", "completion": prompt + chosen})
    for part in rows.values():
        generator.shuffle(part)
    return rows
