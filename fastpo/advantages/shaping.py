"""Rewards with something taken off or added: for length, for tool calls, for the KL."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastpo.advantages._common import check_shapes, fail, floats
from fastpo.advantages._tokens import active_tokens, check_tokens, last_tokens
from fastpo.checks import check_operands, check_tensors
from fastpo.groups import Groups, group_stats
from fastpo.weights._common import Memory


def _check_positive(function: str, **numbers: float) -> None:
    for name, number in numbers.items():
        if not 0 < number < math.inf:
            raise fail(function, name, "a number > 0", number, "See the formula.")


def overlong_penalty(
    lengths: Tensor,
    max_length: float,
    cache_length: float,
    factor: float = 1.0,
    floor: bool = True,
) -> Tensor:
    """What a response loses that comes close to the longest there may be.

    factor * clamp((max_length - cache_length - length) / cache_length, -1, 0)  (DAPO,
    arXiv:2503.14476, eq. 13). verl goes on below -factor: ``floor=False``.

    Args:
        lengths: tokens of each response, any shape.
        max_length: where the penalty is ``-factor``.
        cache_length: it starts that many tokens before, > 0.
        factor: of the penalty, >= 0.
        floor: no penalty goes below ``-factor``.

    Returns:
        The shape of ``lengths``, float32, or float64 for float64 lengths; to be added to rewards.

    Raises:
        ValueError: an option is out of range.

    Example:
        >>> overlong_penalty(torch.tensor([80, 90, 100, 110]), max_length=100, cache_length=20)
        tensor([ 0.0000, -0.5000, -1.0000, -1.0000])
    """
    check_tensors("advantages.overlong_penalty", lengths=lengths)
    if not 0 < cache_length <= max_length:
        got = f"{cache_length} of {max_length}"
        remedy = "It is the last stretch before max_length."
        raise fail("overlong_penalty", "cache_length", "in (0, max_length]", got, remedy)
    if not 0 <= factor < math.inf:
        raise fail("overlong_penalty", "factor", "a number >= 0", factor, "It is a reward.")
    (lengths,) = floats(lengths)
    share = ((max_length - cache_length - lengths) / cache_length).clamp(max=0)
    return factor * (share.clamp(min=-1) if floor else share)


def otc_rewards(
    correct: Tensor,
    tool_calls: Tensor,
    groups: Groups | Tensor | int | None = None,
    c: float = 1.0,
    alpha: float = 1.0,
) -> Tensor:
    """Rewards for right answers with few tool calls.

    alpha * correct * r_tool. With m calls, n the least of the group's right answers, and
    f = 2 m n / (m + n): r_tool = sin(f pi / (2 n)), cos(m pi / (2 m + c)) where n = 0, 1 where
    m = n = 0 (OTC-GRPO, arXiv:2504.14870). Without groups r_tool is the cosine (OTC-PPO).

    Args:
        correct: bool [N], right answers.
        tool_calls: [N] calls of each response.
        groups: the size of every group, int ids [N], or :class:`fastpo.Groups`.
        c: how slowly the cosine falls, > 0.
        alpha: the largest reward, > 0.

    Returns:
        [N] float32, or float64 for float64 ``tool_calls``.

    Raises:
        ValueError: shapes or dtypes do not fit or an option is out of range.

    Experimental: the formulas were read in third-party code and in a note that quotes the paper; c
    and alpha of the paper were not. The paper's n is the least over past epochs as well.

    Example:
        >>> correct, calls = torch.tensor([True, True, False]), torch.tensor([2, 4, 0])
        >>> otc_rewards(correct, calls, groups=3)
        tensor([1.0000, 0.8660, 0.0000])
    """
    _check_positive("otc_rewards", c=c, alpha=alpha)
    check_shapes("otc_rewards", "N", correct=correct, tool_calls=tool_calls)
    if correct.dtype != torch.bool:
        raise fail("otc_rewards", "correct", "torch.bool", correct.dtype, "Compare with a number.")
    (calls_N,) = floats(tool_calls)
    tool_N = (calls_N * math.pi / (2 * calls_N + c)).cos()
    if groups is not None:
        groups = Groups.of(groups, calls_N.shape[0], calls_N.device)
        least_G = group_stats(torch.where(correct, calls_N, torch.nan), groups).min
        least_N = torch.cat([least_G, least_G.new_zeros(1)])[groups.index]
        share_N = 2 * calls_N / torch.where(least_N == 0, 1.0, calls_N + least_N)  # f / n
        tool_N = torch.where(least_N == 0, tool_N, (share_N * math.pi / 2).sin())
    return torch.where(correct, alpha * tool_N, 0.0)


def gcpo_rewards(
    accuracy: Tensor,
    constructed: Tensor,
    groups: Groups | Tensor | int,
    *,
    weight: float,
    threshold: float,
    format_rewards: Tensor | None = None,
    length_rewards: Tensor | None = None,
) -> Tensor:
    """Rewards for auxiliary constructions where they help the group, and against where they harm.

    accuracy + format + length + weight * M * constructed, M = 1 where the group's mean accuracy
    with constructions is above that without by more than ``threshold``, -1 where it is below by
    more, else 0 (GCPO of GeometryZero, arXiv:2506.07160).

    Args:
        accuracy: [N] rewards of the answers.
        constructed: bool [N], responses with an auxiliary construction.
        groups: the size of every group, int ids [N], or :class:`fastpo.Groups`.
        weight: of the reward for constructions, >= 0.
        threshold: difference of means that counts, >= 0.
        format_rewards: [N]; 0 if not given.
        length_rewards: [N]; 0 if not given.

    Returns:
        [N] float32, or float64 for float64 rewards. M is 0 in a group without one of the two kinds.

    Raises:
        ValueError: shapes or dtypes do not fit or an option is out of range.

    The paper's weight, threshold and length reward were not read.

    Example:
        >>> accuracy = torch.tensor([1.0, 1.0, 0.0, 1.0])
        >>> constructed = torch.tensor([True, True, False, False])
        >>> gcpo_rewards(accuracy, constructed, 4, weight=0.5, threshold=0.1)
        tensor([1.5000, 1.5000, 0.0000, 1.0000])
    """
    for name, number in (("weight", weight), ("threshold", threshold)):
        if not 0 <= number < math.inf:
            raise fail("gcpo_rewards", name, "a number >= 0", number, "0 switches it off.")
    extras = {"format_rewards": format_rewards, "length_rewards": length_rewards}
    extras = {name: tensor for name, tensor in extras.items() if tensor is not None}
    tensors = {"accuracy": accuracy, "constructed": constructed} | extras
    check_operands("advantages.gcpo_rewards", **tensors)
    check_shapes("gcpo_rewards", "N", **tensors)
    if constructed.dtype != torch.bool:
        got = constructed.dtype
        raise fail("gcpo_rewards", "constructed", "torch.bool", got, "Call constructed.bool().")
    accuracy_N, *extras = floats(accuracy, *extras.values())
    groups = Groups.of(groups, accuracy_N.shape[0], accuracy_N.device)
    kinds_N2 = torch.stack([constructed, ~constructed], 1)
    stats = group_stats(torch.where(kinds_N2, accuracy_N[:, None], torch.nan), groups)
    gain_G = stats.mean[:, 0] - stats.mean[:, 1]
    sign_G = (gain_G > threshold).to(accuracy_N) - (gain_G < -threshold).to(accuracy_N)
    sign_G = torch.where((stats.count > 0).all(1), sign_G, 0.0)
    sign_N = torch.cat([sign_G, sign_G.new_zeros(1)])[groups.index]
    return sum(extras, accuracy_N) + torch.where(constructed, weight * sign_N, 0.0)


def last_token_rewards(rewards: Tensor, mask: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """Rewards of responses as rewards of tokens: each at the last token of its response.

    Args:
        rewards: [B] of responses.
        mask: bool [B, T] or packed [N], tokens of the responses.
        cu_seqlens: [B + 1] cumulative lengths of packed tokens.

    Returns:
        Laid out as the mask, float32, or float64 for float64 rewards. A response without a token
        keeps its reward to itself.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.

    Example:
        >>> mask = torch.tensor([[True, True, False]])
        >>> last_token_rewards(torch.tensor([2.0]), mask)
        tensor([[0., 2., 0.]])
    """
    check_tensors("advantages.last_token_rewards", rewards=rewards, mask=mask)
    offsets = check_tokens("last_token_rewards", {}, mask, cu_seqlens, {"rewards": rewards})
    (rewards_B,) = floats(rewards)
    last_B = last_tokens(active_tokens(mask, mask, offsets), offsets)
    # Place 0 is that of responses without a token.
    placed = rewards_B.new_zeros(mask.numel() + 1).scatter(0, last_B, rewards_B)
    return placed[1:].view(mask.shape)


def k1_in_reward(
    rewards: Tensor,
    old: Tensor,
    ref: Tensor,
    mask: Tensor | None = None,
    kl_coef: float | Tensor = 0.05,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Token rewards with the KL to the reference taken off at each token.

    r_t - kl_coef (log p_t - log ref_t)  (arXiv:2203.02155, eq. 2, token by token as in TRL and
    verl).

    Args:
        rewards: [B, T] or packed [N], of each token; see :func:`last_token_rewards`.
        old: log-probs of the tokens under the policy that wrote them, in nats.
        ref: the same under the reference.
        mask: bool, tokens of the responses; all if not given.
        kl_coef: a number or a 0-d tensor, such as :class:`AdaptiveKL` gives.
        cu_seqlens: [B + 1] cumulative lengths of packed tokens.

    Returns:
        Laid out as the rewards, float32, or float64 for float64 inputs; 0 outside the mask. No
        gradient.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.

    Example:
        >>> rewards = torch.tensor([[0.0, 1.0]])
        >>> k1_in_reward(rewards, torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -1.0]]))
        tensor([[-0.0250,  1.0500]])
    """
    check_tensors("advantages.k1_in_reward", rewards=rewards, old=old, ref=ref)
    tokens = {"rewards": rewards, "old": old, "ref": ref}
    offsets = check_tokens("k1_in_reward", tokens, mask, cu_seqlens)
    rewards, old, ref = floats(rewards, old, ref)
    active = active_tokens(rewards, mask, offsets)
    return torch.where(active, rewards - kl_coef * (old - ref), 0.0)


