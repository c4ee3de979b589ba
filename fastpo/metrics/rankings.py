"""Rankings, implicit rewards and the information in them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastpo.metrics._common import fail, prepare


def _share(flags_B: Tensor, dtype: torch.dtype, among_B: Tensor | None = None) -> Tensor:
    """Share of True, of all or of those of ``among_B``; 0 if there are none."""
    right = flags_B.sum().to(dtype)
    return right / (max(flags_B.numel(), 1) if among_B is None else among_B.sum().clamp(min=1))


def ranking_accuracy(
    chosen: Tensor,
    rejected: Tensor,
    chosen_counts: Tensor | None = None,
    rejected_counts: Tensor | None = None,
    tie_band: float = 0.0,
) -> Tensor:
    """Share of pairs whose chosen response is the more likely one (arXiv:2405.19534).

    Args:
        chosen: [B] summed log-probs of the chosen responses, of any model.
        rejected: [B] of the rejected ones.
        chosen_counts: [B] tokens; with both counts, means per token are compared.
        rejected_counts: [B] tokens.
        tie_band: pairs with a likelihood ratio of less than this from 1 are ties and left out; the
            authors use 0.05. Without it equal values count as wrong.

    Returns:
        0-d, in [0, 1]; 0 if there is no pair.

    Raises:
        ValueError: shapes do not fit, or only one of the counts is given.

    Example:
        >>> ranking_accuracy(torch.tensor([-2.5, -3.6, -1.5]), torch.tensor([-2.7, -2.1, -4.4]))
        tensor(0.6667)
    """
    name = "ranking_accuracy"
    if (chosen_counts is None) != (rejected_counts is None):
        remedy = "Pass both for means per token, or none for sums."
        raise fail(name, "chosen_counts, rejected_counts", "both or none", "one", remedy)
    chosen_B, rejected_B = prepare(name, chosen=chosen, rejected=rejected)
    if chosen_counts is not None:
        counts = dict(chosen_counts=chosen_counts, rejected_counts=rejected_counts)
        chosen_B, rejected_B, chosen_n_B, rejected_n_B = prepare(
            name, chosen=chosen_B, rejected=rejected_B, **counts
        )
        chosen_B, rejected_B = (
            chosen_B / chosen_n_B.clamp(min=1),
            rejected_B / rejected_n_B.clamp(min=1),
        )
    gap_B = chosen_B - rejected_B
    clear_B = ~(torch.expm1(gap_B).abs() < tie_band)
    return _share((gap_B > 0) & clear_B, gap_B.dtype, clear_B)


def reward_accuracy(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """Share of pairs whose chosen response has the larger implicit reward; ties count as wrong.

    TRL's ``rewards/accuracies``.

    Args:
        chosen_rewards: [B] as in the result of a loss.
        rejected_rewards: [B] of the rejected ones.

    Returns:
        0-d, in [0, 1]; 0 if there is no pair.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> reward_accuracy(torch.tensor([0.2, 0.1]), torch.tensor([-0.5, 0.2]))
        tensor(0.5000)
    """
    names = dict(chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards)
    chosen_B, rejected_B = prepare("reward_accuracy", **names)
    return _share(chosen_B > rejected_B, chosen_B.dtype)


def ideal_log_ratios(
    ref_chosen: Tensor, ref_rejected: Tensor, agreement: Tensor | float = 0.75, beta: float = 0.1
) -> Tensor:
    """Log-ratio of chosen over rejected that the optimum of DPO would have.

    log pi*(chosen) / pi*(rejected) = R_chosen - R_rejected + log(share / (1 - share)) / beta
    (arXiv:2405.19534). Where it is positive even a perfectly trained policy ranks the pair right:
    ``(ideal_log_ratios(...) > 0).float().mean()`` is the idealised ranking accuracy. Its
    exponential, the ratio, overflows at a small beta. The authors' branch without length
    normalisation divides log-likelihoods by each other; this is no such ratio.

    Args:
        ref_chosen: [B] log-probs under the reference, summed, or means per token for the
            length-normalised form.
        ref_rejected: [B] of the rejected ones.
        agreement: share of annotators who prefer the chosen response, [B] or one number; held to
            [0.001, 0.999]. 0.75 is the authors' guess where it is unknown.
        beta: of the training, > 0.

    Returns:
        [B].

    Raises:
        ValueError: shapes do not fit, or beta is not positive.

    Example:
        >>> ideal_log_ratios(torch.tensor([-2.7]), torch.tensor([-2.2]), agreement=0.7, beta=0.1)
        tensor([7.9730])
    """
    if not 0 < beta < math.inf:
        raise fail("ideal_log_ratios", "beta", "a positive finite number", repr(beta), "Try 0.1.")
    chosen_B, rejected_B = prepare(
        "ideal_log_ratios", ref_chosen=ref_chosen, ref_rejected=ref_rejected
    )
    if isinstance(agreement, Tensor):
        share = agreement.detach().to(chosen_B)
    else:
        share = torch.full_like(chosen_B, agreement)
    return chosen_B - rejected_B + torch.logit(share, eps=1e-3) / beta


def pair_difficulty(ref_chosen: Tensor, ref_rejected: Tensor, beta: float = 0.1) -> Tensor:
    """DPO loss to which a pair must come down before its ranking is right.

    -logsigmoid(beta (R_rejected - R_chosen))  (arXiv:2405.19534): the policy ranks the pair right
    once its loss is below. Beyond log 2 where the reference already does.

    Args:
        ref_chosen: [B] summed log-probs under the reference.
        ref_rejected: [B] of the rejected ones.
        beta: of the training.

    Returns:
        [B], > 0; small is hard.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> pair_difficulty(torch.tensor([-2.7]), torch.tensor([-2.2]), beta=0.5)
        tensor([0.5759])
    """
    names = dict(ref_chosen=ref_chosen, ref_rejected=ref_rejected)
    chosen_B, rejected_B = prepare("pair_difficulty", **names)
    return -torch.nn.functional.logsigmoid(beta * (rejected_B - chosen_B))


def did_entropy(log_ratios: Tensor, proposal: Tensor | None = None) -> Tensor:
    """Entropy of the differential information distribution of a preference-trained policy.

    q is proportional to pi(y) / pi_ref(y) (arXiv:2505.23761). Over all responses it is exact. From
    samples y_i of a proposal the weights exp(log-ratio_i) / proposal_i are self-normalised:
    H = log mean_i w_i - sum_i (w_i / sum w) log-ratio_i, which is biased for few samples.

    Args:
        log_ratios: [..., Y] log pi - log pi_ref of all responses, or of samples (32 per prompt in
            the paper).
        proposal: [..., Y] log-probs of the samples under the model that wrote them, the policy's
            own if it did; None if the responses are all there are.

    Returns:
        [...] nats.

    Raises:
        ValueError: shapes do not fit.

    Experimental: the definition was read second-hand; the sample form is self-normalised importance
    sampling of it, not the paper's.

    Example:
        >>> policy, ref = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.5, 0.3])
        >>> did_entropy(policy.log() - ref.log())
        tensor(0.8712)
    """
    if proposal is None:
        (ratios_Y,) = prepare("did_entropy", log_ratios=log_ratios)
        return torch.special.entr(ratios_Y.softmax(-1)).sum(-1)
    ratios_Y, proposal_Y = prepare("did_entropy", log_ratios=log_ratios, proposal=proposal)
    log_weights_Y = ratios_Y - proposal_Y
    log_sum = log_weights_Y.logsumexp(-1)
    mean = (log_weights_Y.softmax(-1) * ratios_Y).sum(-1)
    return log_sum - math.log(log_weights_Y.shape[-1]) - mean
