"""Rules from scores to pairs against plain loops, the vectors of the papers, and edge cases."""

from itertools import product

import pytest
import torch

from fastpo.data.pairs import (
    Pairs,
    above_gap,
    best_worst,
    both_orders,
    first_unless_worse,
    ranked_pairs,
    self_preference_pairs,
)
from fastpo.data.rules import (
    anchor_pairs,
    compare_by,
    dno_pairs,
    dno_prct_pairs,
    tournament_pairs,
    upo_pairs,
)
from fastpo.data.scores import mean_judgements, penalize_missing_eos, weighted_rewards
from fastpo.data.self_rewarding import (
    self_rewarding_pairs,
    temporal_first_pairs,
    temporal_second_pairs,
)
from fastpo.data.verdicts import mapl_margin_pairs, mapl_response_pairs
from fastpo.data.win_rates import bradley_terry_matrix, win_rates

NAN, INF = float("nan"), float("inf")
F64 = torch.float64


def triples(pairs):
    assert all(x.dtype == torch.int64 for x in pairs[:3])
    assert pairs.num_pairs == len(pairs.chosen) == len(pairs.rejected)
    return list(zip(*(x.tolist() for x in pairs[:3]), strict=True))


def scores_with_ties(prompts=200, responses=6):
    """Small integers, with NaN: every kind of tie and of missing score occurs."""
    scores = torch.randint(0, 4, (prompts, responses)).to(F64)
    scores[torch.rand(prompts, responses) < 0.25] = NAN
    scores[0], scores[1] = NAN, 2.0
    return scores


def known(row):
    return [(k, s) for k, s in enumerate(row) if s == s]


RULES = {
    "best_worst": best_worst,
    "best_worst, first two": lambda s: best_worst(s, equal="first_two"),
    "above_gap": above_gap,
    "ranked, adjacent": lambda s: ranked_pairs(s, "adjacent"),
    "ranked, all": ranked_pairs,
    "ranked, best": lambda s: ranked_pairs(s, "best_vs_rest"),
    "upo": upo_pairs,
    "dno": dno_pairs,
    "dno_prct": lambda s: dno_prct_pairs(s, torch.ones(s.shape[-1]) == 1, min_score=2),
    "self_rewarding": lambda s: self_rewarding_pairs(s[..., None]),
    "temporal, first": temporal_first_pairs,
    "temporal, second": lambda s: temporal_second_pairs(s, s),
    "mapl, response": mapl_response_pairs,
    "mapl, margin": mapl_margin_pairs,
}
KEEPS_EQUAL = ("best_worst, first two", "dno")


@pytest.mark.parametrize("name", RULES)
class TestEveryRule:
    def test_no_pair_without_two_scores(self, name):
        rule = RULES[name]
        for empty in (torch.zeros(0, 4), torch.zeros(3, 1), torch.full((2, 4), NAN)):
            assert triples(rule(empty)) == []
        assert triples(rule(torch.tensor([[NAN, 1.0, NAN]]))) == []
        assert triples(rule(torch.full((2, 1), INF))) == []

    def test_equal_scores_are_no_preference(self, name):
        if name not in KEEPS_EQUAL:
            assert triples(RULES[name](torch.full((2, 4), 3.0))) == []
            assert triples(RULES[name](torch.full((2, 4), INF))) == []

    def test_unscored_responses_are_in_no_pair(self, name):
        scores = scores_with_ties()
        pairs = RULES[name](scores)
        assert pairs.num_pairs > 0
        if not name.startswith("temporal"):
            for side in pairs.gather(scores):
                assert not side.isnan().any()

    def test_a_pair_is_better_against_worse(self, name):
        scores = scores_with_ties()
        if name not in KEEPS_EQUAL and not name.startswith("temporal"):
            assert (RULES[name](scores).gaps(scores) > 0).all()

    def test_prompts_do_not_see_each_other(self, name):
        scores = scores_with_ties(40)
        order = torch.randperm(40)
        whole, moved = RULES[name](scores), RULES[name](scores[order])
        back = [(int(order[p]), c, r) for p, c, r in triples(moved)]
        assert sorted(back) == sorted(triples(whole))
        assert sorted(whole.prompt.tolist()) == whole.prompt.tolist()

    def test_dtypes_agree(self, name):
        scores = scores_with_ties()
        want = triples(RULES[name](scores))
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert triples(RULES[name](scores.to(dtype))) == want
        whole = scores.nan_to_num(1)
        assert triples(RULES[name](whole.long())) == triples(RULES[name](whole))

    def test_wrong_shape(self, name):
        with pytest.raises(ValueError, match=r"fastpo\.data\.\w+: \w+: expected"):
            RULES[name](torch.zeros(3))