class AdaptiveKL(Memory):
    """The weight of a KL in the reward, which follows a target.

    kl_coef <- kl_coef (1 + clamp(mean kl / target - 1, -0.2, 0.2) n / horizon), over the n
    responses of a batch (arXiv:1909.08593, as in verl). In evaluation mode it stands still. Save
    its ``state_dict``: a run that goes on from a checkpoint needs it.

    Args:
        kl_coef: to start with, > 0.
        target: of the mean KL, > 0.
        horizon: responses after which 20 % too much KL at every batch has raised the weight by
            about 20 %, > 0.
        all_reduce: sums a tensor over ranks and returns it, for example
            ``fastpo.distributed.all_reduce_sum()``; without it every rank has a weight of its own.

    Example:
        >>> controller = AdaptiveKL(kl_coef=0.1, target=6.0, horizon=100)
        >>> controller(torch.tensor([9.0, 9.0]))
        tensor(0.1004)
    """

    def __init__(
        self,
        kl_coef: float = 0.2,
        target: float = 6.0,
        horizon: float = 10000,
        all_reduce: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        _check_positive("AdaptiveKL", kl_coef=kl_coef, target=target, horizon=horizon)
        super().__init__()
        self.target = target
        self.horizon = horizon
        self.all_reduce = all_reduce
        self.register_buffer("kl_coef", torch.tensor(kl_coef, dtype=torch.float64))

    @torch.no_grad()
    def forward(self, kl: Tensor) -> Tensor:
        """The weight after a batch with the KL ``kl`` [B] of each response; 0-d, in its dtype."""
        if self.training:
            sums = torch.stack([kl.double().sum(), kl.new_full((), kl.numel(), dtype=torch.double)])
            total, count = sums if self.all_reduce is None else self.all_reduce(sums)
            excess = (total / count.clamp(min=1) / self.target - 1).clamp(-0.2, 0.2)
            self.kl_coef *= 1 + excess * count / self.horizon
        return self.kl_coef.to(torch.promote_types(kl.dtype, torch.float32), copy=True)
