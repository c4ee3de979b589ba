"""The catalogue: published methods, the building blocks they are made of and where these are here.

One row per method in ``methods.csv``. An entry point is a name below ``fastpo`` with the arguments
it is called with, by the names of its own parameters; several together make the method. A row
without entry points is not built yet, or lies outside the library's purpose, as its status and note
say. :func:`describe` prints a row as Python that runs once its inputs are there.

>>> import fastpo.methods
>>> row = fastpo.methods.find("sppo")
>>> row.year, row.arxiv, row.status
(2024, '2405.00675', 'confirmed')
>>> [entry.name for entry in row.entry_points][0]
'losses.sppo'
>>> "wpo" in {row.key for row in fastpo.methods.select(needs="full vocabulary")}
True
"""

from __future__ import annotations

import ast
import csv
import importlib
import inspect
import operator
import re
import textwrap
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

STATUSES = {
    "confirmed": "the formula was read in the authors' or a maintained code, or in the paper",
    "experimental": "the formula, or a part that the note names, is second-hand or derived",
    "outside": "nothing to compute here",
}


class EntryPoint(NamedTuple):
    """A callable of fastpo and how a method calls it.

    Attributes:
        name: dotted, below ``fastpo``, such as ``losses.dpo``.
        arguments: inputs given by position, by the names of their parameters.
        named: inputs given by keyword, the parameter first. The input has another name where two
            calls of a method give different things to parameters of one name.
        options: settings that make it this method.
    """

    name: str
    arguments: tuple[str, ...]
    named: dict[str, str]
    options: dict[str, Any]

    def load(self) -> Callable:
        """Import it.

        Raises:
            ImportError, AttributeError: it does not exist.
        """
        return _load(self.name)

    def inputs(self) -> dict[str, str]:
        """What is to be there before the call, and what it is: the parameter's own description."""
        given = {name: name for name in self.arguments} | {v: k for k, v in self.named.items()}
        try:
            described = _descriptions(self.name)
        except ImportError as error:  # a recipe where only torch is installed
            return dict.fromkeys(given, f"described once fastpo[train] is installed: {error}.")
        return {name: described[parameter] for name, parameter in given.items()}

    def __str__(self) -> str:
        named = (f"{name}={value}" for name, value in self.named.items())
        options = (f"{name}={value!r}" for name, value in self.options.items())
        return f"fastpo.{self.name}({', '.join((*self.arguments, *named, *options))})"


class Method(NamedTuple):
    """A published method.

    Attributes:
        key: short name.
        title: of the paper.
        year: of the first version.
        arxiv: its number there, empty if it has none known to us.
        blocks: what it is made of.
        needs: what it needs beside a policy: pairs, reference, scores, groups, full vocabulary ...
        entry_points: where it is in fastpo; empty if it is not.
        spec: family and part of the formulas: pairwise, online, group or diffusion.
        status: a key of ``STATUSES``.
        note: what a user should know, one sentence.
    """

    key: str
    title: str
    year: int
    arxiv: str
    blocks: tuple[str, ...]
    needs: tuple[str, ...]
    entry_points: tuple[EntryPoint, ...]
    spec: str
    status: str
    note: str


def _descriptions(name: str) -> dict[str, str]:
    """What a docstring says of each argument, in one line; it may point at another function's."""
    text = inspect.getdoc(_load(name)) or ""
    section = text.partition("Args:\n")[2].partition("\n\n")[0]
    items = re.findall(r"^    (\w[\w*, \n]*?): (.*(?:\n {5,}.*)*)", section, re.MULTILINE)
    found = {
        name.strip(): " ".join(meaning.split())
        for names, meaning in items
        for name in names.split(",")
    }
    for other in re.findall(r"those of\s+:(?:func|class):`(?:fastpo\.)?([\w.]+)`", text):
        beside = f"{name.rpartition('.')[0]}.{other}"
        found = _descriptions(other if "." in other else beside.strip(".")) | found
    return found


def _load(name: str) -> Callable:
    """What stands below ``fastpo`` under a dotted name."""
    return operator.attrgetter(name)(importlib.import_module("fastpo"))


def _entry_point(text: str) -> EntryPoint:
    call = ast.parse(text.strip(), mode="eval").body
    named, options = {}, {}
    for keyword in call.keywords:
        if isinstance(keyword.value, ast.Name):
            named[keyword.arg] = keyword.value.id
        else:
            options[keyword.arg] = ast.literal_eval(keyword.value)
    return EntryPoint(ast.unparse(call.func), tuple(map(ast.unparse, call.args)), named, options)