def test_best_worst_against_a_loop():
    scores = scores_with_ties()
    for min_gap in (0.0, 2.0):
        want = []
        for b, row in enumerate(scores.tolist()):
            found = known(row)
            if found:
                top, low = max(s for _, s in found), min(s for _, s in found)
                first = next(k for k, s in found if s == top)
                last = next(k for k, s in found if s == low)
                if top > low and top - low >= min_gap:
                    want.append((b, first, last))
        assert triples(best_worst(scores, min_gap)) == want


def test_infinite_scores_are_scores():
    scores = torch.tensor([[NAN, -INF, 1.0], [NAN, INF, -INF], [-INF, NAN, -INF]])
    assert triples(best_worst(scores)) == [(0, 2, 1), (1, 1, 2)]
    assert triples(ranked_pairs(scores)) == [(0, 2, 1), (1, 1, 2)]
    assert triples(above_gap(scores)) == [(0, 2, 1), (1, 1, 2)]


def test_mnpo_takes_the_first_two_of_equal_scores():
    scores = torch.tensor([[2.0, 2, 2], [1, 3, 1], [NAN, 2, 2], [NAN, NAN, 2]])
    want = [(0, 0, 1), (1, 1, 0), (2, 1, 2)]
    assert triples(best_worst(scores, equal="first_two")) == want
    lowest = torch.tensor([[NAN, -INF, -INF]])
    assert triples(best_worst(lowest, equal="first_two")) == [(0, 1, 2)]
    # A prompt of one score is level whatever gap is asked for.
    assert triples(best_worst(scores, min_gap=5.0, equal="first_two")) == [(0, 0, 1), (2, 1, 2)]


def test_selm_ranks_its_own_response_with_the_pair():
    # Columns: own greedy response, chosen, rejected.
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.9, 0.5, 0.1], [0.5, 0.1, 0.9]])
    assert triples(best_worst(scores)) == [(0, 1, 0), (1, 0, 2), (2, 2, 1)]


def test_online_dpo():
    scores = torch.tensor([[0.3, 0.3], [0.5, 0.9]])
    has_eos = torch.tensor([[True, True], [True, False]])
    pairs = first_unless_worse(penalize_missing_eos(scores, has_eos, 1.0))
    assert triples(pairs) == [(0, 0, 1), (1, 0, 1)]
    scores = torch.tensor([[1.0, 2.0], [NAN, 1.0], [1.0, NAN], [INF, INF]])
    assert triples(first_unless_worse(scores)) == [(0, 1, 0), (3, 0, 1)]
    with pytest.raises(ValueError, match=r"scores: expected \[B, 2\], got \[1, 3\]"):
        first_unless_worse(torch.zeros(1, 3))


def test_weighted_rewards_leave_out_what_was_not_scored():
    rewards = torch.tensor([[[1.0, NAN, NAN]], [[2.0, 3.0, NAN]]])
    got = weighted_rewards(rewards, torch.tensor([1.0, 0.5]))
    torch.testing.assert_close(got, torch.tensor([[2.0, 1.5, NAN]]), equal_nan=True)
    with pytest.raises(ValueError, match="weights: expected one weight for each of 2 rewards"):
        weighted_rewards(rewards, torch.ones(3))
    with pytest.raises(ValueError, match="has_eos: expected bool"):
        penalize_missing_eos(torch.zeros(2, 2), torch.ones(2, 2), 1.0)


def test_self_rewarding_vector():
    judgements = torch.tensor([[[4, 5, 4], [3, 3, 3], [5, 5, 4], [3, 2, 4]]])
    want = torch.tensor([[4.3333333333, 3, 4.6666666667, 3]], dtype=F64)
    torch.testing.assert_close(mean_judgements(judgements), want, rtol=0, atol=1e-9)
    assert triples(self_rewarding_pairs(judgements)) == [(0, 2, 1)]
    partly = judgements.float()
    partly[0, 2], partly[0, 0, 0] = NAN, NAN
    assert triples(self_rewarding_pairs(partly)) == [(0, 0, 1)]


def test_agent_q_vector():
    scores = torch.tensor([[0.4, 0.6, 0.5]])
    assert triples(above_gap(scores, 0.15)) == [(0, 1, 0)]
    assert triples(above_gap(scores, 0.05)) == [(0, 1, 0), (0, 1, 2), (0, 2, 0)]


