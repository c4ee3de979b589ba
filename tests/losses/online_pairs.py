"""Two pairs with known sums, the fixture of the online methods' numeric vectors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SUMS = {
    "policy_chosen": [-12.0, -30.5],
    "policy_rejected": [-14.5, -29.0],
    "ref_chosen": [-13.0, -30.0],
    "ref_rejected": [-14.0, -29.5],
}
EXTRA = {"extra": [-20.0, -18.0], "ref_extra": [-19.5, -18.3]}
CHOSEN_HISTORY = [[-12.5, -30.2], [-12.8, -30.1]]
REJECTED_HISTORY = [[-14.2, -29.3], [-14.1, -29.4]]


class Online(NamedTuple):
    dtype: torch.dtype

    def __call__(self, *values: float) -> Tensor:
        return torch.tensor(values, dtype=self.dtype)

    @property
    def sums(self) -> dict[str, Tensor]:
        return {name: self(*values) for name, values in SUMS.items()}

    @property
    def extra(self) -> dict[str, Tensor]:
        return {name: self(*values) for name, values in EXTRA.items()}

    @property
    def counts(self) -> dict[str, Tensor]:
        chosen, rejected = torch.tensor([10, 25]), torch.tensor([12, 20])
        return {"chosen_counts": chosen, "rejected_counts": rejected}

    def history(self, count: int) -> dict[str, list[Tensor]]:
        chosen = [self(*values) for values in CHOSEN_HISTORY[:count]]
        rejected = [self(*values) for values in REJECTED_HISTORY[:count]]
        return {"history_chosen": chosen, "history_rejected": rejected}

    def check(self, got: Tensor, expected: list[float] | float) -> None:
        """float64 to 1e-9, float32 to 1e-5; relative above 1, where squares reach 1e5."""
        bound = {torch.float64: 1e-9, torch.float32: 1e-5}[self.dtype]
        want = torch.tensor(expected, dtype=torch.float64)
        assert got.dtype == self.dtype
        error = (got.double() - want).abs() / want.abs().clamp(min=1)
        assert error.max() <= bound, (got, want)

    def check_pairs(self, loss, expected: list[float], mean: float, **arguments) -> None:
        self.check(loss(**arguments, reduction="none").loss, expected)
        self.check(loss(**arguments).loss, mean)
        self.check(loss(**arguments, reduction="sum").loss, sum(expected))
