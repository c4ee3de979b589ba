"""Rows to token ids and batches: prompt, completion, end of sequence; truncation; padding."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
from datasets import Dataset
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from fastpo.data.errors import DataError
from fastpo.data.formats import COMPLETION_FIELDS, PAIR_FIELDS, check_row

IGNORED = -100


class TokenReport(NamedTuple):
    """What tokenisation did to the rows.

    Attributes:
        rows: number of rows that are left.
        cut_prompts: rows whose prompt lost tokens at its start.
        cut_completions: rows of which a completion lost tokens at its end, the end-of-sequence too.
        longest: tokens of the longest sequence after the cut.
        merged: rows whose prompt ends in other tokens before a completion than alone; these count
            as the completion's.
        identical: rows left out, as chosen and rejected are the same tokens.
        unused: names of what the rows give to a chat template that has no place for it.
    """

    rows: int
    cut_prompts: int
    cut_completions: int
    longest: int
    merged: int = 0
    identical: int = 0
    unused: tuple[str, ...] = ()

    @classmethod
    def of(cls, encoded: Mapping[str, Sequence[Any]], identical: int = 0) -> TokenReport:
        """Of columns of what :func:`encode_row` gives."""
        unused = {name for names in set(encoded["unused"]) for name in names.split(",") if name}
        flags = {
            "cut_prompts": "cut_prompt", "cut_completions": "cut_completion", "merged": "merged",
        }  # fmt: skip
        return cls(
            len(encoded["tokens"]), longest=max(encoded["tokens"]), identical=identical,
            unused=tuple(sorted(unused)), **{name: sum(encoded[f]) for name, f in flags.items()},
        )  # fmt: skip

    @property
    def changes(self) -> str:
        """What was cut, replaced and left out, for the person."""
        more = {
            "end of prompt tokenised with the completion in": self.merged,
            "left out as chosen equals rejected:": self.identical,
        }
        return (
            f"longest {self.longest} tokens, prompts cut in {self.cut_prompts}, completions cut in "
            f"{self.cut_completions}"
            + "".join(f", {text} {count}" for text, count in more.items() if count)
        )

    def __str__(self) -> str:
        """One line for the person."""
        return f"{self.rows} rows, {self.changes}"


def _plain_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text, with what the tokeniser adds, but not a second beginning-of-sequence."""
    ids, bos = tokenizer(text)["input_ids"], tokenizer.bos_token
    if bos and text.startswith(bos) and ids[:2] == [tokenizer.bos_token_id] * 2:
        return _plain_ids(tokenizer, text.removeprefix(bos))
    return ids


def _shared(ids: Sequence[int], others: Sequence[Sequence[int]]) -> int:
    """Leading tokens that ``ids`` has in common with all others."""
    for place, token in enumerate(ids):
        if any(place >= len(other) or other[place] != token for other in others):
            return place
    return len(ids)


def _encode_text(
    tokenizer: PreTrainedTokenizerBase, prompt: str, completions: Sequence[str]
) -> tuple[list[int], list[list[int]]]:
    """Ids of the prompt, and of the prompt with each completion and one end of sequence."""
    eos, end = tokenizer.eos_token or "", tokenizer.eos_token_id
    closing = "" if tokenizer.split_special_tokens else eos  # Text is then not read as a token.
    prompt_ids, wholes = _plain_ids(tokenizer, prompt), []
    if prompt_ids and prompt_ids[-1] == end and not prompt.endswith(eos):
        prompt_ids = prompt_ids[:-1]  # Some tokenisers close every text.
    for completion in completions:
        is_closed = eos and completion.endswith(eos)
        ids = _plain_ids(tokenizer, prompt + completion + ("" if is_closed else closing))
        least = _shared(prompt_ids, [ids]) + 1
        while len(ids) > least and ids[-2:] == [end] * 2:
            ids = ids[:-1]
        wholes.append(ids if end is None or ids[-1:] == [end] else [*ids, end])
    return prompt_ids, wholes