def test_above_gap_against_a_loop():
    scores = scores_with_ties(50)
    for threshold in (0.0, 1.0):
        want = [
            (b, i, j)
            for b, row in enumerate(scores.tolist())
            for i, j in product(range(6), repeat=2)
            if row[i] - row[j] > threshold
        ]
        assert triples(above_gap(scores, threshold)) == want


@pytest.mark.parametrize("which", ["adjacent", "all", "best_vs_rest"])
def test_ranked_pairs_against_a_loop(which):
    scores = scores_with_ties()
    want = []
    for b, row in enumerate(scores.tolist()):
        ranked = sorted(known(row), key=lambda found: -found[1])
        for i, j in product(range(len(ranked)), repeat=2):
            taken = {"adjacent": j == i + 1, "all": j > i, "best_vs_rest": i == 0 and j > 0}[which]
            if taken and ranked[i][1] > ranked[j][1]:
                want.append((b, ranked[i][0], ranked[j][0]))
    assert triples(ranked_pairs(scores, which)) == want


def test_self_preferring_keeps_the_strengths():
    matrix = torch.tensor([[[0.5, 0.8, 0.3], [0.2, 0.5, 0.9], [0.7, 0.1, 0.5]]], dtype=F64)
    pairs = self_preference_pairs(matrix)
    assert triples(pairs) == [(0, 0, 1), (0, 0, 2), (0, 1, 2)]
    assert pairs.label.tolist() == [0.8, 0.3, 0.9]
    # A cycle has no best response, but its pairs say something.
    cycle = torch.tensor([[[0.5, 1.0, 0.0], [0.0, 0.5, 1.0], [1.0, 0.0, 0.5]]])
    assert self_preference_pairs(cycle).label.tolist() == [1.0, 0.0, 1.0]
    adjacent = self_preference_pairs(bradley_terry_matrix(torch.randn(5, 4)), "adjacent")
    assert adjacent.num_pairs == 15
    assert (adjacent.label > 0.5).all()
    cycle[0, 0, 1] = cycle[0, 1, 0] = NAN
    assert triples(self_preference_pairs(cycle)) == [(0, 1, 2), (0, 2, 0)]
    assert self_preference_pairs(torch.zeros(0, 3, 3)).num_pairs == 0
    assert self_preference_pairs(torch.zeros(2, 1, 1)).num_pairs == 0
    with pytest.raises(ValueError, match="which: expected one of"):
        self_preference_pairs(cycle, "some")


def test_dno_vector():
    rates = torch.tensor([[0.8, 0.3], [0.6, 0.65]], dtype=F64)
    pairs = dno_pairs(rates)
    assert triples(pairs) == [(0, 0, 1), (1, 0, 1)]
    want = torch.tensor([0.622459331202, 0.487502603516], dtype=F64)
    torch.testing.assert_close(pairs.label, want, rtol=0, atol=1e-9)
    narrow = dno_pairs(rates.float()).label
    torch.testing.assert_close(narrow, want.float(), rtol=0, atol=1e-5)
    assert dno_pairs(torch.tensor([[0.4, 0.4]])).label.tolist() == [0.5]
    assert dno_pairs(torch.rand(3, 5)).num_pairs == 3 * 10


def test_dno_prct_against_a_loop():
    scores = torch.randint(1, 7, (200, 6)).float()
    scores[torch.rand(200, 6) < 0.2] = NAN
    is_student, is_negative = torch.rand(200, 6) < 0.7, torch.rand(200, 6) < 0.1
    want = []
    for b, row in enumerate(scores.tolist()):
        for i, j in product(range(6), repeat=2):
            needed = 1 if is_student[b, i] else 2
            clear = row[i] - row[j] >= needed or bool(is_negative[b, j])
            if row[i] >= 5 and not is_negative[b, i] and clear:
                want.append((b, i, j))
    assert triples(dno_prct_pairs(scores, is_student, is_negative=is_negative)) == want
    with pytest.raises(ValueError, match="is_student: expected bool"):
        dno_prct_pairs(scores, torch.ones(200, 6))
    with pytest.raises(ValueError, match="is_student: expected bool"):
        dno_prct_pairs(scores, torch.ones(5) == 1)


def test_dno_prct_margins():
    is_student = torch.tensor([False, True, True])
    # The teacher's 6 beats 4 but not 5; the student's 5 beats 4; a 4 never wins.
    assert triples(dno_prct_pairs(torch.tensor([[6, 5, 4]]), is_student)) == [(0, 0, 2), (0, 1, 2)]
    assert triples(dno_prct_pairs(torch.tensor([[1, 4, 1]]), is_student)) == []


