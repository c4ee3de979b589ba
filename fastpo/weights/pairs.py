"""Masks and weights of the tokens of pairs: which of them enter a sum of log-probs, and how much.

All work on padded rows [B, T] and give [B, T]; the two responses may be padded to different T.
Tokens outside the mask get False or 0. They go into ``fastpo.sequence_sums(values, mask)`` or
``(values, mask, weights=weights)``; for packed values index them with the mask of the tokens that
were packed: ``weights[mask]``. Weights are constants: none carries a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpo.checks import check_tensors
from fastpo.weights._common import (
    accumulation,
    check_like,
    check_masks,
    check_range,
    fail,
    positions,
    uniform,
)


def ld_dpo_weights(
    chosen_mask: Tensor, rejected_mask: Tensor, alpha: float = 0.5
) -> tuple[Tensor, Tensor]:
    """LD-DPO: what a response has beyond the length of the other one counts less.

    1 for the first min(n_chosen, n_rejected) tokens of a response and alpha for the rest
    (arXiv:2409.06411), so that the shorter response is never changed. TRL weighs the log-probs of
    policy and reference, LLaMA-Factory those of the policy alone, which is another loss: the caller
    decides by what the weights are applied to. With alpha = 1 nothing changes.

    Args:
        chosen_mask: [B, T] bool, True at the tokens of the chosen responses; gaps are skipped.
        rejected_mask: [B, T'] of the rejected ones.
        alpha: weight of the excess tokens, in [0, 1].

    Returns:
        Weights [B, T] of the chosen and [B, T'] of the rejected tokens, float32.

    Raises:
        ValueError: masks do not fit, or alpha is out of range.

    Example:
        >>> chosen, rejected = torch.ones(1, 4).bool(), torch.ones(1, 2).bool()
        >>> ld_dpo_weights(chosen, rejected)
        (tensor([[1.0000, 1.0000, 0.5000, 0.5000]]), tensor([[1., 1.]]))
    """
    check_range("ld_dpo_weights", "alpha", alpha, 0, 1, "1 switches it off.")
    check_masks("ld_dpo_weights", chosen_mask=chosen_mask, rejected_mask=rejected_mask)
    shorter_B1 = torch.minimum(chosen_mask.sum(1), rejected_mask.sum(1))[:, None]

    def weights(mask_BT: Tensor) -> Tensor:
        return mask_BT * torch.where(positions(mask_BT) < shorter_B1, 1.0, alpha)

    return weights(chosen_mask), weights(rejected_mask)


def sampo_masks(
    chosen_mask: Tensor, rejected_mask: Tensor, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """SamPO: as many tokens of the longer response as the shorter one has, drawn at random.

    Uniform and without replacement (arXiv:2406.10957). Draw once per pair and use the masks for
    policy and reference. The authors' code draws anew for each, so that its log-ratios compare
    different tokens.

    Args:
        chosen_mask: [B, T] bool, True at the tokens of the chosen responses.
        rejected_mask: [B, T'] of the rejected ones.
        generator: of the random numbers, on any device; torch's own if None.

    Returns:
        Masks [B, T] and [B, T'], each with min(n_chosen, n_rejected) tokens in a row.

    Raises:
        ValueError: masks do not fit.

    Example:
        >>> chosen, rejected = torch.ones(1, 4).bool(), torch.ones(1, 2).bool()
        >>> [mask.sum().item() for mask in sampo_masks(chosen, rejected)]
        [2, 2]
    """
    check_masks("sampo_masks", chosen_mask=chosen_mask, rejected_mask=rejected_mask)
    shorter_B1 = torch.minimum(chosen_mask.sum(1), rejected_mask.sum(1))[:, None]

    def drawn(mask_BT: Tensor) -> Tensor:
        keys_BT = uniform(mask_BT.shape, mask_BT.device, generator).masked_fill(~mask_BT, 2.0)
        ranks_BT = keys_BT.argsort(1).argsort(1)
        return mask_BT & (ranks_BT < shorter_B1)

    return drawn(chosen_mask), drawn(rejected_mask)


def divergence_masks(
    chosen_tokens: Tensor, rejected_tokens: Tensor, chosen_mask: Tensor, rejected_mask: Tensor
) -> tuple[Tensor, Tensor]:
    """MCTS-DPO: both responses from the first token in which they differ, to their ends.

    The shared prefix of two siblings of a search tree is left out (arXiv:2405.00451, the authors'
    code). A pair that never differs, or only by one response going on where the other ends, is
    skipped: both masks are empty. Leave such pairs out of the mean by ``chosen_mask.any(1)``.

    Args:
        chosen_tokens: [B, T] token ids.
        rejected_tokens: [B, T'] token ids.
        chosen_mask: [B, T] bool, True at the tokens of the chosen responses. Responses are compared
            token by token from their own first, wherever it stands in the row.
        rejected_mask: [B, T'] of the rejected ones.

    Returns:
        Masks [B, T] and [B, T'].

    Raises:
        ValueError: masks or tokens do not fit.

    Example:
        >>> tokens, mask = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 8]]), torch.ones(2, 4).bool()
        >>> others = torch.tensor([[5, 9, 7, 8], [5, 6, 7, 8]])
        >>> divergence_masks(tokens, others, mask, mask)[0]
        tensor([[False,  True,  True,  True],
                [False, False, False, False]])
    """
    name = "divergence_masks"
    check_masks(name, chosen_mask=chosen_mask, rejected_mask=rejected_mask)
    check_like(name, "chosen_tokens", chosen_tokens, "chosen_mask", chosen_mask)
    check_like(name, "rejected_tokens", rejected_tokens, "rejected_mask", rejected_mask)
    width = max(chosen_mask.shape[1], rejected_mask.shape[1], 1)

    def aligned(tokens_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Response tokens from the first column on; the rest goes to a column that is cut off."""
        columns_BT = torch.where(mask_BT, positions(mask_BT), width)
        empty_BT = tokens_BT.new_zeros(tokens_BT.shape[0], width + 1)
        return empty_BT.scatter(1, columns_BT, tokens_BT)[:, :width]

    index_T = torch.arange(width, device=chosen_mask.device)
    shorter_B1 = torch.minimum(chosen_mask.sum(1), rejected_mask.sum(1))[:, None]
    chosen_BT, rejected_BT = (
        aligned(chosen_tokens, chosen_mask),
        aligned(rejected_tokens, rejected_mask),
    )
    differs_BT = (chosen_BT != rejected_BT) & (index_T < shorter_B1)
    first_B1 = torch.where(differs_BT, index_T, width).amin(1, keepdim=True)
    return tuple(mask & (positions(mask) >= first_B1) for mask in (chosen_mask, rejected_mask))


def step_masks(mask: Tensor, prefix_counts: Tensor, step_counts: Tensor | None = None) -> Tensor:
    """Step-DPO: one step of a response, behind the correct steps before it.

    (arXiv:2406.18629.) The loss is :func:`fastpo.losses.dpo` on the tokens of the correct and of
    the wrong next step. No end-of-sequence token follows a step: leave it out of the data, or of
    ``step_counts``.

    Args:
        mask: [B, T] bool, True at the tokens of the responses, earlier steps included.
        prefix_counts: [B] tokens of the earlier steps, which are left out.
        step_counts: [B] tokens of the step; None for all that follow.

    Returns:
        Mask [B, T].

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> step_masks(torch.ones(1, 5).bool(), torch.tensor([2]), torch.tensor([2]))
        tensor([[False, False,  True,  True, False]])
    """
    check_masks("step_masks", mask=mask)
    check_like("step_masks", "prefix_counts", prefix_counts, "mask[:, 0]", mask.sum(1))
    position_BT = positions(mask)
    step_BT = mask & (position_BT >= prefix_counts[:, None])
    if step_counts is None:
        return step_BT
    check_like("step_masks", "step_counts", step_counts, "mask[:, 0]", mask.sum(1))
    return step_BT & (position_BT < (prefix_counts + step_counts)[:, None])


def phrase_masks(phrase_ids: Tensor, mask: Tensor) -> Tensor:
    """RRPO: the tokens of the phrases in which two responses differ.

    (arXiv:2504.12083.) The sums of all phrases are added up, so the numbers of the phrases do not
    matter.

    Args:
        phrase_ids: [B, T] integers: 0 outside, 1 .. P within an aligned phrase.
        mask: [B, T] bool, True at the tokens of the responses.

    Returns:
        Mask [B, T].

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> phrase_masks(torch.tensor([[0, 1, 1, 2]]), torch.tensor([[True, True, True, False]]))
        tensor([[False,  True,  True, False]])
    """
    check_masks("phrase_masks", mask=mask)
    check_like("phrase_masks", "phrase_ids", phrase_ids, "mask", mask)
    return mask & (phrase_ids > 0)


def tgdpo_weights(
    chosen_rewards: Tensor, rejected_rewards: Tensor, alpha: float = 0.5, beta: float = 0.1
) -> tuple[Tensor, Tensor]:
    """TGDPO: weights 1 + alpha beta q of the chosen and 1 - alpha beta q of the rejected tokens.

    (arXiv:2506.14574.) :func:`fastpo.losses.dpo` of the weighted sums, with the same beta, is
    :func:`fastpo.losses.tgdpo`. Weights are not clipped and may be negative, as in the authors'
    code.

    Args:
        chosen_rewards: [B, T] token rewards q of the chosen: log-probs of a frozen model that was
            trained on preferences minus those of the reference, nats.
        rejected_rewards: [B, T'] of the rejected ones.
        alpha: strength of the guidance.
        beta: as in the loss.

    Returns:
        Weights [B, T] and [B, T'], float32 or, for float64, float64.

    Raises:
        ValueError: a value is not finite.

    Example:
        >>> tgdpo_weights(torch.tensor([[2.0, 0.0]]), torch.tensor([[2.0]]))
        (tensor([[1.1000, 1.0000]]), tensor([[0.9000]]))
    """
    check_tensors(
        "weights.tgdpo_weights", chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards
    )
    scale = alpha * beta
    if not abs(scale) < float("inf"):
        raise fail("tgdpo_weights", "alpha, beta", "finite numbers", f"{alpha}, {beta}", "")
    return 1 + scale * accumulation(chosen_rewards), 1 - scale * accumulation(rejected_rewards)


def ma_po_weights(activations: Tensor, mask: Tensor) -> Tensor:
    """MaPO: token weights in [0, 1] from the activations of the reference model.

    The activations of a token are averaged, normalised over the response and rescaled,
    (x - min) / (max - min)  (arXiv:2410.05102, the authors' code; the z-score that it takes first
    drops out). They serve as the weights of both sums of :func:`fastpo.losses.sparse_po`. A
    response whose activations are all alike, 0 / 0 there, gets ones here.

    Args:
        activations: [B, T, ...] of the reference; dimensions behind the tokens are averaged.
        mask: [B, T] bool, True at the tokens of the responses.

    Returns:
        Weights [B, T], float32 or, for float64, float64; 0 outside the mask.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> ma_po_weights(torch.tensor([[3.0, 1.0, 2.0]]), torch.ones(1, 3).bool())
        tensor([[1.0000, 0.0000, 0.5000]])
    """
    check_tensors("weights.ma_po_weights", activations=activations)
    check_masks("ma_po_weights", mask=mask)
    values_BT = accumulation(activations)
    values_BT = values_BT.flatten(2).mean(2) if values_BT.ndim > 2 else values_BT
    check_like("ma_po_weights", "activations", values_BT, "mask", mask)
    if mask.shape[1] == 0:  # no minimum of nothing
        return values_BT
    low_B1 = values_BT.masked_fill(~mask, torch.inf).amin(1, keepdim=True)
    range_B1 = values_BT.masked_fill(~mask, -torch.inf).amax(1, keepdim=True) - low_B1
    scaled_BT = torch.where(range_B1 > 0, (values_BT - low_B1) / range_B1, 1.0)
    return torch.where(mask, scaled_BT, 0.0)
