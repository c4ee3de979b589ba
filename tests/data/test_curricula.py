import pytest
import torch

from fastpo.data.curricula import (
    curry_stages,
    replay_indices,
    replay_sizes,
    split_by_gap,
    stages_by_gap,
)
from fastpo.data.pairs import ranked_pairs

NAN = float("nan")
GAPS = torch.tensor([0.9, 0.1, 0.4, 0.7, 0.2, 0.5])


def lists(tensors):
    return [t.tolist() for t in tensors]


def triples(pairs):
    return list(zip(*(x.tolist() for x in pairs[:3]), strict=True))


def test_published_order():
    assert lists(stages_by_gap(GAPS, 3)) == [[0, 3], [5, 2], [4, 1]]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 30])
@pytest.mark.parametrize("stages", [1, 3, 4])
def test_stages_are_equal_but_for_the_last_and_fall(count, stages):
    gaps = torch.randint(0, 5, (count,)).double()
    found = lists(stages_by_gap(gaps, stages))
    assert [len(s) for s in found[:-1]] == [count // stages] * (stages - 1)
    whole = [i for stage in found for i in stage]
    # Python's sort is stable: ties stay in the order of pairs.
    assert whole == sorted(range(count), key=lambda i: -gaps[i])


def test_unknown_gaps_are_left_out():
    gaps = torch.tensor([NAN, 0.1, 0.4, NAN])
    assert lists(stages_by_gap(gaps, 2)) == [[2], [1]]
    assert lists(split_by_gap(gaps, threshold=0.2)) == [[2], [1]]
    assert lists(split_by_gap(gaps, quantile=0.5)) == [[2], [1]]


def test_curry_by_rank():
    scores = torch.tensor([[0.1, 0.9, 0.3, 0.8], [4, 3, 2, 1], [1, 1, 1, 1], [NAN, 2, 1, NAN]])
    stages = [triples(s) for s in curry_stages(scores)]
    assert stages == [
        [(0, 1, 0), (1, 0, 3), (3, 1, 2)],
        [(0, 1, 2), (1, 0, 2)],
        [(0, 1, 3), (1, 0, 1)],
    ]


def test_curry_stages_of_four_responses_are_the_papers():
    """(R1, R4), (R1, R3), (R1, R2) of every prompt, however large its gaps are beside others'."""
    scores = torch.rand(5, 4, dtype=torch.float64) * torch.arange(1, 6)[:, None]
    ranked = scores.argsort(1, descending=True).tolist()
    for place, stage in zip((3, 2, 1), curry_stages(scores), strict=True):
        want = [(b, order[0], order[place]) for b, order in enumerate(ranked)]
        assert triples(stage) == want


def test_curry_by_gap_is_one_global_sort():
    scores = torch.randn(20, 4, dtype=torch.float64)
    stages = curry_stages(scores, 3, stage_by="gap_quantile")
    assert [s.num_pairs for s in stages] == [20, 20, 20]
    gaps = torch.cat([s.gaps(scores) for s in stages])
    assert torch.equal(gaps, gaps.sort(descending=True).values)
    together = [t for s in stages for t in triples(s)]
    assert sorted(together) == sorted(triples(ranked_pairs(scores, "best_vs_rest")))


@pytest.mark.parametrize("stage_by", ["gap_quantile", "rank_pair"])
def test_curry_shuffles_inside_stages_only(stage_by):
    scores = torch.randn(30, 4)
    plain = curry_stages(scores, 3, stage_by)
    mixed = curry_stages(scores, 3, stage_by, torch.Generator().manual_seed(3))
    again = curry_stages(scores, 3, stage_by, torch.Generator().manual_seed(3))
    for p, m, a in zip(plain, mixed, again, strict=True):
        assert triples(m) == triples(a) != triples(p)
        assert sorted(triples(m)) == sorted(triples(p))


@pytest.mark.parametrize("stage_by", ["gap_quantile", "rank_pair"])
@pytest.mark.parametrize("shape", [(0, 4), (3, 1), (2, 2)])
def test_curry_of_little(stage_by, shape):
    stages = curry_stages(torch.zeros(shape), 3, stage_by, torch.Generator())
    assert [s.num_pairs for s in stages] == [0, 0, 0]


def test_split_is_strict_and_complete():
    easy, hard = split_by_gap(GAPS, threshold=0.4)
    assert lists((easy, hard)) == [[0, 3, 5], [1, 2, 4]]
    assert lists(split_by_gap(GAPS, quantile=0.5)) == [[0, 3, 5], [1, 2, 4]]
    assert lists(split_by_gap(GAPS, quantile=1.0)) == [[], list(range(6))]
    assert lists(split_by_gap(torch.ones(3), quantile=0.0)) == [[], [0, 1, 2]]
    assert lists(split_by_gap(torch.zeros(0), quantile=0.5)) == [[], []]


def test_replay():
    assert replay_sizes([1000, 1000, 400, 7, 0]) == [300, 150, 30, 0, 0]
    assert replay_sizes([100], 0.29) == [29]  # not 28, for 0.29 * 100 = 28.999999999999996
    assert replay_sizes([3, 3], 1.0) == [3, 1]
    assert replay_sizes([]) == []
    generator = torch.Generator().manual_seed(0)
    drawn = lists(replay_indices([50, 40], generator))
    assert [len(d) for d in drawn] == [15, 6]
    for indices, count in zip(drawn, (50, 40), strict=True):
        assert indices == sorted(set(indices))
        assert set(indices) <= set(range(count))
    assert lists(replay_indices([50, 40], torch.Generator().manual_seed(0))) == drawn
    assert lists(replay_indices([50, 40], generator)) != drawn


def test_errors():
    for options in ({}, {"threshold": 0.1, "quantile": 0.1}):
        with pytest.raises(ValueError, match="threshold, quantile: expected exactly one"):
            split_by_gap(GAPS, **options)
    with pytest.raises(ValueError, match="quantile: expected a number in"):
        split_by_gap(GAPS, quantile=1.5)
    with pytest.raises(ValueError, match="stages: expected at least 1"):
        stages_by_gap(GAPS, 0)
    with pytest.raises(ValueError, match=r"gaps: expected \[P\]"):
        stages_by_gap(GAPS[None])
    with pytest.raises(ValueError, match="stage_by: expected one of"):
        curry_stages(torch.zeros(2, 4), stage_by="gap")
    with pytest.raises(ValueError, match="share_of_last: expected a number in"):
        replay_sizes([10], 1.5)
