"""SRPO: a generator and an improver that play against each other, from offline pairs."""

from __future__ import annotations

from torch import Tensor

from fastpo.checks import check_tensors
from fastpo.inputs import Trained
from fastpo.losses._common import (
    LossOutput,
    Reduction,
    check_share,
    log_ratios,
    pair_output,
    prepare,
    reduce,
)
from fastpo.losses.margins import squared


def srpo(
    policy_chosen: Trained,
    policy_rejected: Trained,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    chosen_given_rejected: Trained,
    rejected_given_chosen: Trained,
    chosen_given_chosen: Trained,
    rejected_given_rejected: Trained,
    ref_chosen_given_rejected: Tensor,
    ref_rejected_given_chosen: Tensor,
    ref_chosen_given_chosen: Tensor,
    ref_rejected_given_rejected: Tensor,
    label: Tensor | None = None,
    beta: float = 0.1,
    alpha: float = 0.5,
    reduction: Reduction = "mean",
) -> LossOutput:
    """Self-improving robust preference optimisation: policy and improver in one network.

    (1 - alpha) joint + alpha improver, for the game of arXiv:2406.01660. Let l(y|x) be the
    log-ratio of response y to the prompt, and l(y|x,z) that of y as an improvement of z, with z in
    the prompt. With w chosen, r rejected and p the probability that w beats r,

    - joint = (p - 1/2 - beta/2 [l(w|x,r) - l(r|x,w) + l(w|x) - l(r|x)])^2,
    - improver = mean of (p - 1/2 - beta [l(w|x,r) - l(r|x,r)])^2 and
      (1/2 - p - beta [l(r|x,w) - l(w|x,w)])^2.

    Both are 0 at the solution: improver proportional to ref exp(P / beta), policy to ref / Z. With
    the improver at the reference and p = 1 the joint loss is beta^2 / 4 times IPO on sums with its
    tau = beta / 2. Other losses bear the same acronym.

    Args:
        chosen_given_rejected: [B] summed log-probs of the chosen response as an improvement of the
            rejected one, nats.
        rejected_given_chosen: [B] and so on, for each of the four.
        chosen_given_chosen: [B] a response as its own improvement.
        rejected_given_rejected: [B] likewise.
        ref_chosen_given_rejected: [B] the same four under the reference.
        ref_rejected_given_chosen: [B] likewise.
        ref_chosen_given_chosen: [B] likewise.
        ref_rejected_given_rejected: [B] likewise.
        label: [B] p; 1 if not given.
        alpha: share of the improver loss, in [0, 1].

    Other arguments and errors are those of :func:`dpo`.

    Returns:
        LossOutput; the rewards are those of the policy, beta l(w|x) and beta l(r|x), the metrics
        ``joint`` and ``improver`` the means of the two losses.

    Experimental: reviews confirm the game and the convex mix; the losses are derived from it and
    exact in the tabular case; the paper's alpha and beta were not read.

    Example:
        >>> plain = torch.tensor([[-12.0], [-14.5], [-13.0], [-14.0]])
        >>> conditional = torch.tensor([[-11.0], [-15.0], [-8.0], [-9.0]])
        >>> ref_conditional = torch.tensor([[-12.0], [-14.5], [-8.2], [-9.5]])
        >>> round(srpo(*plain, *conditional, *ref_conditional).loss.item(), 4)
        0.1581
    """
    check_tensors(
        "losses.srpo",
        {"label": label},
        ref_chosen_given_rejected=ref_chosen_given_rejected,
        ref_rejected_given_chosen=ref_rejected_given_chosen,
        ref_chosen_given_chosen=ref_chosen_given_chosen,
        ref_rejected_given_rejected=ref_rejected_given_rejected,
    )
    check_share("srpo", "alpha", alpha)
    chosen_B, rejected_B = log_ratios(
        "srpo", policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, reduction
    )
    conditional = {
        "chosen_given_rejected": (chosen_given_rejected, ref_chosen_given_rejected),
        "rejected_given_chosen": (rejected_given_chosen, ref_rejected_given_chosen),
        "chosen_given_chosen": (chosen_given_chosen, ref_chosen_given_chosen),
        "rejected_given_rejected": (rejected_given_rejected, ref_rejected_given_rejected),
    }
    streams = {"policy_chosen": chosen_B, "policy_rejected": rejected_B}
    for name, (policy, ref) in conditional.items():
        streams |= {name: policy, f"ref_{name}": ref.detach()}
    if label is not None:
        streams["label"] = label.detach()
    chosen_B, rejected_B, *rest = prepare("srpo", **streams)
    gain_B = (rest[8] if label is not None else 1.0) - 0.5
    improved_B, worsened_B, same_chosen_B, same_rejected_B = (
        policy_B - ref_B for policy_B, ref_B in zip(rest[0:8:2], rest[1:8:2], strict=True)
    )
    joint_margin_B = beta / 2 * (improved_B - worsened_B + chosen_B - rejected_B)
    joint_B = squared(joint_margin_B, gain_B)
    upwards_B = squared(beta * (improved_B - same_rejected_B), gain_B)
    downwards_B = squared(beta * (worsened_B - same_chosen_B), -gain_B)
    improver_B = (upwards_B + downwards_B) / 2
    means = {"joint": reduce(joint_B, "mean"), "improver": reduce(improver_B, "mean")}
    loss_B = (1 - alpha) * joint_B + alpha * improver_B
    return pair_output(loss_B, beta * chosen_B, beta * rejected_B, reduction, **means)
