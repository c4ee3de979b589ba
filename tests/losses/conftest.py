"""The fixture of the numeric vectors: three pairs with known token log-probs."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

CHOSEN = [[-1.2, -0.4, -0.9], [-0.7, -2.1, -0.3, -0.5], [-1.5]]
REF_CHOSEN = [[-1.3, -0.6, -0.8], [-0.9, -1.8, -0.4, -0.6], [-1.1]]
REJECTED = [[-0.8, -1.9], [-0.6, -0.4, -1.1], [-2.0, -0.2, -0.9, -1.3]]
REF_REJECTED = [[-0.7, -1.5], [-0.8, -0.5, -1.0], [-1.6, -0.4, -0.8, -1.1]]


class Pairs(NamedTuple):
    policy_chosen: Tensor
    policy_rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_counts: Tensor
    rejected_counts: Tensor

    @property
    def sums(self) -> tuple[Tensor, ...]:
        return self[:4]

    @property
    def counts(self) -> tuple[Tensor, Tensor]:
        return self[4:]


@pytest.fixture
def f1() -> Pairs:
    """Sums over tokens in float64, and token counts."""
    lists = (CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED)
    sums = (torch.tensor([sum(row) for row in rows], dtype=torch.float64) for rows in lists)
    counts = (torch.tensor([len(row) for row in rows]) for rows in (CHOSEN, REJECTED))
    return Pairs(*sums, *counts)


class Tokens(NamedTuple):
    """Padded token values [B, T] of one side; NaN outside the mask."""

    policy: Tensor
    ref: Tensor
    mask: Tensor


@pytest.fixture
def f1_tokens() -> tuple[Tokens, Tokens]:
    """The tokens of chosen and rejected in float64."""

    def padded(rows: list[list[float]]) -> Tensor:
        width = max(map(len, rows)) + 1
        rows = [[*row, *[float("nan")] * (width - len(row))] for row in rows]
        return torch.tensor(rows, dtype=torch.float64)

    sides = ((CHOSEN, REF_CHOSEN), (REJECTED, REF_REJECTED))
    sides = [(padded(policy), padded(ref)) for policy, ref in sides]
    return tuple(Tokens(policy, ref, ~policy.isnan()) for policy, ref in sides)


# Bounds of the published vectors, which have ten decimals.
VECTOR_BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-5}


@pytest.fixture(params=list(VECTOR_BOUNDS), ids=str)
def vector_dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture
def check_vector(vector_dtype):
    """Compare with a published vector in the dtype under test; it must come back in that dtype."""

    def check(got: Tensor, expected: list[float] | float) -> None:
        bound = VECTOR_BOUNDS[vector_dtype]
        want = torch.tensor(expected, dtype=vector_dtype)
        torch.testing.assert_close(got, want, rtol=0, atol=bound)

    return check


@pytest.fixture
def f1_cast(f1, vector_dtype) -> Pairs:
    """``f1`` with its sums in the dtype under test."""
    return Pairs(*(x.to(vector_dtype) for x in f1.sums), *f1.counts)
