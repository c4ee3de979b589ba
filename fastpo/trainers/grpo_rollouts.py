"""Groups of scored completions: read from a file, or sampled from the policy and scored."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import PreTrainedTokenizerBase, TrainerState

from fastpo.data.errors import DataError
from fastpo.data.formats import TEMPLATE_COLUMNS, check_row, convert, messages_of
from fastpo.data.records import iterate_rows
from fastpo.data.tokens import TokenReport, encode_row
from fastpo.trainers.config import ConfigError
from fastpo.trainers.grpo_rewards import GIVEN, RewardError, Rewards, number
from fastpo.trainers.sampling import batches, encode_prompts, generate, seed_of

# Rollout(model, indices of prompts, seed) gives a group per index.
Rollout = Callable[[torch.nn.Module, Sequence[int], int], list["Group"]]


@dataclass
class Group:
    """The K completions of one prompt.

    Attributes:
        row: number of the prompt in its file, for messages.
        prompt_ids: token ids.
        ids: [K] token ids of the completions.
        rewards: [K], NaN for a completion without a score.
        components: [K][R] rewards of each function; their weighted sums are ``rewards``.
        truncated: [K] whether a completion was cut before its end.
        logprobs: [K] nats per token, as the sampler gives them; None if it gives none.
    """

    row: int
    prompt_ids: list[int]
    ids: list[list[int]]
    rewards: list[float]
    components: list[list[float]]
    truncated: list[bool]
    logprobs: list[list[float]] | None = None

    @property
    def has_equal_rewards(self) -> bool:
        """Whether no completion is better than another."""
        return len({reward for reward in self.rewards if not math.isnan(reward)}) < 2

    @property
    def missing_rewards(self) -> int:
        """Completions without a score, which teach nothing."""
        return sum(map(math.isnan, self.rewards))


def read_rows(
    source: str | os.PathLike, limit: int | None = None, **options: Any
) -> list[dict[str, Any]]:
    """Rows with a ``prompt`` and any other columns; ``row`` is the number in the source.

    Args:
        source: as of :func:`fastpo.data.records.iterate_rows`.
        limit: the first so many rows only.
        **options: of that function: ``split``, ``subset``, ``columns``, ``streaming``.

    Raises:
        DataError: the source is missing or empty, or a row has no prompt.
    """
    rows = []
    for where, line, row in iterate_rows(os.fspath(source), limit=limit, **options):
        found = convert(row, ("prompt",), where)
        used = found.pop("used")
        if "row" in row:
            problem = "column 'row': here that is the number of the row"
            raise DataError(f"{where}: {problem}; rename it by --columns row_id=row.")
        others = {name: value for name, value in row.items() if name not in used}
        rows.append(others | found | {"row": line})
    return rows


class GivenGroups:
    """Groups whose completions and rewards are in the rows: ``completions`` and ``rewards`` [K].

    Args:
        rows: of :func:`read_rows`; K may differ between them.
        tokenizer: of the model.
        max_length: tokens of a sequence.

    Raises:
        DataError: a row has no completions or not as many rewards, or no group can teach anything.
    """

    def __init__(
        self, rows: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, max_length: int
    ):
        self.rows = rows
        found = [_given_group(row, tokenizer, max_length) for row in rows]
        self.groups = [group for group, _ in found]
        encoded = [row for _, row in found]
        # The completions have names of their own, the counts do not.
        names = [name for name in encoded[0] if not name.endswith("_ids")]
        self.report = TokenReport.of({name: [row[name] for row in encoded] for name in names})
        if all(group.has_equal_rewards for group in self.groups):
            raise DataError(
                f"rewards: in all {len(rows)} groups they are equal, or there is one only: no "
                "completion is better than another. Give groups of different rewards."
            )

    def __len__(self) -> int:
        return len(self.groups)

    def __call__(self, model: torch.nn.Module, index: Sequence[int], seed: int) -> list[Group]:
        """The groups of these places."""
        return [self.groups[i] for i in index]


def _given_group(row: dict[str, Any], tokenizer, max_length: int) -> tuple[Group, dict[str, Any]]:
    where = f"line {row['row']}"
    completions, rewards = row.get("completions"), row.get("rewards")
    for name, column in (("completions", completions), ("rewards", rewards)):
        if not isinstance(column, list) or not column:
            remedy = "Or pass --reward, and the model completes the prompts itself."
            problem = f"field {name!r}: expected a list, got {column!r:.80}"
            raise DataError(f"{where}: {problem}. {remedy}")
    if len(completions) != len(rewards):
        counts = f"{len(completions)} completions and {len(rewards)} rewards"
        raise DataError(f"{where}: {counts}; give one reward per completion, null for none.")
    numbers = [number(reward, f"{where}: rewards[{k}]") for k, reward in enumerate(rewards)]
    names = [f"completions[{k}]" for k in range(len(completions))]
    given = dict(zip(names, map(messages_of, completions), strict=True))
    check_row({"prompt": row["prompt"], **given}, ("prompt", *names), where)
    template = {name: row[name] for name in TEMPLATE_COLUMNS if name in row}
    row = {"prompt": row["prompt"], "row": row["row"], **template, **given}
    encoded = encode_row(row, ("prompt", *names), tokenizer, max_length)
    ids = [encoded[f"{name}_ids"] for name in names]
    room = max_length - len(encoded["prompt_ids"])
    # A completion that fills the room was cut, or happens to fit exactly and then ends.
    ended = tokenizer.all_special_ids
    truncated = [len(tokens) == room and tokens[-1] not in ended for tokens in ids]
    components = [[reward] for reward in numbers]
    return Group(row["row"], encoded["prompt_ids"], ids, numbers, components, truncated), encoded


class Sampler(Protocol):
    """What writes completions."""

    def __call__(
        self,
        model: torch.nn.Module,
        prompt_ids: Sequence[Sequence[int]],
        samples: int,
        seed: int,
    ) -> tuple[list[list[list[int]]], list[list[list[float]]] | None]:
        """Token ids [B][K][.] and their log-probs under the sampler in nats, None if unknown."""


class TransformersSampler:
    """Completions by ``generate`` of transformers (:func:`fastpo.trainers.sampling.generate`).

    Args:
        tokenizer: of the model, with a padding token.
        **generation: of ``GenerationConfig``.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, **generation: Any):
        self.tokenizer = tokenizer
        self.generation = {"do_sample": True, "top_k": 0, **generation}

    def __call__(self, model, prompt_ids, samples, seed):
        """As of :class:`Sampler`, without log-probs."""
        ids = generate(model, self.tokenizer, prompt_ids, samples, seed, **self.generation)
        return ids, None


