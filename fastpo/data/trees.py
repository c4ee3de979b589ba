"""Search trees: values up the tree, and pairs of siblings; scores of children are in ``search``.

A tree is its nodes in an order in which parents come before children. It is small next to the
model's work; what walks it does so on the CPU, in float64.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastpo.data._checks import at_least, bools, choice, fail, real, same_shape
from fastpo.data.pairs import Pairs
from fastpo.data.search import visit_labels


class Tree(NamedTuple):
    """The nodes of one search tree; node 0 is the root.

    Attributes:
        parent: [N] int64, -1 for the root; smaller than the node itself.
        value: [N] evaluation of the state of a node, by a judge or the outcome.
        visits: [N] how often the search came through.
    """

    parent: Tensor
    value: Tensor
    visits: Tensor


class TreePairs(NamedTuple):
    """P pairs of steps that follow the same node.

    A step is one node, or the chain from it down to the next choice: from ``chosen`` to
    ``chosen_end``, in which every node but the last has a single child.

    Attributes:
        node: [P] int64, the node after which the two steps part; its path is the prompt.
        chosen: [P] int64, first node of the better step.
        chosen_end: [P] int64, its last node.
        rejected: [P] int64, first node of the worse step.
        rejected_end: [P] int64, its last node.
        label: [P] soft label of the visit counts, see :func:`~fastpo.data.search.visit_labels`.
    """

    node: Tensor
    chosen: Tensor
    chosen_end: Tensor
    rejected: Tensor
    rejected_end: Tensor
    label: Tensor


def _check_parents(function: str, parent: Tensor) -> None:
    nodes = torch.arange(len(parent), device=parent.device)
    real(function, "parent", parent, "N")
    if not len(parent) or parent[0] != -1 or ((parent < 0) | (parent >= nodes))[1:].any():
        expected = "-1 for node 0 and a smaller node for every other"
        remedy = "Number the nodes in the order in which they were added, one tree at a time."
        raise fail(function, "parent", expected, f"{parent.tolist()[:8]}", remedy)


def backed_up_values(tree: Tree, gamma: float = 1.0) -> tuple[Tensor, Tensor]:
    """Q and V of every node from the evaluations below it: MCTS-DPO (arXiv:2405.00451), its code.

    r = value - value of the parent, Q = r + gamma V, and V of a node is the mean of Q over its
    children weighted by max(1, visits); V = 0 without children.

    Args:
        tree: the nodes.
        gamma: discount of a step.

    Returns:
        Q and V, [N] float64 on the CPU. The root has no parent: its r is its value.

    Raises:
        ValueError: the nodes are not one tree in order.

    Example:
        >>> tree = Tree(torch.tensor([-1, 0, 0]), torch.tensor([0.2, 0.7, 0.4]),
        ...             torch.tensor([4, 3, 1]))
        >>> backed_up_values(tree)[0]
        tensor([0.6250, 0.5000, 0.2000], dtype=torch.float64)
    """
    _check_parents("backed_up_values", tree.parent)
    same_shape("backed_up_values", **tree._asdict())
    parents, values = tree.parent.tolist(), tree.value.tolist()
    weights = tree.visits.clamp(min=1).tolist()
    count = len(parents)
    q_N, v_N, total_N, weight_N = ([0.0] * count for _ in range(4))
    for node in reversed(range(count)):
        parent = parents[node]
        v_N[node] = total_N[node] / weight_N[node] if weight_N[node] else 0.0
        q_N[node] = values[node] - (values[parent] if node else 0.0) + gamma * v_N[node]
        if node:
            total_N[parent] += weights[node] * q_N[node]
            weight_N[parent] += weights[node]
    return torch.tensor(q_N, dtype=torch.float64), torch.tensor(v_N, dtype=torch.float64)


def sibling_pairs(
    tree: Tree,
    q: Tensor,
    v: Tensor,
    rejected: Literal["worst", "second", "random"] = "worst",
    max_pairs: int = 8,
    is_selected: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> TreePairs:
    """Pairs of siblings along the selected path of a tree: MCTS-DPO (arXiv:2405.00451), its code.

    At each node of the path with at least two children, these are sorted by (Q, pi, r, value, N),
    pi being 1 / n for the n most visited ones and 0 for the others. The last is chosen. Two that
    are equal in all five would be no preference and give no pair (the released code keeps it).

    Args:
        tree: the nodes.
        q: [N] of :func:`backed_up_values`; children with NaN are left out.
        v: [N] of the same.
        rejected: the ``worst`` sibling (the released setting), the ``second`` best, or a
            ``random`` one.
        max_pairs: the first so many pairs from the root.
        is_selected: bool [N], nodes the search moved to. If not given the most visited child is
            taken, then the larger Q, then the larger V, then the first.
        generator: source of the random choice, on the CPU.

    Returns:
        TreePairs, from the root down.

    Raises:
        ValueError: the nodes are not one tree in order, or an option does not fit.

    Example:
        >>> tree = Tree(torch.tensor([-1, 0, 0, 1]), torch.tensor([0.2, 0.7, 0.4, 0.9]),
        ...             torch.tensor([4, 3, 1, 2]))
        >>> sibling_pairs(tree, *backed_up_values(tree))[:5]
        (tensor([0]), tensor([1]), tensor([3]), tensor([2]), tensor([2]))
    """
    function = "sibling_pairs"
    choice(function, "rejected", rejected, ("worst", "second", "random"))
    at_least(function, "max_pairs", max_pairs, 0)
    if rejected == "random" and generator is None:
        remedy = "Give a torch.Generator, so that the pairs can be drawn again."
        raise fail(function, "generator", "one with rejected='random'", "None", remedy)
    _check_parents(function, tree.parent)
    same_shape(function, **tree._asdict(), q=q, v=v)
    selected = None
    if is_selected is not None:
        selected = bools(function, "is_selected", is_selected, tree.parent.shape).tolist()
    parents, values, visits = (x.tolist() for x in tree)
    q_N, v_N = q.tolist(), v.tolist()
    children: list[list[int]] = [[] for _ in parents]
    for node, parent in enumerate(parents[1:], 1):
        children[parent].append(node)

    def end(node: int) -> int:
        while len(children[node]) == 1:
            node = children[node][0]
        return node

    rows, node = [], end(0)
    while children[node] and len(rows) < max_pairs:
        siblings = children[node]
        most = max(visits[c] for c in siblings)
        share = 1 / sum(visits[c] == most for c in siblings)
        keys = {
            c: (q_N[c], share * (visits[c] == most), values[c] - values[node], values[c], visits[c])
            for c in siblings
            if q_N[c] == q_N[c]
        }
        ranked = sorted(keys, key=keys.__getitem__)
        if len(ranked) >= 2:
            place = {"worst": 0, "second": -2}.get(rejected)
            if place is None:
                place = int(torch.randint(len(ranked) - 1, (), generator=generator))
            best, worse = ranked[-1], ranked[place]
            if keys[best] != keys[worse]:
                rows.append((node, best, end(best), worse, end(worse)))
        moved = [c for c in siblings if selected and selected[c]]
        if selected and not moved:
            break
        node = end(moved[0] if moved else max(siblings, key=lambda c: (visits[c], q_N[c], v_N[c])))
    columns = torch.tensor(rows, dtype=torch.int64).reshape(-1, 5).unbind(1)
    visits_N = tree.visits.cpu()
    return TreePairs(*columns, visit_labels(visits_N[columns[1]], visits_N[columns[3]]))


def sibling_gap_pairs(parent: Tensor, q: Tensor, threshold: float) -> Pairs:
    """All pairs of siblings of a tree, or of several, whose Q differ by more than ``threshold``.

    Agent Q's pairs (arXiv:2408.07199) for every node at once; the threshold's value in the paper
    could not be verified.

    Args:
        parent: [N] int64, negative for a root.
        q: [N] values, NaN where a node has none.
        threshold: strict lower bound of the difference.

    Returns:
        Pairs of nodes: ``prompt`` is the parent, ``chosen`` the child of the larger Q.

    Raises:
        ValueError: shapes do not fit, or the threshold is negative.

    Example:
        >>> sibling_gap_pairs(torch.tensor([-1, 0, 0, 0]), torch.tensor([0.0, 0.4, 0.6, 0.5]), 0.15)
        Pairs(prompt=tensor([0]), chosen=tensor([2]), rejected=tensor([1]), label=None)
    """
    at_least("sibling_gap_pairs", "threshold", threshold, 0)
    q_N = real("sibling_gap_pairs", "q", q, "N")
    same_shape("sibling_gap_pairs", q=q, parent=parent)
    is_sibling_NN = (parent[:, None] == parent) & (parent >= 0)
    chosen, rejected = (is_sibling_NN & (q_N[:, None] - q_N > threshold)).nonzero().unbind(1)
    order = parent[chosen].sort(stable=True).indices
    return Pairs(parent[chosen][order], chosen[order], rejected[order])
