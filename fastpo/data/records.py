"""Rows of training data from a JSONL file, a ``datasets`` folder or a hub name, each checked."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

from fastpo.data.errors import DataError

PAIR_FIELDS = ("prompt", "chosen", "rejected")
COMPLETION_FIELDS = ("prompt", "completion")


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers, from 1, and objects of a JSONL file; blank lines are skipped.

    The file is gzipped if its name ends in ``.gz``.

    Raises:
        DataError: a line is not a JSON object, or the file is damaged or not UTF-8.
    """
    opened = gzip.open if str(path).endswith(".gz") else open
    number = 0
    try:
        with opened(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, _parse(path, number, line)
    except (EOFError, gzip.BadGzipFile, UnicodeDecodeError) as error:
        after = f"{path}, after line {number}"
        raise DataError(f"{after}: the file cannot be read on ({error}); copy it again.") from error


def _parse(path: str | Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        where = f"{path}, line {number}, column {error.colno}"
        raise DataError(f"{where}: not JSON ({error.msg}): {line.strip()[:80]!r}") from error
    if not isinstance(row, dict):
        kind = type(row).__name__
        raise DataError(f"{path}, line {number}: expected a JSON object, got a {kind}.")
    return row


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
        for message in value
    )


def check_row(row: dict[str, Any], fields: Sequence[str], where: str) -> str:
    """Whether the fields of a row are ``text`` or ``chat``.

    Raises:
        DataError: a field is missing, of another type, or the two kinds are mixed.

    Example:
        >>> check_row({"prompt": "1 +", "completion": " 1"}, COMPLETION_FIELDS, "a.jsonl, line 1")
        'text'
    """
    kinds = {}
    for field in fields:
        if row.get(field) is None:
            found = ", ".join(map(repr, row)) or "none"
            raise DataError(f"{where}: field {field!r} is missing; the fields found are {found}.")
        value = row[field]
        kinds[field] = "text" if isinstance(value, str) else "chat" if _is_chat(value) else ""
        if not kinds[field]:
            expected = "a string or a list of {role, content} messages"
            raise DataError(f"{where}: field {field!r}: expected {expected}, got {value!r:.80}.")
    if len(set(kinds.values())) > 1:
        raise DataError(f"{where}: text and messages are mixed ({kinds}); use one for all fields.")
    return kinds[fields[0]]


def load_rows(
    source: str, fields: Sequence[str], split: str = "train", limit: int | None = None
) -> Dataset:
    """Load and check rows: columns ``fields``, and ``row``, the line number or index in the source.

    Args:
        source: a ``.jsonl`` or ``.jsonl.gz`` file, a folder written by ``save_to_disk``, or what
            ``datasets.load_dataset`` takes (a hub name, a folder of data files).
        fields: columns that every row must have, all text or all chat messages.
        split: which split of a folder or hub dataset.
        limit: the first so many rows only.

    Raises:
        DataError: the source is missing or empty, or a row does not fit.
    """
    path = Path(source)
    if path.is_file():
        named = ((f"{source}, line {number}", number, row) for number, row in read_jsonl(path))
    else:
        dataset = _load_dataset(source, fields, split)
        named = ((f"{source}[{split}], row {i}", i, row) for i, row in enumerate(dataset))
    rows, kind, first = [], None, ""
    for where, number, row in named:
        if limit is not None and len(rows) == limit:
            break
        found = check_row(row, fields, where)
        if kind not in (None, found):
            raise DataError(f"{where}: {found}, but {first} is {kind}; use one kind per file.")
        kind, first = found, first or where
        rows.append({field: row[field] for field in fields} | {"row": number})
    if not rows:
        raise DataError(f"{source}: no rows.")
    return Dataset.from_list(rows)


def _load_dataset(source: str, fields: Sequence[str], split: str) -> Dataset:
    path = Path(source)
    if not path.exists() and (source.endswith((".jsonl", ".gz", ".json")) or path.is_absolute()):
        raise DataError(f"{source}: no such file or folder.")
    saved = any((path / name).exists() for name in ("dataset_info.json", "dataset_dict.json"))
    dataset = load_from_disk(source) if saved else load_dataset(source, split=split)
    if isinstance(dataset, DatasetDict):
        if split not in dataset:
            raise DataError(f"{source}: no split {split!r}; there are {', '.join(dataset)}.")
        dataset = dataset[split]
    missing = [field for field in fields if field not in dataset.column_names]
    if missing:
        columns = ", ".join(dataset.column_names)
        raise DataError(
            f"{source}[{split}]: column {missing[0]!r} is missing; there are {columns}."
        )
    return dataset.select_columns(list(fields))


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
        groups.setdefault(json.dumps(prompt or i), []).append(i)
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