class SampledGroups:
    """Groups of completions that the model writes, scored by reward functions.

    Args:
        rows: of :func:`read_rows`.
        tokenizer: of the model.
        rewards: of the completions.
        sampler: writes them.
        samples: K, completions per prompt.
        max_new_tokens: of a completion; one of that length that does not end is truncated.
        max_prompt_length: tokens; longer prompts lose their start.
        batch_size: prompts per call of the sampler.
    """

    def __init__(
        self,
        rows: Sequence[dict[str, Any]],
        tokenizer: PreTrainedTokenizerBase,
        rewards: Rewards,
        sampler: Sampler,
        *,
        samples: int,
        max_new_tokens: int,
        max_prompt_length: int,
        batch_size: int,
    ):
        if samples < 2:
            remedy = "A completion is compared with the others of its prompt."
            raise ConfigError(f"samples: expected 2 or more per prompt, got {samples}. {remedy}")
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens: expected 1 or more, got {max_new_tokens}.")
        if max_prompt_length < 1:
            remedy = "Raise max_length, or lower max_new_tokens."
            raise ConfigError(f"max_length: leaves {max_prompt_length} tokens to prompts. {remedy}")
        self.rows, self.tokenizer, self.rewards, self.sampler = rows, tokenizer, rewards, sampler
        self.samples, self.max_new_tokens, self.batch_size = samples, max_new_tokens, batch_size
        # What reward functions get as trainer_state; a trainer sets it.
        self.trainer_state: TrainerState | None = None
        taken = {"prompt", "row", "completion", *GIVEN}
        self.columns = sorted({name for row in rows for name in row} - taken)
        rewards.check(self.columns)
        self.prompt_ids, self.report = encode_prompts(rows, tokenizer, max_prompt_length)

    def __len__(self) -> int:
        return len(self.rows)

    def __call__(self, model: torch.nn.Module, index: Sequence[int], seed: int) -> list[Group]:
        """New completions of these prompts.

        Raises:
            RewardError: a reward function failed, or scored none of the completions.
        """
        ids, logprobs = [], []
        for part in batches(len(index), self.batch_size):
            prompt_ids = [self.prompt_ids[i] for i in index[part]]
            part_seed = seed_of(seed, list(index[part]))
            found, found_logprobs = self.sampler(model, prompt_ids, self.samples, part_seed)
            ids += found
            logprobs += found_logprobs or [None] * len(found)
        components = self._score(index, ids)
        rewards = [self.rewards.total(parts) for parts in components]
        if all(math.isnan(reward) for reward in rewards):
            rows = [self.rows[i]["row"] for i in index]
            problem = f"none of the {len(rewards)} completions of rows {rows} has a score"
            raise RewardError(f"reward: {problem}. Look at what the functions return.")
        special = self.tokenizer.all_special_ids
        groups = []
        for b, i in enumerate(index):
            truncated = [len(t) == self.max_new_tokens and t[-1] not in special for t in ids[b]]
            own = slice(b * self.samples, (b + 1) * self.samples)
            scores = rewards[own], components[own]
            row, prompt_ids = self.rows[i]["row"], self.prompt_ids[i]
            groups.append(Group(row, prompt_ids, ids[b], *scores, truncated, logprobs[b]))
        return groups

    def _score(self, index: Sequence[int], ids: list[list[list[int]]]) -> list[list[float]]:
        every = [self.rows[i] for i in index for _ in range(self.samples)]
        columns = {name: [row.get(name) for row in every] for name in self.columns}
        columns["completion_ids"] = [tokens for group in ids for tokens in group]
        texts = self.tokenizer.batch_decode(columns["completion_ids"], skip_special_tokens=True)
        prompts = [row["prompt"] for row in every]
        completions = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        return self.rewards(prompts, completions, trainer_state=self.trainer_state, **columns)
