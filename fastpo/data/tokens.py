"""Rows to token ids and batches: prompt, completion, end of sequence; truncation; padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from fastpo.data.records import COMPLETION_FIELDS, PAIR_FIELDS, DataError

IGNORED = -100


class TokenReport(NamedTuple):
    """What tokenisation did to the rows.

    Attributes:
        rows: number of rows.
        cut_prompts: rows whose prompt lost tokens at its start.
        cut_completions: rows of which a completion lost tokens at its end, the end-of-sequence too.
        longest: tokens of the longest sequence after the cut.
    """

    rows: int
    cut_prompts: int
    cut_completions: int
    longest: int


def _texts(row: dict[str, Any], fields: Sequence[str], tokenizer) -> list[str]:
    """The prompt and the completions as text, by the chat template if they are messages."""
    if isinstance(row["prompt"], str):
        return [row[field] for field in fields]
    prompt = tokenizer.apply_chat_template(
        row["prompt"], tokenize=False, add_generation_prompt=True
    )
    texts = [prompt]
    for field in fields[1:]:
        if not isinstance(row[field], list):
            problem = f"the prompt is a list of messages, {field!r} is not"
            raise DataError(f"row {row['row']}: {problem}; give both as messages, or as text.")
        whole = tokenizer.apply_chat_template(row["prompt"] + row[field], tokenize=False)
        if not whole.startswith(prompt) or whole == prompt:
            problem = f"the chat template does not put {field!r} after the prompt"
            raise DataError(f"row {row['row']}: {problem}; give prompt and completions as text.")
        texts.append(whole[len(prompt) :])
    return texts


def encode_row(
    row: dict[str, Any],
    fields: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> dict[str, Any]:
    """Token ids of one row, with the prompt shared by all its completions.

    Prompt and completion are tokenised apart, so that all completions follow the same prompt. A
    text completion ends with the end-of-sequence token; a chat template writes its own end. If the
    longest sequence is above ``max_length``, the prompt first loses tokens at its start (a
    beginning-of-sequence token is kept), down to one; only then completions lose their end.

    Args:
        row: ``fields`` and ``row``, the number used in messages.
        fields: ``prompt`` and the completions.
        tokenizer: of the model.
        max_length: tokens of a sequence, prompt and completion, at least 2.

    Returns:
        ``<field>_ids`` per field, and the booleans ``cut_prompt`` and ``cut_completion``.

    Raises:
        DataError: a completion has no token.
    """
    is_chat = not isinstance(row["prompt"], str)
    prompt, *completions = _texts(row, fields, tokenizer)
    eos = tokenizer.eos_token_id
    prompt_ids = tokenizer(prompt, add_special_tokens=not is_chat)["input_ids"]
    if prompt_ids and prompt_ids[-1] == eos and not is_chat:
        prompt_ids = prompt_ids[:-1]  # Some tokenisers close every text.
    completions_ids = [tokenizer(c, add_special_tokens=False)["input_ids"] for c in completions]
    if not is_chat and eos is not None:
        completions_ids = [[*ids, eos] for ids in completions_ids]
    for field, ids in zip(fields[1:], completions_ids, strict=True):
        if not ids:
            raise DataError(
                f"row {row['row']}: field {field!r} is empty and has no token to score."
            )

    excess = len(prompt_ids) + max(map(len, completions_ids), default=0) - max_length
    cut_prompt = excess > 0 and len(prompt_ids) > 1
    if cut_prompt:
        keep = max(len(prompt_ids) - excess, 1)
        has_bos = keep > 1 and prompt_ids[0] == tokenizer.bos_token_id
        head = prompt_ids[:1] if has_bos else []
        prompt_ids = head + prompt_ids[len(prompt_ids) - keep + len(head) :]
    room = max_length - len(prompt_ids)
    cut_completion = any(len(ids) > room for ids in completions_ids)
    encoded = {f"{fields[0]}_ids": prompt_ids, "cut_prompt": cut_prompt}
    for field, ids in zip(fields[1:], completions_ids, strict=True):
        encoded[f"{field}_ids"] = ids[:room]
    return encoded | {"cut_completion": cut_completion}


def tokenize_rows(
    rows: Dataset, fields: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[Dataset, TokenReport]:
    """Tokenise rows of :func:`fastpo.data.records.load_rows` by :func:`encode_row`.

    Returns:
        A dataset with ``<field>_ids`` per field, ``row`` and ``index`` (0, 1, ...), and the report.

    Raises:
        DataError: a row gives no tokens, or ``max_length`` is below 2.
    """
    if max_length < 2:
        raise DataError(f"max_length: expected at least 2 tokens, got {max_length}.")
    encoded = [
        encode_row(row, fields, tokenizer, max_length) | {"row": row["row"], "index": i}
        for i, row in enumerate(rows)
    ]
    ids = [f"{field}_ids" for field in fields]
    report = TokenReport(
        len(encoded),
        sum(row["cut_prompt"] for row in encoded),
        sum(row["cut_completion"] for row in encoded),
        max(len(row[ids[0]]) + max(len(row[name]) for name in ids[1:]) for row in encoded),
    )
    columns = [*ids, "row", "index"]
    return Dataset.from_list([{name: row[name] for name in columns} for row in encoded]), report


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