def _list(text: str, separator: str = ",") -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(separator) if part.strip())


@cache
def rows() -> tuple[Method, ...]:
    """All methods, in the order of the catalogue.

    Example:
        >>> rows()[0].key
        'tango2'
    """
    found = []
    with (Path(__file__).parent / "methods.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            row["year"] = int(row["year"])
            row["blocks"], row["needs"] = _list(row["blocks"]), _list(row["needs"])
            row["entry_points"] = tuple(map(_entry_point, _list(row["entry_points"], ";")))
            found.append(Method(**row))
    return tuple(found)


def find(key: str) -> Method:
    """The method of that key.

    Raises:
        ValueError: there is none; the message has the nearest keys.

    Example:
        >>> find("dpo").arxiv
        '2305.18290'
    """
    for row in rows():
        if row.key == key:
            return row
    import difflib

    near = difflib.get_close_matches(key, [row.key for row in rows()]) or ["none is near"]
    raise ValueError(
        f"fastpo.methods.find: key: expected a key of the catalogue, got {key!r}. "
        f"Nearest: {', '.join(near)}."
    )


def select(
    block: str | None = None,
    needs: str | None = None,
    status: str | None = None,
    family: str | None = None,
    built: bool | None = None,
) -> Iterator[Method]:
    """Methods that have all that is asked for.

    Args:
        block: text in one of the building blocks, such as ``pair`` or ``token``.
        needs: text in one of the needs, such as ``reference`` or ``full vocabulary``.
        status: ``confirmed``, ``experimental`` or ``outside``.
        family: ``pairwise``, ``online``, ``group`` or ``diffusion``.
        built: whether there are entry points.

    Example:
        >>> next(select(block="outer loop", needs="win rates")).key
        'dno'
    """
    for row in rows():
        if block is not None and not any(block in name for name in row.blocks):
            continue
        if needs is not None and not any(needs in name for name in row.needs):
            continue
        if status is not None and row.status != status:
            continue
        if family is not None and row.spec.split()[0] != family:
            continue
        if built is not None and bool(row.entry_points) != built:
            continue
        yield row


def markdown(methods: Iterator[Method]) -> str:
    """The table of the README."""
    lines = ["| key | method | status | needs | in fastpo |", "|---|---|---|---|---|"]
    for row in methods:
        title = re.sub(r"[:.] .*|\s--\s.*", "", row.title) if len(row.title) > 60 else row.title
        where = f"{title}, {row.year}"
        if row.arxiv:
            where += f", [{row.arxiv}](https://arxiv.org/abs/{row.arxiv})"
        names = dict.fromkeys(f"`{entry.name}`" for entry in row.entry_points)
        found = ", ".join(names) or ("-" if row.status == "outside" else "not yet")
        lines.append(f"| `{row.key}` | {where} | {row.status} | {', '.join(row.needs)} | {found} |")
    return "\n".join(lines) + "\n"


def describe(row: Method) -> str:
    """One method as Python text: what it is and what to supply as comments, then its calls.

    Pasted as it stands after the inputs that it names have been defined, it runs.

    Example:
        >>> *about, call = describe(find("robust_dpo")).splitlines()
        >>> about[0]
        '# robust_dpo: Provably Robust DPO: Aligning Language Models with Noisy Feedback (2024)'
        >>> call
        'fastpo.losses.robust(policy_chosen, policy_rejected, ref_chosen, ref_rejected)'
    """
    facts = {
        "arXiv": row.arxiv or "unknown",
        "blocks": ", ".join(row.blocks),
        "needs": ", ".join(row.needs) or "a policy",
        "status": f"{row.status}: {STATUSES[row.status]}",
        "note": row.note,
    }
    wrap = partial(textwrap.wrap, width=100, break_long_words=False, break_on_hyphens=False)
    lines = [f"# {row.key}: {row.title} ({row.year})"]
    for name, text in facts.items():
        if text:
            lines += wrap(text, initial_indent=f"# {name:8}", subsequent_indent="#" + 9 * " ")
    if not row.entry_points:
        return "\n".join(lines)
    inputs = {}
    for entry in row.entry_points:
        inputs |= {name: text for name, text in entry.inputs().items() if name not in inputs}
    lines += ["#", "# You supply:"] if inputs else []
    for name, text in inputs.items():
        lines += wrap(f"{name}: {text}", initial_indent="#   ", subsequent_indent="#     ")
    lines += ["", "import fastpo", ""]
    for entry in row.entry_points:
        lines += wrap(str(entry), subsequent_indent="    ")
    return "\n".join(lines)
