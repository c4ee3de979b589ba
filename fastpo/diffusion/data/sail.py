"""SAIL's rounds (arXiv:2602.05380): the model scores its own samples, mixed with the seed pairs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastpo.losses._common import check_positive, check_share
from fastpo.ops._check import fail

_MODULE = "diffusion.data.sail"


def self_rewards(errors: Tensor, reward_ref_errors: Tensor, beta: float = 5000.0) -> Tensor:
    """R = -(beta / 2) (e_theta - e_theta0), averaged over draws of timestep and noise.

    The implicit reward of a model (arXiv:2602.05380), free for a ranking or as a metric too. Pairs
    are :func:`fastpo.data.pairs.best_worst` of it; the probability that one sample beats another
    is :func:`fastpo.data.win_rates.bradley_terry_matrix` of it. The paper's theta0 is
    the model tuned on the seed pairs. The first round samples from that same model, whose R is then
    0 for every sample: take the pretrained one there.

    Args:
        errors: [..., R] of the model at R draws per sample, 10 in the paper.
        reward_ref_errors: [..., R] of the model theta0, at the same draws.
        beta: that of the loss.

    Returns:
        [...], detached; float32, or float64 for float64 errors.

    Raises:
        ValueError: shapes do not fit, or beta is not positive.

    Example:
        >>> self_rewards(torch.tensor([[0.2, 0.4]]), torch.tensor([[0.3, 0.5]]), beta=2.0)
        tensor([0.1000])
    """
    name = f"{_MODULE}.self_rewards"
    check_positive(name, "beta", beta)
    if errors.ndim < 1 or errors.shape[-1] == 0 or errors.shape != reward_ref_errors.shape:
        got = f"{list(errors.shape)} and {list(reward_ref_errors.shape)}"
        remedy = "Compute both with the same timesteps and noise; the draws come last."
        raise fail(name, "errors, reward_ref_errors", "one shape [..., R]", got, remedy)
    dtype = torch.promote_types(
        torch.float32, torch.promote_types(errors.dtype, reward_ref_errors.dtype)
    )
    differences = errors.detach().to(dtype) - reward_ref_errors.detach().to(dtype)
    return -0.5 * beta * differences.mean(-1)


class Mixture(NamedTuple):
    """The pairs of a round, in the order of training.

    Attributes:
        is_self: bool [S], True for a pair of the model's own samples, False for a seed pair.
        index: [S] int64 in the pairs of that kind.
    """

    is_self: Tensor
    index: Tensor


def mixed_pairs(
    num_self: int, num_seed: int, size: int, seed: int, self_share: float = 0.25
) -> Mixture:
    """Draw a round's pairs from the model's own and from the seed set.

    round(self_share * size) are of the model's own samples, the others from the seed set
    (arXiv:2602.05380: 25 % and 75 %). Each kind is gone through in random order, and again only
    when all of it was used; then all are shuffled.

    Args:
        num_self: pairs of the model's own samples.
        num_seed: pairs of the seed set.
        size: S, pairs of the round.
        seed: one seed, one mixture.
        self_share: in [0, 1].

    Returns:
        Mixture.

    Raises:
        ValueError: a kind is empty and not left out, or the share is out of range.

    Example:
        >>> mixture = mixed_pairs(num_self=2, num_seed=10, size=8, seed=0)
        >>> mixture.is_self.sum().item(), sorted(mixture.index[mixture.is_self].tolist())
        (2, [0, 1])
    """
    name = f"{_MODULE}.mixed_pairs"
    check_share(name, "self_share", self_share)
    of_self = round(self_share * size)
    generator = torch.Generator().manual_seed(seed)
    indices = []
    for argument, there, wanted in (
        ("num_self", num_self, of_self),
        ("num_seed", num_seed, size - of_self),
    ):
        if wanted and there < 1:
            remedy = "Change self_share if there are none of a kind."
            raise fail(name, argument, f"pairs, of which {wanted} are drawn", f"{there}", remedy)
        rounds = -(-wanted // max(there, 1))
        drawn = [torch.randperm(there, generator=generator) for _ in range(rounds)]
        indices.append(torch.cat([torch.empty(0, dtype=torch.int64), *drawn])[:wanted])
    order_S = torch.randperm(size, generator=generator)
    return Mixture((torch.arange(size) < of_self)[order_S], torch.cat(indices)[order_S])