def knockout(matrix, columns):
    """The plain rule for one prompt; winner and loser."""

    def play(columns, keep):
        while len(columns) > 1:
            meetings = list(zip(columns[::2], columns[1::2], strict=True))
            columns = [keep(i, j) for i, j in meetings]
        return columns[0]

    def wins(i, j):
        return matrix[i][j] >= 0.5

    meetings = list(zip(columns[::2], columns[1::2], strict=True))
    winners = [i if wins(i, j) else j for i, j in meetings]
    losers = [j if wins(i, j) else i for i, j in meetings]
    best = play(winners, lambda i, j: i if wins(i, j) else j)
    return best, play(losers, lambda i, j: j if wins(i, j) else i)


@pytest.mark.parametrize("size", [2, 4, 8, 16])
def test_tournament_against_a_loop(size):
    table = torch.randint(0, 5, (100, size, size)).to(F64) / 4
    upper = table.triu(1)
    table = upper + (1 - upper).triu(1).mT + 0.5 * torch.eye(size, dtype=F64)
    calls = []

    def counting(first, second):
        calls.append(first.shape[1])
        return compare_by(table)(first, second)

    pairs = tournament_pairs(counting, prompts=100, responses=size)
    assert sum(calls) == 3 * size // 2 - 1  # 11 for 8
    want = []
    for b, matrix in enumerate(table.tolist()):
        best, worst = knockout(matrix, list(range(size)))
        if matrix[best][worst] > 0.5:
            want.append((b, best, worst))
    assert triples(pairs) == want
    assert 0 < len(want) < 100


def test_tournament_of_transitive_preferences_finds_best_and_worst():
    scores = torch.randn(50, 8)
    pairs = tournament_pairs(compare_by(bradley_terry_matrix(scores)), prompts=50)
    assert triples(pairs) == triples(best_worst(scores))


def test_tournament_edge_cases():
    level = compare_by(torch.full((3, 4, 4), 0.5))
    assert triples(tournament_pairs(level, 3, 4)) == []
    unknown = torch.full((1, 2, 2), NAN)
    assert triples(tournament_pairs(compare_by(unknown), 1, 2)) == []
    assert triples(tournament_pairs(compare_by(torch.zeros(0, 8, 8)), 0)) == []
    # Without one answer of the first round the winner is not known, whatever the final says.
    table = bradley_terry_matrix(torch.tensor([[1.0, 2.0, 3.0, 4.0]]).expand(2, 4))
    table[1, 0, 1] = NAN
    assert triples(tournament_pairs(compare_by(table), 2, 4)) == [(0, 3, 0)]
    for size in (0, 1, 6):
        with pytest.raises(ValueError, match="responses: expected a power of two >= 2"):
            tournament_pairs(level, 3, size)


def test_tournament_drops_a_winner_that_loses_to_the_loser():
    # 0 beats 1 and 2, 2 beats 3 but 3 beats 1; 0 wins and 1 loses, and yet 1 beats 0 if asked last.
    answers = iter([torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0]]), torch.tensor([[0.0]])])
    final = torch.tensor([[0.4]])
    pairs = tournament_pairs(lambda i, j: next(answers, final), prompts=1, responses=4)
    assert triples(pairs) == []


def test_upo_against_a_loop():
    scores = scores_with_ties()
    want = []
    for b, row in enumerate(scores.tolist()):
        ranked = sorted(known(row), key=lambda found: -found[1])
        if len(ranked) > 4:
            ranked = ranked[:2] + ranked[-2:]
        for i in range(len(ranked)):
            for j in range(i + 1, len(ranked)):
                if ranked[i][1] > ranked[j][1]:
                    want.append((b, ranked[i][0], ranked[j][0]))
    assert triples(upo_pairs(scores)) == want


def test_temporal_vectors():
    current, initial = torch.tensor([[3, 5, 4]]), torch.tensor([[2, 4, 1]])
    future = torch.tensor([[6, 5, 2]])
    assert triples(temporal_first_pairs(current, initial)) == [(0, 1, 3 + 2)]
    assert triples(temporal_second_pairs(current, future, initial)) == [(0, 6 + 0, 3 + 2)]
    level = [torch.full((1, 3), float(s)) for s in (3, 2, 4)]
    assert triples(temporal_first_pairs(level[0], level[2])) == []
    assert triples(temporal_second_pairs(*level)) == []


