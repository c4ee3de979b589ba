"""What a tree search reads off its nodes: priors, scores of children, mixed values, labels."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpo.data._checks import fail, floats, same_shape


def sequence_priors(sums: Tensor, counts: Tensor, length_penalty: float = 1.25) -> Tensor:
    """Prior p = exp(sum of log-probs / tokens ** length_penalty), MCTS-DPO's prior of a step.

    Args:
        sums: [...] summed log-probs of the steps, nats.
        counts: [...] their tokens; an empty step counts as one token.
        length_penalty: 1 gives the geometric mean of the token probabilities.

    Returns:
        [...] priors.

    Example:
        >>> sequence_priors(torch.tensor([-2.0]), torch.tensor([4]), length_penalty=1.0)
        tensor([0.6065])
    """
    sums = floats(sums)
    return torch.exp(sums / counts.clamp(min=1).to(sums.dtype) ** length_penalty)


def puct_scores(
    q: Tensor, prior: Tensor, visits: Tensor, parent_visits: Tensor, exploration: float = 1.0
) -> Tensor:
    """Q + exploration p sqrt(N_parent) / (1 + N): MCTS-DPO searches the child of the largest.

    Args:
        q: [...] of the children; the other tensors broadcast to it.
        prior: p of :func:`sequence_priors`.
        visits: N of the children.
        parent_visits: N of their parent.
        exploration: weight of the second term.

    Returns:
        [...] scores.

    Example:
        >>> puct_scores(torch.tensor([0.5]), torch.tensor(0.5), torch.tensor(3), torch.tensor(4))
        tensor([0.7500])
    """
    q = floats(q)
    return q + exploration * prior * parent_visits.to(q.dtype).sqrt() / (1 + visits)


def ucb_scores(
    q: Tensor, visits: Tensor, parent_visits: Tensor, exploration: float = 1.0
) -> Tensor:
    """Q + exploration sqrt(log N_parent / (1 + N)): Agent Q (arXiv:2408.07199) takes the largest.

    Args:
        q: [...] of the children; the other tensors broadcast to it.
        visits: N of the children.
        parent_visits: N of their parent; 0 counts as 1.
        exploration: c_exp, whose value in the paper could not be verified.

    Returns:
        [...] scores.

    Example:
        >>> ucb_scores(torch.tensor([0.5]), torch.tensor(3), torch.tensor(7))
        tensor([1.1975])
    """
    q = floats(q)
    return q + exploration * (parent_visits.clamp(min=1).to(q.dtype).log() / (1 + visits)).sqrt()


def mixed_q_values(search: Tensor, critic: Tensor, alpha: float = 0.5) -> Tensor:
    """Mixed alpha Q_search + (1 - alpha) Q_critic: Agent Q (arXiv:2408.07199), for pairs.

    Pairs come from :func:`fastpo.data.pairs.above_gap` on [nodes, children], or from
    :func:`fastpo.data.trees.sibling_gap_pairs`.

    Args:
        search: [...] backed-up values.
        critic: [...] values from the model's own ranking of the proposed actions.
        alpha: in [0, 1]; 1 is the search alone. Its value in the paper could not be verified.

    Returns:
        [...] values.

    Raises:
        ValueError: shapes differ, or alpha is out of range.

    Example:
        >>> mixed_q_values(torch.tensor([0.2, 0.8, 0.5]), torch.tensor([0.6, 0.4, 0.5]))
        tensor([0.4000, 0.6000, 0.5000])
    """
    same_shape("mixed_q_values", search=search, critic=critic)
    if not 0 <= alpha <= 1:
        remedy = "1 is the search alone, 0 the critic alone."
        raise fail("mixed_q_values", "alpha", "a number in [0, 1]", repr(alpha), remedy)
    # lerp keeps alpha 0 and 1 exact, and equal values equal.
    return torch.lerp(floats(critic), floats(search), alpha)


def visit_labels(chosen_visits: Tensor, rejected_visits: Tensor) -> Tensor:
    """Soft label of a pair of siblings from visit counts: MCTS-DPO's conservative loss.

    c = 1 / (1 + N_l / max(1, N_w)); the label is 1 - min(1 - c, 1/2) = max(c, 1/2).

    Args:
        chosen_visits: [P] N_w.
        rejected_visits: [P] N_l.

    Returns:
        [P] labels in [1/2, 1], float64 for integers.

    Example:
        >>> visit_labels(torch.tensor([6, 1, 0]), torch.tensor([2, 4, 0]))
        tensor([0.7500, 0.5000, 1.0000], dtype=torch.float64)
    """
    chosen_P, rejected_P = floats(chosen_visits), floats(rejected_visits)
    return (1 / (1 + rejected_P / chosen_P.clamp(min=1))).clamp(min=0.5)
