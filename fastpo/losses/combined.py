"""Sums of losses: DPO with the likelihood of a response, with rationales, with a second adapter.

Inputs, a, b and d are those of :mod:`fastpo.losses.pairwise`. The likelihood comes in two means,
over the tokens of the batch or over those of a response: see :func:`orpo`.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fastpo.checks import check_tensors
from fastpo.inputs import Trained
from fastpo.losses._common import (
    NLL_MEANS,
    REDUCTIONS,
    LossOutput,
    NllMean,
    Reduction,
    UnpairedOutput,
    check_choice,
    check_finite,
    check_not_negative,
    fail,
    log_ratios,
    negative_log_likelihood,
    pair_output,
    prepare,
    reduce,
    unpaired_output,
)
from fastpo.losses.margins import soft_logistic


def sft(
    policy_chosen: Trained,
    chosen_counts: Tensor,
    nll_mean: NllMean = "token_mean",
    reduction: Reduction = "mean",
) -> UnpairedOutput:
    """Negative log-likelihood of the chosen responses.

    ``token_mean`` is TRL's loss type of this name. With ``reduction="none"`` every response carries
    its share, so that the mean is the loss. The rewards are the summed log-probs.

    Args:
        policy_chosen: [B] summed log-probs of the responses, any float dtype, nats.
        chosen_counts: [B] their tokens.
        nll_mean: ``token_mean`` or ``sequence_mean``.
        reduction: ``mean`` over responses, ``sum`` or ``none``.

    Raises:
        ValueError: shapes, devices or dtypes do not fit, or an option is unknown.

    Example:
        >>> round(sft(torch.tensor([-2.5, -3.6, -1.5]), torch.tensor([3, 4, 1])).loss.item(), 4)
        0.95
    """
    check_choice("sft", "nll_mean", nll_mean, NLL_MEANS)
    check_choice("sft", "reduction", reduction, REDUCTIONS)
    sums_B, counts_B = prepare("sft", policy_chosen=policy_chosen, chosen_counts=chosen_counts)
    return unpaired_output(negative_log_likelihood(sums_B, counts_B, nll_mean), sums_B, reduction)


def mixture(
    outputs: Mapping[str, LossOutput | UnpairedOutput], weights: Mapping[str, float]
) -> LossOutput:
    """Weighted sum of losses of the same pairs, as by ``loss_type`` and ``loss_weights`` of TRL.

    sum_k w_k loss_k. All must be reduced in the same way. With ``reduction="none"`` the sum is by
    pair and may be weighted by pair before its mean, as WPO does.

    Args:
        outputs: results of losses, by name; at least one of them over pairs.
        weights: their weights, by the same names.

    Returns:
        LossOutput; the rewards are those of the first loss over pairs, the metrics the losses by
        name.

    Raises:
        ValueError: names differ, no loss is over pairs, a weight is not finite, or reductions
            differ.

    Example:
        >>> sums = [torch.tensor([x]) for x in (-2.5, -2.7, -2.7, -2.2)]
        >>> from fastpo.losses import dpo
        >>> parts = {"dpo": dpo(*sums, beta=0.5), "sft": sft(sums[0], torch.tensor([3]))}
        >>> round(mixture(parts, {"dpo": 1.0, "sft": 0.5}).loss.item(), 4)
        0.95
    """
    paired = [output for output in outputs.values() if isinstance(output, LossOutput)]
    if outputs.keys() != weights.keys() or not paired:
        got = f"{sorted(outputs)} and {sorted(weights)}, {len(paired)} over pairs"
        remedy = "Give each loss its weight; one must have chosen and rejected rewards."
        raise fail("mixture", "weights", "the names of outputs", got, remedy)
    total = 0.0
    for name, output in outputs.items():
        check_finite("mixture", f"weights[{name!r}]", weights[name])
        if output.loss.shape != paired[0].loss.shape:
            got, remedy = f"{list(output.loss.shape)}", "Use one reduction for all."
            raise fail("mixture", name, f"shape {list(paired[0].loss.shape)}", got, remedy)
        total = total + weights[name] * output.loss
    metrics = {name: output.loss.detach() for name, output in outputs.items()}
    return LossOutput(total, paired[0].chosen_rewards, paired[0].rejected_rewards, metrics)


def _with_nll(
    loss: str,
    sums: tuple[Tensor, ...],
    counts: Tensor,
    nll: tuple[Tensor | None, Tensor | None],
    beta: float,
    weights: tuple[float, float, float],
    nll_mean: NllMean,
    reduction: Reduction,
) -> LossOutput:
    """w_0 dpo + w_1 bco_pair + w_2 NLL."""
    check_choice(loss, "nll_mean", nll_mean, NLL_MEANS)
    if (nll[0] is None) != (nll[1] is None):
        remedy = "Pass the other one as well."
        raise fail(loss, "nll_sums, nll_counts", "both or neither", "one of them", remedy)
    chosen_B, rejected_B = log_ratios(loss, *sums, beta, reduction)
    chosen_B, rejected_B, nll_sums_B, nll_counts_B = prepare(
        loss,
        policy_chosen=chosen_B,
        policy_rejected=rejected_B,
        nll_sums=sums[0] if nll[0] is None else nll[0],
        nll_counts=counts if nll[1] is None else nll[1],
    )
    chosen_B, rejected_B = beta * chosen_B, beta * rejected_B
    nll_B = negative_log_likelihood(nll_sums_B, nll_counts_B, nll_mean)
    loss_B = weights[0] * soft_logistic(chosen_B - rejected_B) + weights[2] * nll_B
    if weights[1]:
        loss_B = loss_B + weights[1] * (soft_logistic(chosen_B) + soft_logistic(-rejected_B))
    return pair_output(loss_B, chosen_B, rejected_B, reduction, nll=reduce(nll_B, "mean"))


def rpo(
    policy_chosen: Trained,
    policy_rejected: Trained,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    chosen_counts: Tensor,
    beta: float = 0.01,
    eta: float = 0.005,
    nll_mean: NllMean = "token_mean",
    nll_sums: Trained | None = None,
    nll_counts: Tensor | None = None,
    reduction: Reduction = "mean",
) -> LossOutput:
    """RPO: DPO plus the likelihood of a baseline response, against over-optimisation.

    -logsigmoid(beta d) + eta NLL  (arXiv:2405.16436; coefficients of TRL's paper index). The one
    coefficient stands for the paper's product of eta and beta. Other arguments, result and errors
    are those of :func:`dpo`; the metric ``nll`` is the mean NLL.

    Args:
        chosen_counts: [B] tokens of the chosen responses.
        eta: weight of the likelihood, >= 0; 0 is :func:`dpo`.
        nll_mean: ``token_mean`` or ``sequence_mean``.
        nll_sums: [B] summed log-probs of the baseline responses; the chosen ones if not given.
        nll_counts: [B] tokens of ``nll_sums``; both or neither.

    Example:
        >>> sums = [torch.tensor([x]) for x in (-2.5, -2.7, -2.7, -2.2)]
        >>> round(rpo(*sums, torch.tensor([3]), beta=0.5).loss.item(), 4)
        0.5375
    """
    check_tensors(
        "losses.rpo", {"nll_sums": nll_sums, "nll_counts": nll_counts}, chosen_counts=chosen_counts
    )
    check_not_negative("rpo", "eta", eta)
    sums = policy_chosen, policy_rejected, ref_chosen, ref_rejected
    nll = nll_sums, nll_counts
    return _with_nll("rpo", sums, chosen_counts, nll, beta, (1.0, 0.0, eta), nll_mean, reduction)


def iterative_rpo(
    policy_chosen: Trained,
    policy_rejected: Trained,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    chosen_counts: Tensor,
    beta: float = 0.1,
    alpha: float = 1.0,
    nll_mean: NllMean = "sequence_mean",
    reduction: Reduction = "mean",
) -> LossOutput:
    """Iterative RPO: DPO plus the likelihood of the chosen chain of thought.

    -logsigmoid(beta d) - alpha S_chosen / n_chosen  (arXiv:2404.19733). TRL's mixture of sigmoid
    and sft has the mean over all tokens, ``nll_mean="token_mean"``. Other arguments, result and
    errors are those of :func:`dpo`; the metric ``nll`` is the mean NLL.

    Args:
        chosen_counts: [B] tokens of the chosen responses.
        alpha: weight of the likelihood, >= 0; 0 is :func:`dpo`.
        nll_mean: ``sequence_mean`` or ``token_mean``.

    Example:
        >>> sums = [torch.tensor([x]) for x in (-2.5, -2.7, -2.7, -2.2)]
        >>> round(iterative_rpo(*sums, torch.tensor([3]), beta=0.5).loss.item(), 4)
        1.3667
    """
    check_tensors("losses.iterative_rpo", chosen_counts=chosen_counts)
    check_not_negative("iterative_rpo", "alpha", alpha)
    sums = policy_chosen, policy_rejected, ref_chosen, ref_rejected
    weights = 1.0, 0.0, alpha
    return _with_nll(
        "iterative_rpo", sums, chosen_counts, (None, None), beta, weights, nll_mean, reduction
    )


def mpo_internvl(
    policy_chosen: Trained,
    policy_rejected: Trained,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    chosen_counts: Tensor,
    beta: float = 0.1,
    dpo_weight: float = 0.8,
    bco_weight: float = 0.2,
    nll_weight: float = 1.0,
    nll_mean: NllMean = "token_mean",
    reduction: Reduction = "mean",
) -> LossOutput:
    """Mixed preference optimisation of InternVL: preference, quality and generation together.

    0.8 :func:`dpo` + 0.2 :func:`bco_pair` + 1.0 NLL of the chosen response  (arXiv:2411.10442, as
    TRL puts it together). Other arguments, result and errors are those of :func:`dpo`; the metric
    ``nll`` is the mean NLL.

    Args:
        chosen_counts: [B] tokens of the chosen responses.
        dpo_weight: of the preference loss, >= 0.
        bco_weight: of the quality loss, >= 0.
        nll_weight: of the likelihood, >= 0.
        nll_mean: ``token_mean`` or ``sequence_mean``.

    Example:
        >>> sums = [torch.tensor([x]) for x in (-2.5, -2.7, -2.7, -2.2)]
        >>> round(mpo_internvl(*sums, torch.tensor([3]), beta=0.5).loss.item(), 4)
        1.5041
    """
    check_tensors("losses.mpo_internvl", chosen_counts=chosen_counts)
    weights = dpo_weight, bco_weight, nll_weight
    for name, weight in zip(("dpo_weight", "bco_weight", "nll_weight"), weights, strict=True):
        check_not_negative("mpo_internvl", name, weight)
    sums = policy_chosen, policy_rejected, ref_chosen, ref_rejected
    return _with_nll(
        "mpo_internvl", sums, chosen_counts, (None, None), beta, weights, nll_mean, reduction
    )
