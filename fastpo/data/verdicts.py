"""Pairs from verdicts: tests that code passes, steps that are right, instructions that fit."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastpo.data._checks import bools, fail, real
from fastpo.data.pairs import Pairs, above_gap


class TestedPairs(NamedTuple):
    """P pairs of programs that a test tells apart.

    Attributes:
        prompt: [P] int64, row of the task.
        chosen: [P] int64, the program that passes the test.
        rejected: [P] int64, the program that fails it.
        test: [P] int64, the test; both texts end with it.
    """

    __test__ = False  # Not a test class for pytest.

    prompt: Tensor
    chosen: Tensor
    rejected: Tensor
    test: Tensor


class StepPairs(NamedTuple):
    """P pairs of a right and a wrong next step after the same right steps.

    Attributes:
        prompt: [P] int64, row of the solution.
        step: [P] int64, the first wrong step: the rejected one.
        resample: [P] int64, the continuation whose first step is chosen.
    """

    prompt: Tensor
    step: Tensor
    resample: Tensor


def _bool_dims(function: str, argument: str, values: Tensor, dims: str) -> Tensor:
    names = dims.split()
    if values.dtype != torch.bool or values.ndim != len(names):
        got = f"{values.dtype} {list(values.shape)}"
        remedy = "Compare to get truth values."
        raise fail(function, argument, f"bool [{', '.join(names)}]", got, remedy)
    return values


def dstc_pairs(passes: Tensor) -> TestedPairs:
    """DSTC (arXiv:2411.13611): self-written programs and tests, run against each other.

    Chosen is the program that passes most tests; the test is, of those it passes, the one that
    fewest programs pass; rejected is, of the programs that fail it, the one that passes fewest
    tests. Always the first of equals. A task is skipped if nothing passes, or if every program
    passes all tests that the chosen one passes, which includes that all pass everything.

    Args:
        passes: bool [B, M, K], whether program m passes test k.

    Returns:
        TestedPairs, at most one per task.

    Raises:
        ValueError: the shape or dtype does not fit.

    Example:
        >>> passes = torch.tensor([[[1, 1, 0], [1, 0, 0], [0, 0, 1]]]) == 1
        >>> dstc_pairs(passes)[1:]
        (tensor([0]), tensor([1]), tensor([1]))

    Experimental: from the abstract (minimax selection, concatenated code and test); the selection
    and its tie rules were not read in the paper.
    """
    passes_BMK = _bool_dims("dstc_pairs", "passes", passes, "B M K")
    programs, tests = passes_BMK.shape[1:]
    if not programs or not tests:
        none = torch.zeros(0, dtype=torch.int64, device=passes.device)
        return TestedPairs(none, none, none, none)
    row_B = torch.arange(len(passes_BMK), device=passes.device)
    passed_BM, passing_BK = passes_BMK.sum(2), passes_BMK.sum(1)
    chosen_B = passed_BM.argmax(1)
    test_B = passing_BK.masked_fill(~passes_BMK[row_B, chosen_B], programs + 1).argmin(1)
    fails_BM = ~passes_BMK[row_B, :, test_B]
    rejected_B = passed_BM.masked_fill(~fails_BM, tests + 1).argmin(1)
    prompt = (passes_BMK.any((1, 2)) & fails_BM.any(1)).nonzero().squeeze(1)
    return TestedPairs(prompt, chosen_B[prompt], rejected_B[prompt], test_B[prompt])


def first_wrong_steps(is_right: Tensor, is_step: Tensor | None = None) -> Tensor:
    """First wrong step of each solution, -1 for one without a mistake.

    Args:
        is_right: bool [B, S], a judge's verdict on every step.
        is_step: bool [B, S], False where a solution has no such step; all of them if not given.

    Returns:
        [B] int64.

    Raises:
        ValueError: shapes or dtypes do not fit.

    Example:
        >>> first_wrong_steps(torch.tensor([[True, False, False], [True, True, True]]))
        tensor([ 1, -1])
    """
    right_BS = _bool_dims("first_wrong_steps", "is_right", is_right, "B S")
    wrong_BS = ~right_BS
    if is_step is not None:
        wrong_BS = wrong_BS & bools("first_wrong_steps", "is_step", is_step, wrong_BS.shape)
    if not wrong_BS.shape[1]:
        return torch.full(wrong_BS.shape[:1], -1, device=is_right.device)
    return torch.where(wrong_BS.any(1), wrong_BS.byte().argmax(1), -1)


def step_dpo_pairs(wrong_step: Tensor, resample_is_right: Tensor) -> StepPairs:
    """Step-DPO (arXiv:2406.18629): the first wrong step against a right one after the same prefix.

    The continuation from the right prefix is sampled again from the same model until its final
    answer is right; its first step is chosen. Neither step gets an end-of-sequence token.

    Args:
        wrong_step: [B] of :func:`first_wrong_steps`; -1 gives no pair.
        resample_is_right: bool [B, R], whether the final answer of continuation r is right.

    Returns:
        StepPairs, at most one per solution, with the first right continuation.

    Raises:
        ValueError: shapes or dtypes do not fit.

    Example:
        >>> right = torch.tensor([[False, True], [True, True], [False, False]])
        >>> step_dpo_pairs(torch.tensor([1, -1, 0]), right)
        StepPairs(prompt=tensor([0]), step=tensor([1]), resample=tensor([1]))
    """
    right_BR = _bool_dims("step_dpo_pairs", "resample_is_right", resample_is_right, "B R")
    real("step_dpo_pairs", "wrong_step", wrong_step, "B")
    if wrong_step.shape[0] != right_BR.shape[0]:
        expected, got = f"[{right_BR.shape[0]}]", f"{list(wrong_step.shape)}"
        remedy = "Give one row per solution, also where nothing was sampled again."
        raise fail("step_dpo_pairs", "wrong_step", expected, got, remedy)
    prompt = ((wrong_step >= 0) & right_BR.any(1)).nonzero().squeeze(1)
    first = right_BR[prompt].byte()
    resample = first.argmax(1) if first.numel() else torch.zeros_like(prompt)
    return StepPairs(prompt, wrong_step[prompt].long(), resample)


def mapl_response_pairs(fits: Tensor) -> Pairs:
    """MAPL (arXiv:2505.12845), within a sample: one response under a prompt it fits and one not.

    -logsigmoid(beta (log-ratio(y | x+) - log-ratio(y | x-))) is the loss of DPO on these pairs.

    Args:
        fits: [R, M], 1 where the response fits prompt variant m, 0 where not, NaN where unknown.

    Returns:
        Pairs, all combinations: ``prompt`` is the row of the **response**, ``chosen`` the variant
        that it fits, ``rejected`` one that it does not.

    Raises:
        ValueError: the shape does not fit.

    Example:
        >>> mapl_response_pairs(torch.tensor([[True, False, True]]))[1:3]
        (tensor([0, 2]), tensor([1, 1]))

    Experimental: rule and loss were read in a note on the paper.
    """
    return above_gap(real("mapl_response_pairs", "fits", fits, "R M"))


def mapl_margin_pairs(levels: Tensor) -> Pairs:
    """MAPL (arXiv:2505.12845), across samples: which of two pairs should have the larger margin.

    -logsigmoid(beta (d of the chosen pair - d of the rejected pair)), d the difference of
    log-ratios of a pair, is the loss of DPO on these pairs of pairs.

    Args:
        levels: [B, P], for each pair of a sample a number that orders the margins wanted, such as
            in how many instructions its responses differ; NaN where unknown.

    Returns:
        Pairs, all with different levels: columns are pairs of the sample.

    Raises:
        ValueError: the shape does not fit.

    Example:
        >>> mapl_margin_pairs(torch.tensor([[1, 3, 1]]))[1:3]
        (tensor([1, 1]), tensor([0, 2]))

    Experimental: the rule was read in a note on the paper; its objective was not.
    """
    return above_gap(real("mapl_margin_pairs", "levels", levels, "B P"))