class _Chat:
    """The chat template of a tokenizer on one row."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, row: Mapping[str, Any]):
        self.tokenizer, self.where = tokenizer, f"row {row['row']}"
        more = row.get("chat_template_kwargs") or {}
        self.options = {"tools": row.get("tools") or None, **more}

    def check(self, prompt: list[dict[str, Any]], completion: list[Any], field: str) -> None:
        """Whether a completion answers the prompt, rather than begin with a turn of its own."""
        role = completion[0].get("role") if prompt and completion else None
        if role in ("user", "system"):
            remedy = "Give the messages that answer the prompt, without it."
            raise DataError(f"{self.where}: field {field!r} begins with a {role} message. {remedy}")

    def ids(self, messages: list[dict[str, Any]], **options: Any) -> list[int]:
        """Ids of a conversation; none of an empty one."""
        if not messages:
            return []
        options = {"tokenize": True, "return_dict": True, **self.options, **options}
        try:
            return self.tokenizer.apply_chat_template(messages, **options)["input_ids"]
        except Exception as error:
            if not self.tokenizer.chat_template:
                problem = "the rows are messages, and the tokenizer has no chat template"
                raise DataError(f"{self.where}: {problem}; give text, or another model.") from error
            text = " ".join(str(error).split())
            problem = f"the chat template fails on it ({type(error).__name__}: {text})"
            raise DataError(f"{self.where}: {problem}.") from error

    def unused(self) -> list[str]:
        """What is given to the template and not named in it."""
        given = [name for name, value in self.options.items() if value is not None]
        template = self.tokenizer.get_chat_template(tools=self.options["tools"]) if given else ""
        names = [name for name in given if not re.search(rf"\b{re.escape(name)}\b", template)]
        return [name if name == "tools" else f"chat_template_kwargs.{name}" for name in names]


def encode_row(
    row: Mapping[str, Any],
    fields: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> dict[str, Any]:
    """Token ids of one row, with the prompt shared by all its completions.

    Prompt and completion together are the tokens of the whole text, or of the whole conversation
    under the chat template. The completions begin where these differ from the tokens of the prompt
    alone, which may be before its end, where tokens merge. A text completion ends with one
    end-of-sequence token; a chat template writes its own end.

    If a sequence is above ``max_length``, the completions are cut first, each by itself, at its
    end: to what a prompt of up to half of ``max_length`` leaves them. Then a longer prompt loses
    its start, down to what the longest completion leaves it, at least that half; a
    beginning-of-sequence token is kept.

    Args:
        row: ``fields``, text or lists of messages, and ``row``, the number used in messages; of a
            chat also ``tools`` and ``chat_template_kwargs``, if it has any.
        fields: ``prompt`` and the completions.
        tokenizer: of the model.
        max_length: tokens of a sequence, prompt and completion, at least 2.

    Returns:
        ``<field>_ids`` per field; the booleans ``cut_prompt``, ``cut_completion``, ``merged``
        and ``identical`` (chosen and rejected are the same), and ``unused``, as of
        :class:`TokenReport`; ``tokens``, the length of the longest sequence.

    Raises:
        DataError: text and messages are mixed, a completion has no token to score, or the chat
            template fails.
    """
    prompt, completions = row[fields[0]], [row[field] for field in fields[1:]]
    unused = []
    if check_row(row, fields, f"row {row['row']}") == "text":
        prompt_ids, wholes = _encode_text(tokenizer, prompt, completions)
    else:
        chat = _Chat(tokenizer, row)
        for field, completion in zip(fields[1:], completions, strict=True):
            chat.check(prompt, completion, field)
        prompt_ids = chat.ids(prompt, add_generation_prompt=True)
        wholes = [chat.ids(prompt + completion) for completion in completions]
        unused = chat.unused()
    start = _shared(prompt_ids, wholes)
    merged, prompt_ids = start < len(prompt_ids), prompt_ids[:start]
    completions_ids = [ids[start:] for ids in wholes]
    for field, ids in zip(fields[1:], completions_ids, strict=True):
        if not ids or len(prompt_ids) + len(ids) < 2:
            problem = f"field {field!r} is empty and has no token to score"
            raise DataError(f"row {row['row']}: {problem}.")

    longest = max(map(len, completions_ids), default=0)
    half = -(-max_length // 2) if completions_ids else max_length
    keep = min(len(prompt_ids), max(half, max_length - longest))
    cut_prompt = keep < len(prompt_ids)
    if cut_prompt:
        has_bos = keep > 1 and prompt_ids[0] == tokenizer.bos_token_id
        head = prompt_ids[:1] if has_bos else []
        prompt_ids = head + prompt_ids[len(prompt_ids) - keep + len(head) :]
    room = max_length - keep
    encoded = {f"{fields[0]}_ids": prompt_ids}
    for field, ids in zip(fields[1:], completions_ids, strict=True):
        encoded[f"{field}_ids"] = ids[:room]
    chosen, rejected = (encoded.get(f"{field}_ids") for field in PAIR_FIELDS[1:])
    return encoded | {
        "cut_prompt": cut_prompt,
        "cut_completion": longest > room,
        "merged": merged,
        "identical": chosen is not None and chosen == rejected,
        "tokens": keep + min(longest, room),
        "unused": ",".join(unused),
    }


def _encode(
    row: dict[str, Any], fields: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> dict[str, Any]:
    """A row of :func:`fastpo.data.records.load_rows`, which holds messages as JSON."""
    if row.get("kind") == "chat":
        row = row | {field: json.loads(row[field]) for field in fields}
    if row.get("template"):
        row = row | json.loads(row["template"])
    return encode_row(row, fields, tokenizer, max_length)


def _is_number(feature: Any) -> bool:
    """Whether a column holds numbers, or lists of them."""
    dtype = getattr(getattr(feature, "feature", feature), "dtype", "")
    return dtype.startswith(("int", "uint", "float", "bool"))


def tokenize_rows(
    rows: Dataset,
    fields: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    num_proc: int | None = None,
) -> tuple[Dataset, TokenReport]:
    """Tokenise rows of :func:`fastpo.data.records.load_rows` by :func:`encode_row`.

    Pairs whose chosen and rejected tokens are the same are left out. The tokens are kept in the
    cache of ``datasets``, under what they depend on: the rows, the fields, the tokenizer with its
    chat template, ``max_length``, and this code.

    Args:
        rows: to tokenise.
        fields: ``prompt`` and the completions.
        tokenizer: of the model.
        max_length: tokens of a sequence, at least 2.
        num_proc: processes that share the work; None for this one alone.

    Returns:
        A dataset with ``<field>_ids`` per field, ``index`` (0, 1, ...) and the columns of numbers
        of ``rows``, such as ``row``; and the report.

    Raises:
        DataError: a row gives no tokens, all pairs are left out, or ``max_length`` is below 2.
    """
    if max_length < 2:
        raise DataError(f"max_length: expected at least 2 tokens, got {max_length}.")
    numbers = {name for name, feature in rows.features.items() if _is_number(feature)} - {*fields}
    code = hashlib.sha256(inspect.getsource(sys.modules[__name__]).encode()).hexdigest()
    parts = [rows._fingerprint, *fields, tokenizer, tokenizer.chat_template, max_length, code]
    fingerprint = Hasher.hash([Hasher.hash(part) for part in parts])
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "fastpo"
    folder.mkdir(parents=True, exist_ok=True)
    tokens = rows.map(
        _encode,
        fn_kwargs={"fields": fields, "tokenizer": tokenizer, "max_length": max_length},
        remove_columns=[name for name in rows.column_names if name not in numbers],
        num_proc=num_proc,
        new_fingerprint=fingerprint,
        cache_file_name=str(folder / f"{fingerprint}.arrow"),
        desc="Tokenising",
    )
    different = [i for i, same in enumerate(tokens["identical"]) if not same]
    if not different:
        problem = f"in all {len(tokens)} rows chosen and rejected are the same tokens"
        raise DataError(f"{problem}; raise max_length, or look at the data.")
    identical = len(tokens) - len(different)
    tokens = tokens.select(different) if identical else tokens
    report = TokenReport.of(tokens, identical)
    wanted = {f"{field}_ids" for field in fields} | numbers
    tokens = tokens.select_columns([name for name in tokens.column_names if name in wanted])
    return tokens.add_column("index", list(range(len(tokens)))), report


def _pad(sequences: list[list[int]], value: int) -> torch.Tensor:
    length = max(map(len, sequences))
    return torch.tensor([ids + [value] * (length - len(ids)) for ids in sequences])


def _batch(prompts: list[list[int]], completions: list[list[int]], pad_id: int) -> dict[str, Any]:
    pairs = list(zip(prompts, completions, strict=True))
    return {
        "input_ids": _pad([p + c for p, c in pairs], pad_id),
        "attention_mask": _pad([[1] * len(p + c) for p, c in pairs], 0),
        "labels": _pad([[IGNORED] * len(p) + c for p, c in pairs], IGNORED),
    }


@dataclass
class PairCollator:
    """Pads P pairs to a batch of 2 P rows: all chosen sequences, then all rejected ones.

    Keys: ``input_ids``, ``attention_mask`` and ``labels`` [2 P, T], labels -100 outside the
    completions; ``index``, ``row`` and every other column of numbers [P], or [P, J] of lists. Rows
    with ``extra_ids``, a further response to the prompt, give 3 P rows, these last.
    """

    pad_id: int

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """The batch of some rows of :func:`tokenize_rows`."""
        columns = [key for key in examples[0] if not key.endswith("_ids")]
        batch = {key: torch.tensor([e[key] for e in examples]) for key in columns}
        fields = [f for f in (*PAIR_FIELDS[1:], "extra") if f"{f}_ids" in examples[0]]
        prompts = [e["prompt_ids"] for e in examples]
        completions = [e[f"{field}_ids"] for field in fields for e in examples]
        return batch | _batch(prompts * len(fields), completions, self.pad_id)


@dataclass
class CompletionCollator:
    """Pads B completions; the keys of :class:`PairCollator`, [B] and [B, T]."""

    pad_id: int

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """The batch of some rows of :func:`tokenize_rows`."""
        batch = {key: torch.tensor([e[key] for e in examples]) for key in ("index", "row")}
        prompts, completions = ([e[f"{f}_ids"] for e in examples] for f in COMPLETION_FIELDS)
        return batch | _batch(prompts, completions, self.pad_id)
