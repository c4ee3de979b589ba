"""Trees: backed-up values against recursion, pairs by hand, scores by the published numbers."""

import math

import pytest
import torch

from fastpo.data.search import (
    mixed_q_values,
    puct_scores,
    sequence_priors,
    ucb_scores,
    visit_labels,
)
from fastpo.data.trees import Tree, backed_up_values, sibling_gap_pairs, sibling_pairs

F64 = torch.float64
NAN = float("nan")


def random_tree(nodes):
    parent = torch.tensor([-1] + [int(torch.randint(0, n, ())) for n in range(1, nodes)])
    return Tree(parent, torch.randn(nodes, dtype=F64), torch.randint(0, 5, (nodes,)))


def steps(pairs):
    return list(zip(*(x.tolist() for x in pairs[:5]), strict=True))


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_backup_against_recursion(gamma):
    tree = random_tree(60)
    parent, value, visits = (x.tolist() for x in tree)

    def q_of(node):
        reward = value[node] - (value[parent[node]] if node else 0)
        return reward + gamma * v_of(node)

    def v_of(node):
        children = [n for n in range(60) if parent[n] == node]
        weights = [max(1, visits[c]) for c in children]
        total = sum(w * q_of(c) for w, c in zip(weights, children, strict=True))
        return total / sum(weights) if children else 0.0

    q, v = backed_up_values(tree, gamma)
    want = torch.tensor([[q_of(n), v_of(n)] for n in range(60)], dtype=F64)
    torch.testing.assert_close(torch.stack([q, v], 1), want, rtol=1e-12, atol=1e-12)


def test_a_chain_backs_up_its_last_value():
    # With gamma 1 the differences along a chain add up to value_last - value_start.
    tree = Tree(torch.arange(-1, 4), torch.randn(5, dtype=F64), torch.ones(5).long())
    q, v = backed_up_values(tree)
    torch.testing.assert_close(q[1], tree.value[4] - tree.value[0])
    torch.testing.assert_close(v[0], q[1])


def test_published_numbers():
    ucb = ucb_scores(torch.tensor(0.5, dtype=F64), torch.tensor(3), torch.tensor(7))
    torch.testing.assert_close(ucb.item(), 1.1974794171, rtol=0, atol=1e-9)
    mixed = mixed_q_values(torch.tensor([0.2, 0.8, 0.5]), torch.tensor([0.6, 0.4, 0.5]))
    torch.testing.assert_close(mixed, torch.tensor([0.4, 0.6, 0.5]), rtol=0, atol=1e-6)
    labels = visit_labels(torch.tensor([6, 1, 0]), torch.tensor([2, 4, 0]))
    assert labels.tolist() == [0.75, 0.5, 1.0]


def test_conservative_loss_of_a_visit_label():
    label = visit_labels(torch.tensor([6]), torch.tensor([2]))
    margin = torch.tensor(0.15, dtype=F64)
    loss = torch.nn.functional.softplus(-margin) + (1 - label) * margin
    torch.testing.assert_close(loss.item(), 0.65845704779, rtol=0, atol=1e-9)


def test_limits_of_the_scores():
    search, critic = torch.randn(9), torch.randn(9)
    assert torch.equal(mixed_q_values(search, critic, alpha=1.0), search)
    assert torch.equal(mixed_q_values(search, critic, alpha=0.0), critic)
    visits = torch.arange(9)
    assert visit_labels(visits, torch.zeros(9).long()).eq(1).all()
    assert (visit_labels(visits, visits.flip(0)) >= 0.5).all()
    # No visit of the parent: no bonus, and no NaN.
    assert torch.equal(ucb_scores(search, torch.tensor(0), torch.tensor(0)), search)
    assert torch.equal(puct_scores(search, torch.ones(9), visits, torch.tensor(0)), search)
    got = puct_scores(torch.tensor(0.5), torch.tensor(0.2), torch.tensor(1), torch.tensor(9), 2.0)
    torch.testing.assert_close(got.item(), 0.5 + 2 * 0.2 * 3 / 2)
    prior = sequence_priors(torch.tensor([-3.0, 0.0]), torch.tensor([4, 0]))
    torch.testing.assert_close(prior, torch.tensor([math.exp(-3 / 4**1.25), 1.0]))
    with pytest.raises(ValueError, match="alpha: expected a number in"):
        mixed_q_values(search, critic, alpha=1.5)
    with pytest.raises(ValueError, match="critic: expected shape"):
        mixed_q_values(search, critic[:2])


#        0
#     1     2        two choices at 0; 1 goes on alone to 3, then 4, 5, 6 to choose from
#     3     7
#   4 5 6   8
PARENT = torch.tensor([-1, 0, 0, 1, 3, 3, 3, 2, 7])
VISITS = torch.tensor([9, 6, 2, 5, 1, 3, 1, 1, 1])
Q = torch.tensor([0.0, 0.6, 0.2, 0.6, 0.1, 0.9, 0.5, 0.0, 0.0])
ZERO = torch.zeros(9)


def tree(value=ZERO, visits=VISITS):
    return Tree(PARENT, value, visits)


