"""Losses over pairs that regress a margin over several policies: the reference and earlier rounds.

All take log-probs per response, in nats, prompt and padding left out. Neither the reference nor a
history gets a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from torch import Tensor

from fastpo.inputs import ESSENTIAL, Trained
from fastpo.losses._common import (
    REDUCTIONS,
    LossOutput,
    Reduction,
    check_choice,
    check_positive,
    check_share,
    fail,
    pair_output,
    prepare,
)
from fastpo.losses.margins import combine, squared

# Log-probs of earlier policies: without any, which is right in a first round alone, the loss is a
# plainer one.
History = Annotated[Sequence[Tensor], ESSENTIAL]


def _history_loss(
    loss: str,
    chosen: tuple[Tensor, Tensor, Sequence[Tensor]],
    rejected: tuple[Tensor, Tensor, Sequence[Tensor]],
    weights: list,
    eta: float,
    reduction: Reduction,
) -> LossOutput:
    check_positive(loss, "eta", eta)
    check_choice(loss, "reduction", reduction, REDUCTIONS)
    names = ["policy", "ref", *(f"history[{j}]" for j in range(len(weights) - 1))]
    coefficients = dict(zip(names, [1.0, *(-weight for weight in weights)], strict=True))
    streams = {}
    for side, (policy, ref, history) in (("chosen", chosen), ("rejected", rejected)):
        own = [name.replace("history", f"history_{side}") for name in names[2:]]
        own = [f"policy_{side}", f"ref_{side}", *own]
        streams |= dict(zip(own, [policy, ref, *history], strict=True))
    values_B, count = prepare(loss, **streams), len(names)
    chosen_B, rejected_B = (
        combine(dict(zip(names, side_B, strict=True)), coefficients)
        for side_B in (values_B[:count], values_B[count:])
    )
    loss_B = squared(chosen_B - rejected_B, 1 / (2 * eta))
    return pair_output(loss_B, eta * chosen_B, eta * rejected_B, reduction)


def _check_histories(loss: str, chosen: Sequence[Tensor], rejected: Sequence[Tensor]) -> None:
    if len(chosen) != len(rejected):
        got = f"{len(chosen)} and {len(rejected)} streams"
        remedy = "Give every earlier policy's log-probs of both responses, most recent first."
        raise fail(loss, "history_chosen, history_rejected", "one length", got, remedy)


def inpo(
    policy_chosen: Trained,
    policy_rejected: Trained,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    history_chosen: History = (),
    history_rejected: History = (),
    eta: float = 0.005,
    ratio: float = 1 / 3,
    reduction: Reduction = "mean",
) -> LossOutput:
    """Iterative Nash policy optimisation: a mirror-descent step of the regularised game.

    (h - 1 / (2 eta))^2,  h = D(policy) - ratio D(ref) - (1 - ratio) D(current), D the difference of
    summed log-probs of chosen and rejected (arXiv:2407.00617, eq. 8). The reference is the initial
    model, current the policy that wrote the pairs: log-probs of history 0, or of the reference in
    the first round, when there is none. The step's target is proportional to exp(win rate / eta)
    ref^ratio current^(1 - ratio); its fixed point is the Nash policy of the game with a KL to the
    reference of weight ratio * eta.

    Args:
        history_chosen: the first entry is the current policy's [B]; later ones are not used.
        history_rejected: likewise.
        eta: inverse step size, > 0; 1 / (2 eta) is the margin asked for.
        ratio: the paper's tau / eta, in [0, 1]. 1 is IPO on sums with its tau = eta, 0 self-play
            without the reference.

    Other arguments and errors are those of :func:`dpo`.

    Returns:
        LossOutput; the rewards are eta times each side of h: win rates, up to a constant.

    Example:
        >>> sums = torch.tensor([[-12.0], [-14.5], [-13.0], [-14.0]])
        >>> current = [torch.tensor([-12.5])], [torch.tensor([-14.2])]
        >>> round(inpo(*sums, *current, eta=0.5).loss.item(), 4)
        0.0011
    """
    check_share("inpo", "ratio", ratio)
    _check_histories("inpo", history_chosen, history_rejected)
    current_chosen = history_chosen[0] if history_chosen else ref_chosen
    current_rejected = history_rejected[0] if history_rejected else ref_rejected
    chosen = policy_chosen, ref_chosen, [current_chosen]
    rejected = policy_rejected, ref_rejected, [current_rejected]
    return _history_loss("inpo", chosen, rejected, [ratio, 1 - ratio], eta, reduction)


def mnpo(
    policy_chosen: Trained,
    policy_rejected: Trained,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    history_chosen: History = (),
    history_rejected: History = (),
    history_weights: Sequence[float] | None = None,
    eta: float = 0.0075,
    ratio: float = 1 / 3,
    max_history_t: int = 2,
    reduction: Reduction = "mean",
) -> LossOutput:
    """Multiplayer Nash policy optimisation: :func:`inpo` against several earlier policies.

    (h - 1 / (2 eta))^2,  h = D(policy) - ratio D(ref) - (1 - ratio) sum_j lambda_j D(history_j)
    (arXiv:2509.23102, the authors' code), lambda the weights of the first ``max_history_t``
    policies, brought to sum 1. Without a history the share 1 - ratio is lost, as in that code, not
    given to the reference: there :func:`inpo` differs.

    The authors' code gives log-probs averaged over tokens, in every stream; divide sums by counts
    for that. As it was released it takes lambda uniform: its configuration sets ``weights``, its
    trainer reads ``history_weights``.

    Args:
        history_chosen: [B] of each earlier policy, most recent first.
        history_rejected: likewise.
        history_weights: a number >= 0 for each of them; uniform if not given or if all are 0.
        eta: inverse step size, > 0.
        ratio: share of the reference, in [0, 1].
        max_history_t: how many earlier policies count, >= 0.

    Other arguments and errors are those of :func:`dpo`.

    Returns:
        LossOutput; the rewards are eta times each side of h.

    Example:
        >>> sums = torch.tensor([[-12.0], [-14.5], [-13.0], [-14.0]])
        >>> chosen = [torch.tensor([-12.5]), torch.tensor([-12.8])]
        >>> rejected = [torch.tensor([-14.2]), torch.tensor([-14.1])]
        >>> round(mnpo(*sums, chosen, rejected, eta=0.5).loss.item(), 4)
        0.0278
    """
    check_share("mnpo", "ratio", ratio)
    _check_histories("mnpo", history_chosen, history_rejected)
    if max_history_t < 0:
        raise fail("mnpo", "max_history_t", "a number >= 0", repr(max_history_t), "Give 2 or so.")
    used = min(len(history_chosen), max_history_t)
    shares = list(history_weights)[:used] if history_weights is not None else [1.0] * used
    if len(shares) < used or any(not 0 <= share < float("inf") for share in shares):
        expected, got = f"{used} finite numbers >= 0", repr(history_weights)
        raise fail("mnpo", "history_weights", expected, got, "One for each history that counts.")
    if sum(shares) == 0:
        shares = [1.0] * used
    weights = [ratio, *((1 - ratio) * share / sum(shares) for share in shares)]
    chosen = policy_chosen, ref_chosen, history_chosen[:used]
    rejected = policy_rejected, ref_rejected, history_rejected[:used]
    return _history_loss("mnpo", chosen, rejected, weights, eta, reduction)
