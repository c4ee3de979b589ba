"""Rows of training data from a file, a folder or a hub name, each converted and checked."""

from __future__ import annotations

import gzip
import itertools
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import (
    Dataset,
    DatasetDict,
    Features,
    IterableDatasetDict,
    Value,
    load_dataset,
    load_from_disk,
)
from datasets import Sequence as ListOf
from datasets.exceptions import DatasetGenerationError

from fastpo.data.errors import DataError
from fastpo.data.formats import (
    COMPLETION_FIELDS,
    PAIR_FIELDS,
    TEMPLATE_COLUMNS,
    check_row,
    convert,
    number_of,
)

__all__ = [
    "COMPLETION_FIELDS", "PAIR_FIELDS", "DataError", "check_row", "iterate_rows", "load_rows",
    "read_jsonl", "split_by_prompt",
]  # fmt: skip

# Builders of `datasets` by the end of a file's name. JSON is not among them: theirs gives all rows
# one type, which fills the arguments of tool calls with nulls and makes dates of some texts.
_BUILDERS = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
_JSON = (".jsonl", ".json")
_NOTHING = (None, "", [], {})


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers, from 1, and objects of a JSONL file; blank lines are skipped.

    The file is gzipped if its name ends in ``.gz``. One that begins with ``[`` is a JSON array,
    whose rows are counted from 1.

    Raises:
        DataError: a line is not a JSON object, or the file is damaged or not UTF-8.
    """
    return ((number, row) for _, number, row in _json_rows(path))


def _json_rows(path: str | Path) -> Iterator[tuple[str, int, dict[str, Any]]]:
    opened = gzip.open if str(path).endswith(".gz") else open
    number = 0
    try:
        with opened(path, "rt", encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                where = f"{path}, line {number}"
                if number == 1 and line.startswith("["):
                    rows = _parse(str(path), line + lines.read())
                    for i, row in enumerate(rows, 1):
                        yield f"{path}, row {i}", i, _object(f"{path}, row {i}", row)
                    return
                if line.strip():
                    yield where, number, _object(where, _parse(where, line))
    except (EOFError, gzip.BadGzipFile, UnicodeDecodeError) as error:
        after = f"{path}, after line {number}"
        raise DataError(f"{after}: the file cannot be read on ({error}); copy it again.") from error


def _parse(where: str, text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=lambda pairs: _object_of(where, pairs))
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if error.lineno > 1 else ""
        place = f"{where}{line}, column {error.colno}"
        got = error.doc[error.doc.rfind("\n", 0, error.pos) + 1 :].strip()[:80]
        raise DataError(f"{place}: not JSON ({error.msg}): {got!r}") from error


def _object_of(where: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        name = next(name for name in found if names.count(name) > 1)
        raise DataError(f"{where}: {name!r} is given twice. Take one of them out.")
    return found


def _object(where: str, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object, got a {type(row).__name__}.")
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        problem = f"half a character, {error.object[error.start]!a}, which is no text"
        raise DataError(f"{where}: holds {problem}. Take the row out, or mend it.") from error
    return row


def _open(source: str, split: str | None, subset: str | None, streaming: bool) -> Any:
    """A JSON file as its path; what ``datasets`` reads as its (streamed) data set."""
    path = Path(source)
    if not path.is_file():
        return _open_dataset(source, split or "train", subset, streaming)
    for name, value in (("split", split), ("subset", subset)):
        if value not in (None, "train" if name == "split" else None):
            raise DataError(f"{name}: {source} is one file, which has no {value!r}; leave it out.")
    suffix = Path(path.name.removesuffix(".gz")).suffix
    if suffix in _JSON:
        return path
    if suffix not in _BUILDERS:
        known = ", ".join((*_JSON, *_BUILDERS))
        raise DataError(f"{source}: expected a file of {known}, got {suffix or 'no'} ending.")
    options: dict[str, Any] = {}
    if _BUILDERS[suffix] == "csv":
        import pandas as pd

        # All columns as the text that they are: "NA" is an answer, "007" no number.
        options = {"sep": "\t" if suffix == ".tsv" else ",", "keep_default_na": False}
        names = _one_line(source, lambda: pd.read_csv(path, nrows=0, sep=options["sep"]).columns)
        options["features"] = Features({name: Value("string") for name in names})
    return _one_line(
        source,
        lambda: load_dataset(
            _BUILDERS[suffix], data_files=source, split="train", streaming=streaming, **options
        ),
    )


def _open_dataset(source: str, split: str, subset: str | None, streaming: bool) -> Any:
    path = Path(source)
    if not path.exists() and (path.suffix in (".gz", *_JSON, *_BUILDERS) or path.is_absolute()):
        raise DataError(f"{source}: no such file or folder.")
    if any((path / name).exists() for name in ("dataset_info.json", "dataset_dict.json")):
        if subset is not None:
            raise DataError(f"subset: {source} is a saved data set, which has none; leave it out.")
        dataset = _one_line(source, lambda: load_from_disk(source))
        if isinstance(dataset, (DatasetDict, IterableDatasetDict)):
            if split not in dataset:
                raise DataError(f"{source}: no split {split!r}; there are {', '.join(dataset)}.")
            dataset = dataset[split]
        return dataset.to_iterable_dataset() if streaming else dataset
    load = lambda: load_dataset(source, subset, split=split, streaming=streaming)
    return _one_line(source, load)


def _one_line(source: str, action) -> Any:
    """What an action of ``datasets`` gives; whatever it raises becomes one line.

    Raises:
        DataError: of the innermost cause.
    """
    try:
        return action()
    except Exception as error:
        cause: BaseException = error
        while isinstance(cause, DatasetGenerationError) and cause.__cause__:
            cause = cause.__cause__
        if isinstance(cause, DataError):
            raise cause from None
        text = " ".join(str(cause).split())
        raise DataError(f"{source}: cannot be read ({type(cause).__name__}: {text}).") from error


def _without_padding(value: Any) -> Any:
    """Messages and tools without the keys that only other rows have: a column has one type."""
    if isinstance(value, list):
        return [_without_padding(part) for part in value]
    if isinstance(value, dict):
        return {name: _without_padding(part) for name, part in value.items() if part is not None}
    return value


def _rows(
    opened: Any, source: str, columns: Mapping[str, str], limit: int | None
) -> Iterator[tuple[str, int, dict[str, Any]]]:
    if isinstance(opened, Path):
        named = _json_rows(opened)
    else:
        named = (
            (f"{source}, row {i}", i, {k: _without_padding(v) for k, v in row.items()})
            for i, row in enumerate(opened, 1)
        )
    wanted = dict.fromkeys(columns.values())
    found: dict[str, None] = {}
    for where, number, row in itertools.islice(named, limit):
        found |= dict.fromkeys(row)
        taken = [new for new in columns if new in row and new not in wanted]
        if taken:
            problem = f"{taken[0]}={columns[taken[0]]}, but the row has a {taken[0]!r} of its own"
            raise DataError(f"{where}: columns: {problem}; rename that one too.")
        moved = {new: row[old] for new, old in columns.items() if old in row}
        yield where, number, moved | {k: v for k, v in row.items() if k not in wanted}
    if not found:
        raise DataError(f"{source}: no rows.")
    missing = [name for name in wanted if name not in found]
    if missing:
        there = ", ".join(map(repr, found))
        raise DataError(f"{source}: columns: no row has {missing[0]!r}; there are {there}.")


def iterate_rows(
    source: str,
    split: str | None = None,
    *,
    subset: str | None = None,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    streaming: bool = False,
) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Rows as they are: file and line for messages, the number from 1, and the columns.

    Args:
        source: a file (``.jsonl`` and ``.json``, an array or objects; ``.csv``, ``.tsv``,
            ``.parquet``, ``.arrow``; each may end in ``.gz``), a folder written by
            ``save_to_disk``, or what ``datasets.load_dataset`` takes (a hub name, a folder of
            data files).
        split: which split of a folder or hub data set, ``train`` if not given.
        subset: which subset (configuration) of a hub data set.
        columns: new names of columns and those that they have.
        limit: the first so many rows only.
        streaming: read a hub data set row by row, without downloading all of it first.

    Raises:
        DataError: the source is missing or cannot be read, or there is no column of that name.
    """
    opened = _open(source, split, subset, streaming)
    return _rows(opened, source, columns or {}, limit)


def load_rows(
    source: str,
    fields: Sequence[str],
    split: str | None = None,
    limit: int | None = None,
    *,
    subset: str | None = None,
    columns: Mapping[str, str] | None = None,
    streaming: bool = False,
    numbers: Mapping[str, bool] | None = None,
) -> Dataset:
    """Rows of a source, converted to one form, in a data set that lies on disk.

    Args:
        source: as of :func:`iterate_rows`, like ``split``, ``limit``, ``subset``, ``columns`` and
            ``streaming``.
        fields: what every row must have or be converted to, all text or all chat messages
            (:func:`fastpo.data.formats.convert`).
        split: see ``source``.
        limit: see ``source``.
        subset: see ``source``.
        columns: see ``source``.
        streaming: see ``source``; the rows are then held in memory.
        numbers: columns of finite numbers that every row must have, and whether each is a list of
            them, as long in every row.

    Returns:
        The fields, as text, messages as JSON; ``kind``, text or chat; ``row``, the number in the
        source; ``template``, JSON of what the chat template takes beside the messages; the numbers;
        and ``unused``, the names of the other columns, separated by commas.

    Raises:
        DataError: the source is missing or empty, or a row does not fit.
    """
    numbers = dict(numbers or {})
    opened = _open(source, split, subset, streaming)
    text = Value("string")
    of_number = lambda is_list: ListOf(Value("float64")) if is_list else Value("float64")
    features = Features(
        {name: text for name in (*fields, "kind", "template", "unused")}
        | {"row": Value("int64")}
        | {name: of_number(is_list) for name, is_list in numbers.items()}
    )
    arguments = {
        "opened": opened, "source": source, "columns": dict(columns or {}), "limit": limit,
        "fields": tuple(fields), "numbers": numbers,
    }  # fmt: skip
    if streaming:
        return Dataset.from_list(list(_converted(**arguments)), features=features)
    # What the cache of the rows depends on, beside the arguments.
    stat = opened.stat() if isinstance(opened, Path) else None
    arguments["stamp"] = f"{stat.st_mtime_ns} {stat.st_size}" if stat else ""
    read = lambda: Dataset.from_generator(_converted, features=features, gen_kwargs=arguments)
    return _one_line(source, read)


def _converted(
    opened: Any,
    source: str,
    columns: Mapping[str, str],
    limit: int | None,
    fields: Sequence[str],
    numbers: Mapping[str, bool],
    stamp: str = "",
) -> Iterator[dict[str, Any]]:
    first: dict[str, Any] = {}
    for where, number, row in _rows(opened, source, columns, limit):
        found = convert(row, fields, where)
        kind = "text" if isinstance(found[fields[0]], str) else "chat"
        values = {name: _numbers(row, name, is_list, where) for name, is_list in numbers.items()}
        lengths = {name: len(values[name]) for name, is_list in numbers.items() if is_list}
        first = first or {"where": where, "kind": kind, "lengths": lengths}
        if kind != first["kind"]:
            problem = f"{where}: {kind}, but {first['where']} is {first['kind']}"
            raise DataError(f"{problem}; use one kind per file.")
        for name, length in lengths.items():
            if length != first["lengths"][name]:
                expected = f"expected {first['lengths'][name]} numbers as in {first['where']}"
                raise DataError(f"{where}: column {name!r}: {expected}, got {length}.")
        used = {*found.pop("used"), *numbers}
        unused = sorted(k for k, v in row.items() if k not in used and v not in _NOTHING)
        template = {name: found[name] for name in TEMPLATE_COLUMNS if name in found}
        yield values | {
            **{f: json.dumps(found[f]) if kind == "chat" else found[f] for f in fields},
            "row": number, "kind": kind, "template": json.dumps(template) if template else "",
            "unused": ",".join(unused),
        }  # fmt: skip


def _numbers(row: Mapping[str, Any], name: str, is_list: bool, where: str) -> Any:
    where, value = f"{where}: column {name!r}", row.get(name)
    if not is_list:
        return number_of(value, where)
    if not isinstance(value, list):
        raise DataError(f"{where}: expected a list of numbers, got {value!r:.80}.")
    return [number_of(part, where) for part in value]


def split_by_prompt(rows: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset | None]:
    """Hold out whole prompts, so that no prompt is seen both in training and in evaluation.

    Args:
        rows: with a column ``prompt``; rows of an empty prompt are held out one by one.
        share: of the rows to hold out, in [0, 1); 0 for none. At least one prompt is held out.
        seed: of the choice, which depends on nothing else than the rows.

    Returns:
        The rows to train on and the rows held out, both in their old order.
    """
    if share == 0:
        return rows, None
    groups: dict[str, list[int]] = {}
    for i, prompt in enumerate(rows["prompt"]):
        is_empty = prompt in ("", [], "[]")
        groups.setdefault(json.dumps(i if is_empty else prompt), []).append(i)
    prompts = sorted(groups)
    random.Random(seed).shuffle(prompts)
    held: list[int] = []
    while prompts and len(held) < max(1, share * len(rows)):
        held += groups[prompts.pop()]
    if not prompts:
        remedy = "Give more prompts, or a file of held-out rows by eval_data."
        raise DataError(
            f"holding out {share:g} of {len(rows)} rows leaves none to train on. {remedy}"
        )
    kept = sorted(i for prompt in prompts for i in groups[prompt])
    return rows.select(kept), rows.select(sorted(held))