def test_chains_are_one_step_and_each_choice_on_the_path_gives_a_pair():
    pairs = sibling_pairs(tree(), Q, ZERO)
    assert steps(pairs) == [(0, 1, 3, 2, 8), (3, 5, 5, 4, 4)]
    assert pairs.label.tolist() == [0.75, 0.75]
    assert pairs.label.dtype == F64
    second = sibling_pairs(tree(), Q, ZERO, rejected="second")
    assert steps(second) == [(0, 1, 3, 2, 8), (3, 5, 5, 6, 6)]


def test_random_siblings_are_drawn_from_all_but_the_best():
    generator = torch.Generator().manual_seed(0)
    drawn = {
        steps(sibling_pairs(tree(), Q, ZERO, "random", generator=generator))[1][3]
        for _ in range(50)
    }
    assert drawn == {4, 6}
    with pytest.raises(ValueError, match="generator: expected one with rejected='random'"):
        sibling_pairs(tree(), Q, ZERO, "random")


def test_at_most_so_many_pairs_from_the_root():
    assert steps(sibling_pairs(tree(), Q, ZERO, max_pairs=1)) == [(0, 1, 3, 2, 8)]
    assert steps(sibling_pairs(tree(), Q, ZERO, max_pairs=0)) == []
    # A comb of 20 choices, the left child always the next to choose from.
    parent = torch.tensor([-1] + [max(0, n // 2 * 2 - 1) for n in range(40)])
    size = len(parent)
    values, visits = torch.rand(size), torch.arange(size, 0, -1)
    pairs = sibling_pairs(Tree(parent, values, visits), values, values)
    assert pairs.node.tolist() == [0, *range(1, 14, 2)]


def test_the_given_path_is_followed():
    is_selected = torch.zeros(9, dtype=torch.bool)
    is_selected[2] = True
    assert steps(sibling_pairs(tree(), Q, ZERO, is_selected=is_selected)) == [(0, 1, 3, 2, 8)]
    # Without a selected child the path ends.
    nowhere = torch.zeros(9, dtype=torch.bool)
    assert steps(sibling_pairs(tree(), Q, ZERO, is_selected=nowhere)) == [(0, 1, 3, 2, 8)]


def test_ties_go_down_the_list_of_keys():
    level = torch.zeros(9)
    # Equal Q: the most visited one has all of pi; the two others differ in r, then in N.
    by_visits = steps(sibling_pairs(tree(), level, ZERO))
    assert by_visits[1][1] == 5
    value = torch.tensor([0, 0, 0, 0, 0.3, 0.2, 0.1, 0, 0])
    assert steps(sibling_pairs(tree(value), level, ZERO))[1] == (3, 5, 5, 6, 6)
    alike = torch.ones(9).long()
    # Visits alike, r decides; at the root nothing differs, which is no preference.
    assert steps(sibling_pairs(tree(value, alike), level, ZERO)) == [(3, 4, 4, 6, 6)]
    assert steps(sibling_pairs(tree(ZERO, alike), level, ZERO)) == []


def test_children_without_a_value_are_left_out():
    q = Q.clone()
    q[5] = NAN
    assert steps(sibling_pairs(tree(), q, ZERO))[1] == (3, 6, 6, 4, 4)
    q[[1, 4, 6]] = NAN
    assert steps(sibling_pairs(tree(), q, ZERO)) == []


def test_a_root_alone_and_a_chain_have_no_pairs():
    for parent in (torch.tensor([-1]), torch.arange(-1, 3)):
        zero = torch.zeros(len(parent))
        assert steps(sibling_pairs(Tree(parent, zero, zero.long()), zero, zero)) == []


def test_gap_pairs_of_siblings_against_a_loop():
    tree, q = random_tree(40), torch.randn(40)
    q[5] = NAN
    parent, values = tree.parent.tolist(), q.tolist()
    for threshold in (0.0, 0.5):
        want = [
            (p, i, j)
            for p in range(40)
            for i in range(40)
            for j in range(40)
            if parent[i] == parent[j] == p and values[i] - values[j] > threshold
        ]
        got = sibling_gap_pairs(tree.parent, q, threshold)
        assert list(zip(*(x.tolist() for x in got[:3]), strict=True)) == want
    forest = sibling_gap_pairs(torch.tensor([-1, -1, 0, 1]), torch.randn(4), 0.0)
    assert forest.num_pairs == 0


@pytest.mark.parametrize("parent", [[], [0, 0], [-1, 1], [-1, 2, 0], [-1, 0, -1]])
def test_a_forest_or_a_wrong_order_is_refused(parent):
    parent = torch.tensor(parent, dtype=torch.int64)
    zero = torch.zeros(len(parent))
    with pytest.raises(ValueError, match="parent: expected -1 for node 0 and a smaller node"):
        backed_up_values(Tree(parent, zero, zero))


def test_shapes_and_options_are_checked():
    with pytest.raises(ValueError, match="value: expected shape"):
        backed_up_values(Tree(PARENT, torch.zeros(3), VISITS))
    with pytest.raises(ValueError, match="q: expected shape"):
        sibling_pairs(tree(), Q[:3], ZERO)
    with pytest.raises(ValueError, match="rejected: expected one of worst, second, random"):
        sibling_pairs(tree(), Q, ZERO, rejected="best")
    with pytest.raises(ValueError, match="is_selected: expected bool"):
        sibling_pairs(tree(), Q, ZERO, is_selected=torch.zeros(9))