def test_temporal_is_self_rewarding_without_past_and_future():
    scores = scores_with_ties()
    assert triples(temporal_first_pairs(scores)) == triples(best_worst(scores))
    nowhere = torch.full((200, 2), NAN)
    assert triples(temporal_first_pairs(scores, nowhere)) == triples(best_worst(scores))
    assert triples(temporal_second_pairs(scores, nowhere)) == triples(best_worst(scores))


def test_temporal_takes_past_and_future_only_where_they_are_beyond():
    current = torch.tensor([[3.0, 5.0]])
    assert triples(temporal_first_pairs(current, torch.tensor([[3.0]]))) == [(0, 1, 0)]
    assert triples(temporal_second_pairs(current, torch.tensor([[5.0]]))) == [(0, 1, 0)]
    # The rejected one of phase 1 serves phase 2 also where phase 1 had no pair.
    level = torch.tensor([[3.0, 3.0]])
    assert triples(temporal_second_pairs(level, torch.tensor([[4.0]]))) == [(0, 2, 0)]
    with pytest.raises(ValueError, match="as many prompts in each"):
        temporal_first_pairs(current, torch.zeros(2, 2))


def test_anchor_pairs():
    scores = torch.tensor([[4.0, 1.0, NAN, 1.0], [NAN] * 4])
    assert triples(anchor_pairs(scores)) == [(0, 0, 2)]
    assert triples(anchor_pairs(scores, "all")) == [(0, 0, 1), (0, 0, 2), (0, 0, 4)]
    assert triples(anchor_pairs(torch.zeros(2, 1))) == [(0, 0, 1), (1, 0, 1)]
    assert triples(anchor_pairs(torch.zeros(0, 2), "all")) == []
    with pytest.raises(ValueError, match="against: expected one of worst, all"):
        anchor_pairs(scores, "best")


def test_mapl():
    fits = torch.tensor([[1.0, 0.0, 1.0, NAN], [0.0, 0.0, 0.0, 0.0]])
    assert triples(mapl_response_pairs(fits)) == [(0, 0, 1), (0, 2, 1)]
    assert triples(mapl_margin_pairs(torch.tensor([[1, 3, 2]]))) == [
        (0, 1, 0),
        (0, 1, 2),
        (0, 2, 0),
    ]


def test_sppo_win_rates_of_a_pair():
    scores = torch.tensor([[1.2, -0.3, 0.5]], dtype=F64)
    pairs = best_worst(scores)
    rates = pairs.gather(win_rates(bradley_terry_matrix(scores), include_self=True))
    want = torch.tensor([[0.661920749454], [0.330817014226]], dtype=F64)
    torch.testing.assert_close(torch.stack(rates), want, rtol=0, atol=1e-9)


def test_pairs_can_be_selected_turned_and_gathered():
    pairs = dno_pairs(torch.tensor([[0.8, 0.3, 0.1], [0.2, 0.6, 0.4]]))
    some = pairs.select(pairs.label > 0.5)
    assert triples(some) == [(0, 0, 1), (0, 0, 2), (0, 1, 2), (1, 1, 2)]
    assert triples(pairs.select(torch.tensor([5, 0]))) == [(1, 1, 2), (0, 0, 1)]
    turned = both_orders(some)
    assert triples(turned)[4:] == [(b, r, c) for b, c, r in triples(some)]
    assert torch.equal(turned.label, torch.cat([some.label, 1 - some.label]))
    certain = both_orders(Pairs(*some[:3]))
    assert certain.label.tolist() == [1.0] * 4 + [0.0] * 4
    ids = torch.arange(2 * 3 * 5).reshape(2, 3, 5)
    chosen, rejected = some.gather(ids)
    assert torch.equal(chosen[3], ids[1, 1])
    assert torch.equal(rejected[3], ids[1, 2])


def test_options_are_checked():
    scores = torch.zeros(2, 3)
    for bad in (-1.0, NAN):
        with pytest.raises(ValueError, match="min_gap: expected at least 0"):
            best_worst(scores, min_gap=bad)
        with pytest.raises(ValueError, match="threshold: expected at least 0"):
            above_gap(scores, threshold=bad)
    with pytest.raises(ValueError, match="equal: expected one of drop, first_two"):
        best_worst(scores, equal="keep")
    with pytest.raises(ValueError, match="which: expected one of"):
        ranked_pairs(scores, "some")
    with pytest.raises(ValueError, match="K >= 1 responses"):
        best_worst(torch.zeros(2, 0))
