import pytest
import torch

from fastpo.data.selection import (
    best_of_n,
    draw_attribute_counts,
    greedy_attributes,
    pairs_from_rewrites,
    ranked_lists,
    top_fraction,
)

NAN, INF = float("nan"), float("inf")


def places(selection):
    return list(zip(*(x.tolist() for x in selection), strict=True))


def scores_with_ties(prompts=50, responses=4):
    scores = torch.randint(0, 6, (prompts, responses)).double()
    scores[torch.rand(prompts, responses) < 0.2] = NAN
    scores[0] = NAN
    return scores


def known(scores):
    return [(b, k) for b, row in enumerate(scores.tolist()) for k, s in enumerate(row) if s == s]


@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.5, 1.0])
def test_top_fraction_against_a_sort(fraction):
    scores = scores_with_ties()
    best = sorted(known(scores), key=lambda place: -scores[place])
    assert places(top_fraction(scores, fraction)) == best[: int(len(best) * fraction)]


def test_fraction_one_and_one_sample_keep_everything():
    scores = torch.randn(7, 3)
    assert sorted(places(top_fraction(scores, 1.0))) == known(scores)
    assert sorted(places(best_of_n(scores[:, :1]))) == known(scores[:, :1])
    assert len(top_fraction(torch.randn(100, 1), 0.29).prompt) == 29


def test_raft_loss_of_a_selection():
    # Two kept sequences: the sum of log-probs over the sum of tokens.
    logps, counts = torch.tensor([[-20.0, -99.0], [-15.0, -99.0]]), torch.full((2, 2), 99)
    counts[:, 0] = torch.tensor([20, 15])
    kept = best_of_n(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    assert (-kept.gather(logps).sum() / kept.gather(counts).sum()).item() == 1.0


def test_best_of_n_against_a_loop():
    scores = scores_with_ties()
    want = []
    for b in range(50):
        columns = [k for p, k in known(scores) if p == b]
        if columns:
            want.append((b, max(columns, key=lambda k: scores[b, k].item())))
    assert places(best_of_n(scores)) == want
    assert places(best_of_n(torch.tensor([[NAN, -INF], [NAN, NAN]]))) == [(0, 1)]


def test_ranked_lists():
    lists = ranked_lists(torch.tensor([[1.2, 2.0, NAN, 2.0], [NAN, NAN, -INF, NAN]]))
    assert lists.order.tolist() == [[1, 3, 0, 2], [2, 0, 1, 3]]
    assert lists.counts.tolist() == [3, 1]


def test_ecpo_vector():
    scores = torch.tensor([[5, 2, 3, 1]])
    assert places(pairs_from_rewrites(scores, 2)) == [(0, 1), (0, 3)]
    assert places(pairs_from_rewrites(scores)) == [(0, 1), (0, 2), (0, 3)]  # all below 5
    partly = torch.tensor([[5.0, NAN], [0.0, 2.0]])
    assert places(pairs_from_rewrites(partly, 2)) == [(1, 0), (1, 1)]
    assert places(pairs_from_rewrites(torch.zeros(2, 0), 2)) == []


def test_empty_batches():
    empty = torch.zeros(0, 3)
    assert places(top_fraction(empty)) == places(best_of_n(empty)) == []
    assert ranked_lists(empty).order.shape == (0, 3)


def greedy_loop(vectors, is_soft, seed, soft, hard):
    """The released loop, with its running minimum written out over all chosen ones."""
    cosine = torch.nn.functional.cosine_similarity
    left, chosen = [i for i in range(len(vectors)) if i != seed], [seed]
    missing = {True: soft - 1, False: hard}
    while left and (missing[True] > 0 or missing[False] > 0):
        score = [min(cosine(vectors[j], vectors[c], dim=0) for c in chosen) for j in left]
        best = left.pop(score.index(min(score)))
        if missing[bool(is_soft[best])] > 0:
            missing[bool(is_soft[best])] -= 1
            chosen.append(best)
    return chosen


@pytest.mark.parametrize(("soft", "hard"), [(1, 0), (3, 4), (1, 9), (9, 1), (30, 30)])
def test_greedy_attributes_against_the_released_loop(soft, hard):
    vectors = torch.randn(30, 4, dtype=torch.float64)
    is_soft = torch.rand(30) < 0.5
    is_soft[7] = True
    got = greedy_attributes(vectors, is_soft, 7, soft, hard).tolist()
    assert got == greedy_loop(vectors, is_soft, 7, soft, hard)
    kinds = is_soft[got]
    assert kinds.sum() == min(soft, int(is_soft.sum()))
    assert (~kinds).sum() == min(hard, int((~is_soft).sum()))


def test_low_similarity_to_one_is_enough():
    # 1 is next to the seed 0, but opposite to 2, which was chosen first: so it comes before 3.
    vectors = torch.tensor([[1.0, 0.0], [1.0, 0.1], [-1.0, 0.0], [0.0, 1.0]])
    got = greedy_attributes(vectors, torch.ones(4) == 1, 0, soft=3, hard=0)
    assert got.tolist() == [0, 2, 1]


def test_attribute_counts():
    generator = torch.Generator().manual_seed(0)
    drawn = [draw_attribute_counts(generator) for _ in range(3000)]
    assert {soft for soft, _ in drawn} == set(range(1, 10))
    assert {soft + hard for soft, hard in drawn} == set(range(10, 51))
    small = {draw_attribute_counts(generator, 2, 3) for _ in range(100)}
    assert small == {(1, 1), (1, 2), (2, 1)}


def test_errors():
    ones = torch.ones(3) == 1
    with pytest.raises(ValueError, match="fraction: expected a number in"):
        top_fraction(torch.zeros(2, 2), 1.2)
    with pytest.raises(ValueError, match="K >= 1 responses"):
        best_of_n(torch.zeros(2, 0))
    with pytest.raises(ValueError, match="seed: expected a soft attribute"):
        greedy_attributes(torch.zeros(3, 2), ~ones, 0, 1, 1)
    with pytest.raises(ValueError, match="seed: expected a soft attribute"):
        greedy_attributes(torch.zeros(3, 2), ones, 3, 1, 1)
    with pytest.raises(ValueError, match="soft: expected at least 1"):
        greedy_attributes(torch.zeros(3, 2), ones, 0, 0, 1)
    with pytest.raises(ValueError, match="is_soft: expected bool"):
        greedy_attributes(torch.zeros(3, 2), torch.ones(3), 0, 1, 1)
    with pytest.raises(ValueError, match="max_size: expected at least 10"):
        draw_attribute_counts(torch.Generator(), 10, 9)
