"""Responses of a model to prompts, by ``transformers``' ``generate``: batched, padded, seeded."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from fastpo.data.errors import DataError
from fastpo.data.ids import drop_identical, response_ids
from fastpo.data.pairs import Pairs
from fastpo.data.selection import Selection
from fastpo.data.tokens import TokenReport, encode_row
from fastpo.trainers.config import ConfigError

Prompt = str | list[dict[str, str]]


@dataclass
class Samples:
    """K responses to each of B prompts.

    Attributes:
        prompts: [B] texts or lists of chat messages.
        prompt_ids: [B] token ids.
        ids: [B][K] token ids of the responses, with the end-of-sequence token where they ended.
        texts: [B][K] the same without special tokens.
        seeds: of the generator, by batch; empty for responses that were given.
    """

    prompts: list[Prompt]
    prompt_ids: list[list[int]]
    ids: list[list[list[int]]]
    texts: list[list[str]]
    seeds: list[int]

    def __add__(self, other: Samples) -> Samples:
        """The responses of both, those of ``other`` in the later columns."""
        ids, texts = (
            [[*a, *b] for a, b in zip(mine, theirs, strict=True)]
            for mine, theirs in ((self.ids, other.ids), (self.texts, other.texts))
        )
        return Samples(self.prompts, self.prompt_ids, ids, texts, self.seeds + other.seeds)

    def rows(
        self,
        pairs: Pairs,
        extra: Tensor | None = None,
        keep_identical: bool = False,
        **values: Tensor,
    ) -> list[dict[str, Any]]:
        """Rows to train on, one per pair.

        Args:
            pairs: places in these responses; a ``label`` becomes a column.
            extra: [B] column of a further response of each prompt, which becomes ``extra_ids``.
            keep_identical: whether to keep pairs of two identical responses.
            **values: [B, K] numbers of the responses: ``scores`` become the columns
                ``chosen_scores`` and ``rejected_scores``, and so on.
        """
        if not keep_identical:
            pairs = drop_identical(pairs, response_ids(self.ids))
        columns = {} if pairs.label is None else {"label": pairs.label}
        for name, values_BK in values.items():
            sides = pairs.gather(values_BK)
            columns |= zip((f"chosen_{name}", f"rejected_{name}"), sides, strict=True)
        columns = {name: values_P.tolist() for name, values_P in columns.items()}
        rows = []
        for i, (prompt, chosen, rejected) in enumerate(torch.stack(pairs[:3], 1).tolist()):
            ids = {
                "chosen_ids": self.ids[prompt][chosen],
                "rejected_ids": self.ids[prompt][rejected],
            }
            if extra is not None:
                ids["extra_ids"] = self.ids[prompt][int(extra[prompt])]
            numbers = {name: column[i] for name, column in columns.items()}
            rows.append({"prompt_ids": self.prompt_ids[prompt], "row": prompt, **ids, **numbers})
        return rows

    def rows_of(self, selection: Selection) -> list[dict[str, Any]]:
        """Rows to fit to, one per selected response."""
        places = torch.stack(selection, 1).tolist()
        return [
            {"prompt_ids": self.prompt_ids[b], "completion_ids": self.ids[b][k], "row": b}
            for b, k in places
        ]


def encode_prompts(
    prompts: Sequence[Prompt | dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> tuple[list[list[int]], TokenReport]:
    """Token ids of prompts, or of rows with one (:func:`fastpo.data.tokens.encode_row`).

    Raises:
        DataError: a prompt has no token.
    """
    rows = (p if isinstance(p, dict) else {"prompt": p} for p in prompts)
    found = [
        encode_row(row | {"row": row.get("row", i)}, ("prompt",), tokenizer, max_length)
        for i, row in enumerate(rows)
    ]
    ids = [row["prompt_ids"] for row in found]
    if [] in ids:
        remedy = "Leave it out, or use a tokenizer that begins texts with a token."
        raise DataError(f"prompt {ids.index([])}: has no token to begin with. {remedy}")
    return ids, TokenReport.of({name: [row[name] for row in found] for name in found[0]})


def encode_responses(
    rows: Sequence[dict[str, Any]],
    fields: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> Samples:
    """Responses that are there already, such as the chosen and the rejected one of a data set.

    They follow the prompt as responses are sampled from it: where the end of the prompt merges with
    one of them in the tokens of the whole text, they are tokenised apart.

    Raises:
        DataError: a chat template does not put a response after the prompt.
    """
    found = []
    for i, row in enumerate(rows):
        encoded = encode_row(row | {"row": i}, ("prompt", *fields), tokenizer, max_length)
        if encoded["merged"]:
            if not isinstance(row["prompt"], str):
                problem = "the chat template does not put the responses after the prompt"
                raise DataError(f"row {i}: {problem}; give prompt and responses as text.")
            encoded = encode_row(row | {"row": i}, ("prompt",), tokenizer, max_length - 1)
            room, end = max_length - len(encoded["prompt_ids"]), [tokenizer.eos_token_id]
            for field in fields:
                text = row[field].removesuffix(tokenizer.eos_token or "")
                ids = tokenizer(text, add_special_tokens=False)["input_ids"]
                encoded[f"{field}_ids"] = (ids + end * (end != [None]))[:room]
        found.append(encoded)
    ids = [[row[f"{field}_ids"] for field in fields] for row in found]
    texts = [tokenizer.batch_decode(group, skip_special_tokens=True) for group in ids]
    prompts = [row["prompt"] for row in rows]
    return Samples(prompts, [row["prompt_ids"] for row in found], ids, texts, [])


def seed_of(*parts: Any) -> int:
    """A seed in [0, 2^63) from anything that prints the same in every run.

    >>> seed_of(0, "round", 1) == seed_of(0, "round", 1) != seed_of(0, "round", 2)
    True
    """
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def batches(count: int, size: int) -> Iterator[slice]:
    """``range(count)`` in pieces."""
    return (slice(i, min(i + size, count)) for i in range(0, count, size))


def require_padding(tokenizer: PreTrainedTokenizerBase) -> None:
    """Whether the tokenizer can pad a batch.

    Raises:
        ConfigError: it has no padding token.
    """
    if tokenizer.pad_token_id is None:
        remedy = "Give it one: tokenizer.pad_token = tokenizer.eos_token."
        raise ConfigError(f"tokenizer: has no padding token. {remedy}")


@contextlib.contextmanager
def _as_policy(model: torch.nn.Module) -> Iterator[None]:
    """The model without dropout, and without the generation settings that came with it.

    ``generate`` would fill what is not set from these, such as a repetition penalty, and the
    responses would be those of another distribution than the one that is trained.
    """
    owner = model.get_base_model() if hasattr(model, "get_base_model") else model
    own, was_training = owner.generation_config, model.training
    owner.generation_config = GenerationConfig()
    model.eval()
    try:
        yield
    finally:
        owner.generation_config = own
        model.train(was_training)


@torch.no_grad()
def generate(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[Sequence[int]],
    samples: int,
    seed: int,
    **options: Any,
) -> list[list[list[int]]]:
    """K responses to each of a batch of prompts, as token ids.

    Args:
        model: a causal LM, not wrapped for distributed training.
        tokenizer: with a padding token.
        prompt_ids: [B] token ids.
        samples: K.
        seed: of torch's generators, which are left as they were.
        **options: of ``GenerationConfig``: ``max_new_tokens``, ``temperature``, ``do_sample``, ...;
            of the model's own settings only the end-of-sequence tokens count.

    Returns:
        [B][K] token ids up to the end-of-sequence token, which is kept.

    Raises:
        ConfigError: the tokenizer has no padding token.
    """
    require_padding(tokenizer)
    device = model.get_input_embeddings().weight.device
    pad = tokenizer.pad_token_id
    # Chat models may end by another token than the tokenizer's.
    ends = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    length = max(map(len, prompt_ids))
    ids_BT = torch.tensor([[pad] * (length - len(p)) + [*p] for p in prompt_ids], device=device)
    mask_BT = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompt_ids])
    config = GenerationConfig(
        num_return_sequences=samples,
        pad_token_id=pad,
        eos_token_id=sorted(ends) or None,
        use_cache=True,
        **options,
    )
    with _as_policy(model), torch.random.fork_rng():
        torch.manual_seed(seed)
        found = model.generate(
            input_ids=ids_BT, attention_mask=mask_BT.to(device), generation_config=config
        )
    responses = [_until_end(ids, ends) for ids in found[:, length:].tolist()]
    return [responses[i : i + samples] for i in range(0, len(responses), samples)]


def _until_end(ids: list[int], ends: set[int]) -> list[int]:
    last = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return ids[: last + 1]
