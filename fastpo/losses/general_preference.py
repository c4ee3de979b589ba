"""General preferences: scores of pairs that need not come from a reward, and their policy loss."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fastpo.checks import check_tensors
from fastpo.inputs import Trained
from fastpo.losses._common import (
    REDUCTIONS,
    LossOutput,
    Reduction,
    UnpairedOutput,
    check_choice,
    check_positive,
    fail,
    log_ratios,
    pair_output,
    prepare,
    unpaired_output,
)
from fastpo.losses._lists import masked_mean, prepare_lists
from fastpo.losses.margins import soft_logistic, squared


def gpm_score(first: Tensor, second: Tensor, scales: Tensor | None = None) -> Tensor:
    """Antisymmetric preference score of two responses from their embeddings.

    s = sum_i c_i (v_{2i} w_{2i+1} - v_{2i+1} w_{2i})  (arXiv:2410.02197): s(v, w) = -s(w, v) and
    s(v, v) = 0. Two dimensions (r, 1) give the difference of rewards, three unit vectors at 120
    degrees a preference that goes round in a circle.

    Args:
        first: [B, 2k] embeddings v.
        second: [B, 2k] embeddings w.
        scales: [B, k] weights c of the planes, as a function of the prompt; 1 if not given.

    Returns:
        [B] float32, or float64 if an input is; positive where the first is preferred.

    Raises:
        ValueError: shapes, devices or dtypes do not fit.

    Example:
        >>> gpm_score(torch.tensor([[1.2, 1.0]]), torch.tensor([[0.4, 1.0]]))
        tensor([0.8000])
    """
    check_tensors("losses.gpm_score", {"scales": scales}, first=first, second=second)
    for name, tensor in {"first": first, "second": second}.items():
        if tensor.ndim != 2 or tensor.shape[1] % 2 or tensor.shape != first.shape:
            remedy = "Embed both responses alike, in an even number of dimensions."
            raise fail("gpm_score", name, "[B, 2k], one shape", f"{list(tensor.shape)}", remedy)
    size, planes = first.shape[0], first.shape[1] // 2
    first, second = prepare("gpm_score", first=first.flatten(), second=second.flatten())
    first_BK2, second_BK2 = first.view(size, planes, 2), second.view(size, planes, 2)
    planes_BK = first_BK2[..., 0] * second_BK2[..., 1] - first_BK2[..., 1] * second_BK2[..., 0]
    if scales is not None:
        if scales.shape != planes_BK.shape:
            remedy = "Give one scale per plane."
            expected = f"shape {list(planes_BK.shape)}"
            raise fail("gpm_score", "scales", expected, f"{list(scales.shape)}", remedy)
        planes_BK = scales.to(planes_BK) * planes_BK
    return planes_BK.sum(1)


def gpm(
    chosen_embeddings: Trained,
    rejected_embeddings: Trained,
    scales: Trained | None = None,
    margins: Tensor | None = None,
    tau: float | None = None,
    form: Literal["logistic", "regression"] = "logistic",
    reduction: Reduction = "mean",
) -> LossOutput:
    """General preference model: logistic loss on an antisymmetric score.

    -logsigmoid((s - m) / tau), s as in :func:`gpm_score`  (arXiv:2410.02197; the authors' code).
    The authors' ``regression`` is (s / tau - 10)^2 / 2.

    Args:
        chosen_embeddings: [B, 2k] of the model that is trained.
        rejected_embeddings: [B, 2k] likewise.
        scales: [B, k] prompt-dependent weights of the planes; 1 if not given.
        margins: [B] m of ``logistic``; 0 if not given.
        tau: temperature, > 0; 1 for k = 1 and 0.1 above, as in the authors' code, if not given.
        form: ``logistic`` or ``regression``.
        reduction: ``mean`` over pairs, ``sum`` or ``none``.

    Returns:
        LossOutput; the rewards are s / tau and -s / tau.

    Raises:
        ValueError: shapes, devices or dtypes do not fit, or an option is out of range.

    Example:
        >>> pair = torch.tensor([[1.0, 0.5, -0.3, 0.8]]), torch.tensor([[0.2, 0.9, 0.4, -0.1]])
        >>> round(gpm(*pair).loss.item(), 4)
        0.0061
    """
    check_tensors(
        "losses.gpm",
        {"scales": scales, "margins": margins},
        chosen_embeddings=chosen_embeddings,
        rejected_embeddings=rejected_embeddings,
    )
    check_choice("gpm", "form", form, ("logistic", "regression"))
    check_choice("gpm", "reduction", reduction, REDUCTIONS)
    if tau is None:
        tau = 0.1 if chosen_embeddings.shape[-1] > 2 else 1.0
    check_positive("gpm", "tau", tau)
    score_B = gpm_score(chosen_embeddings, rejected_embeddings, scales)
    rewards_B = score_B / tau
    if form == "regression":
        if margins is not None:
            remedy = 'Leave margins out, or take form="logistic".'
            raise fail("gpm", "margins", "None with regression", "a tensor", remedy)
        return pair_output(squared(rewards_B, 10.0) / 2, rewards_B, -rewards_B, reduction)
    if margins is not None:
        score_B, margins_B = prepare("gpm", score=score_B, margins=margins.detach())
        score_B = score_B - margins_B
    return pair_output(soft_logistic(score_B / tau), rewards_B, -rewards_B, reduction)


def gpo_scores(table: Tensor) -> Tensor:
    """Mean preference score of each of K responses over all K, itself included.

    s_i = (1/K) sum_k s(i, k)  (arXiv:2410.02197, section 5). The authors' script takes
    t_ij - t_ji of a table that is antisymmetric already, which doubles s; this function does not.

    Args:
        table: [B, K, K] scores of row over column, with zeros on the diagonal.

    Returns:
        [B, K]

    Raises:
        ValueError: the table is not square.

    Example:
        >>> gpo_scores(torch.tensor([[[0.0, 0.6], [-0.6, 0.0]]]))
        tensor([[ 0.3000, -0.3000]])
    """
    check_tensors("losses.gpo_scores", table=table)
    if table.ndim != 3 or table.shape[1] != table.shape[2]:
        remedy = "Compare the K responses of a prompt with each other."
        raise fail("gpo_scores", "table", "[B, K, K]", f"{list(table.shape)}", remedy)
    return table.to(torch.promote_types(table.dtype, torch.float32)).mean(2)


def gpo(
    policy: Trained,
    ref: Tensor,
    scores: Tensor,
    mask: Tensor | None = None,
    beta: float = 0.001,
    reduction: Reduction = "mean",
) -> UnpairedOutput:
    """General preference optimisation over lists: log-ratios regress to scores.

    mean_i (policy_i - ref_i - s_i / beta)^2  (arXiv:2410.02197, eq. 5.1 to 5.3, log Z taken as 0).
    The reference is the previous iterate, which drew the responses. The released recipe trains on
    the best and the worst of five: :func:`gpo_pair`.

    Args:
        policy: [B, K] summed log-probs of the responses.
        ref: [B, K] the same under the previous iterate.
        scores: [B, K] mean preference scores as from :func:`gpo_scores`; no gradient.
        mask: [B, K] bool, True where there is a response; all of them if not given.
        beta: strength of the tie to the previous iterate, > 0.
        reduction: ``mean`` over prompts, ``sum`` or ``none``.

    Returns:
        UnpairedOutput; the rewards [B, K] are beta (policy - ref).

    Raises:
        ValueError: shapes, devices or dtypes do not fit, or an option is out of range.

    Example:
        >>> scores = torch.tensor([[0.4, -0.2, -0.2]]) / 3
        >>> out = gpo(torch.tensor([[0.2, -0.1, -0.4]]), torch.zeros(1, 3), scores, beta=0.5)
        >>> round(out.loss.item(), 4)
        0.0256
    """
    check_positive("gpo", "beta", beta)
    check_choice("gpo", "reduction", reduction, REDUCTIONS)
    policy_BK, ref_BK, scores_BK, mask_BK = prepare_lists(
        "gpo", mask, policy=policy, ref=ref, scores=scores
    )
    log_ratio_BK = policy_BK - ref_BK.detach()
    loss_B = masked_mean(squared(log_ratio_BK, scores_BK / beta), mask_BK)
    return unpaired_output(loss_B, beta * log_ratio_BK, reduction)


def gpo_pair(
    policy_chosen: Trained,
    policy_rejected: Trained,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    beta: float = 0.001,
    reduction: Reduction = "mean",
) -> LossOutput:
    """General preference optimisation on the best and the worst response of a list.

    [(a - s_chosen / beta)^2 + (b - s_rejected / beta)^2] / 2 with the log-ratios a and b against
    the previous iterate  (arXiv:2410.02197, section 5, on two responses). Scores of 1/2 and -1/2
    give half of SPPO's loss. The factor 1/2 is from memory of the trainer the recipe plugs into.

    Args:
        policy_chosen: [B] summed log-probs of the best responses, nats.
        policy_rejected: [B] the same of the worst responses.
        ref_chosen: [B] the same of the best responses under the previous iterate.
        ref_rejected: [B] the same of the worst responses under the previous iterate.
        chosen_scores: [B] mean preference scores of the best responses; no gradient.
        rejected_scores: [B] the same of the worst responses.
        beta: strength of the tie to the previous iterate, > 0.
        reduction: ``mean`` over pairs, ``sum`` or ``none``.

    Result and errors are those of :func:`dpo`.

    Example:
        >>> sums = [torch.tensor([x]) for x in (-2.5, -2.7, -2.7, -2.2, 0.4, -0.3)]
        >>> round(gpo_pair(*sums, beta=0.5).loss.item(), 4)
        0.185
    """
    chosen_B, rejected_B = log_ratios(
        "gpo_pair", policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, reduction
    )
    chosen_B, rejected_B, chosen_scores_B, rejected_scores_B = prepare(
        "gpo_pair",
        policy_chosen=chosen_B,
        policy_rejected=rejected_B,
        chosen_scores=chosen_scores,
        rejected_scores=rejected_scores,
    )
    terms_B = squared(chosen_B, chosen_scores_B / beta)
    loss_B = (terms_B + squared(rejected_B, rejected_scores_B / beta)) / 2
    return pair_output(loss_B, beta * chosen_B, beta * rejected_B, reduction)
