"""Batches of groups: the order of prompts, and groups as padded rows with their advantages."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler
from transformers import TrainerCallback

from fastpo.data.tokens import IGNORED, CompletionCollator
from fastpo.trainers.config import ConfigError
from fastpo.trainers.grpo_rollouts import Group
from fastpo.trainers.sampling import seed_of

Batch = dict[str, Any]


class GenerationOrder(Sampler):
    """Places of prompts in the order of training: shuffled, cut into generations, each repeated.

    Args:
        prompts: their number; those that fill no whole generation are left for another epoch.
        size: prompts of a generation, on all ranks.
        repeats: times that each generation comes, one after the other.
        seed: of the order, which depends on nothing else than the epoch.
        epoch: says which epoch it is.
    """

    def __init__(self, prompts: int, size: int, repeats: int, seed: int, epoch: Callable[[], int]):
        self.prompts, self.size, self.repeats = prompts, size, repeats
        self.seed, self.epoch = seed, epoch

    def __len__(self) -> int:
        return self.prompts // self.size * self.size * self.repeats

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(seed_of(self.seed, "epoch", self.epoch()))
        order = torch.randperm(self.prompts, generator=generator).tolist()
        for start in range(0, self.prompts - self.size + 1, self.size):
            yield from order[start : start + self.size] * self.repeats


class WholeGenerations(TrainerCallback):
    """A checkpoint never falls inside a generation, whose completions it would lose."""

    def __init__(self, period: int):
        self.period = period

    def on_train_begin(self, args, state, control, **kwargs):
        """Steps to save at and to stop at are ends of generations."""
        numbers = {"max_steps": state.max_steps}
        if args.save_strategy == "steps":
            numbers["save_steps"] = state.save_steps  # Which may be given as a share of all.
        for name, number in numbers.items():
            if number % self.period:
                expected = f"a multiple of {self.period} (steps_per_generation * num_iterations)"
                problem = "The completions of a generation are in no checkpoint."
                raise ConfigError(f"{name}: expected {expected}, got {number}. {problem}")


@dataclass
class GroupCollator:
    """Pads the completions of some groups to a batch.

    Keys: those of :class:`fastpo.data.tokens.CompletionCollator`; ``advantages`` [B]; ``kept``, the
    number of completions, 0 if all groups are left out and the row that is there has no labels;
    ``sampler_logprobs`` [B, T] where the sampler gave them; and ``metrics``, 0-d each, of all
    groups, left out or not.

    Attributes:
        pad_id: padding token.
        mask_truncated: whether completions that were cut before their end lose their labels.
        filter_groups: whether groups of equal rewards are left out.
    """

    pad_id: int
    mask_truncated: bool = False
    filter_groups: bool = False

    def __call__(self, groups: Sequence[Group], advantages: Sequence[Tensor]) -> Batch:
        """The batch of some groups; ``advantages`` [K] of each."""
        rows, kept, truncated, sampled = [], [], [], []
        for group, advantages_K in zip(groups, advantages, strict=True):
            if self.filter_groups and group.has_equal_rewards:
                continue
            shared = {"index": group.row, "row": group.row, "prompt_ids": group.prompt_ids}
            rows += [{**shared, "completion_ids": ids} for ids in group.ids]
            kept.append(advantages_K)
            truncated += group.truncated
            sampled += group.logprobs or []
        is_empty = not rows
        if is_empty:  # A row without labels: all ranks go through the same calls.
            group = groups[0]
            ids = {"prompt_ids": group.prompt_ids, "completion_ids": group.ids[0]}
            rows = [ids | {"index": group.row, "row": group.row}]
            kept, truncated = [torch.zeros(1)], [True]
            sampled = group.logprobs[:1] if group.logprobs else []
        batch = CompletionCollator(self.pad_id)(rows)
        batch["advantages"] = torch.cat(kept)
        if is_empty or self.mask_truncated:
            batch["labels"][torch.tensor(truncated)] = IGNORED
        if sampled:
            batch["sampler_logprobs"] = _placed(sampled, batch["labels"], rows)
        return batch | {"kept": 0 if is_empty else len(rows), "metrics": _group_metrics(groups)}

    def lengths(self, group: Group) -> list[float]:
        """Tokens of each completion of a group that count in the loss; 0 of those left out."""
        if self.filter_groups and group.has_equal_rewards:
            return [0.0] * len(group.ids)
        cut = [self.mask_truncated and was_cut for was_cut in group.truncated]
        return [0.0 if c else float(len(ids)) for c, ids in zip(cut, group.ids, strict=True)]


def _placed(logprobs: list[list[float]], labels_BT: Tensor, rows: list[dict[str, Any]]) -> Tensor:
    """Log-probs of completions where the policy has them: at the token before; NaN elsewhere."""
    placed_BT = torch.full(labels_BT.shape, math.nan)
    for b, (values, row) in enumerate(zip(logprobs, rows, strict=True)):
        start = len(row["prompt_ids"]) - 1
        placed_BT[b, start : start + len(values)] = torch.tensor(values)
    return placed_BT


def _group_metrics(groups: list[Group]) -> dict[str, Tensor]:
    """Means over groups and their completions; 0-d each. 0 for rewards that are all NaN."""
    rewards = [torch.tensor(group.rewards) for group in groups]
    scored = [r[~r.isnan()] for r in rewards]
    truncated = [cut for group in groups for cut in group.truncated]
    lengths = [len(ids) for group in groups for ids in group.ids]
    stds = [r.std() if len(r) > 1 else torch.tensor(0.0) for r in scored]
    equal = [group.has_equal_rewards for group in groups]
    mean = lambda values: torch.tensor(values, dtype=torch.float32).mean()
    return {
        "rewards/mean": torch.cat(scored).mean() if any(map(len, scored)) else torch.tensor(0.0),
        "rewards/std": torch.stack(stds).mean(),
        "rewards/missing": torch.cat(rewards).isnan().float().mean(),
        "groups/equal": mean(equal),
        "completions/length": mean(lengths),
        "completions/truncated": mean(truncated),
    }
