"""Programs and tests, right and wrong steps: against plain loops and by hand."""

import pytest
import torch

from fastpo.data.verdicts import dstc_pairs, first_wrong_steps, step_dpo_pairs


def dstc_loop(passes):
    """The rule in words, for one task; None for no pair."""
    programs, tests = range(len(passes)), range(len(passes[0]))
    passed = [sum(passes[m]) for m in programs]
    if not any(passed):
        return None
    chosen = max(programs, key=lambda m: passed[m])
    others = {k: sum(passes[m][k] for m in programs) for k in tests if passes[chosen][k]}
    test = min(others, key=others.get)
    failing = [m for m in programs if not passes[m][test]]
    return (chosen, min(failing, key=lambda m: passed[m]), test) if failing else None


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_dstc_against_a_loop(share):
    passes = torch.rand(300, 4, 3) < share
    passes[0], passes[1] = True, False
    want = [(b, dstc_loop(task)) for b, task in enumerate(passes.tolist())]
    want = [(b, *pair) for b, pair in want if pair]
    got = list(zip(*(x.tolist() for x in dstc_pairs(passes)), strict=True))
    assert got == want
    assert 0 < len(got) < 300


def test_dstc_properties():
    passes = torch.rand(300, 5, 4) < 0.6
    pairs = dstc_pairs(passes)
    assert passes[pairs.prompt, pairs.chosen, pairs.test].all()
    assert not passes[pairs.prompt, pairs.rejected, pairs.test].any()
    counts = passes.sum(2)
    assert (counts[pairs.prompt, pairs.chosen] == counts.amax(1)[pairs.prompt]).all()


def test_dstc_prefers_the_hard_test_and_the_first_of_equals():
    passes = torch.tensor([[[0, 0, 0], [1, 1, 1], [1, 0, 0], [1, 1, 1], [0, 0, 0]]]) == 1
    # All tests are passed by program 1; 1 and 2 by two programs each, 0 by three.
    assert [x.tolist() for x in dstc_pairs(passes)] == [[0], [1], [0], [1]]


@pytest.mark.parametrize("shape", [(0, 3, 2), (2, 0, 2), (2, 3, 0), (2, 1, 1)])
def test_dstc_without_a_choice(shape):
    for passes in (torch.ones(shape) == 1, torch.zeros(shape) == 1):
        assert [len(x) for x in dstc_pairs(passes)] == [0, 0, 0, 0]


def test_dstc_all_alike_gives_no_pair():
    row = torch.tensor([True, False, True])
    assert dstc_pairs(row.expand(2, 4, 3)).prompt.tolist() == []


def test_first_wrong_step():
    right = torch.tensor([[1, 1, 0, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [1, 1, 0, 0, 0]]) == 1
    assert first_wrong_steps(right).tolist() == [2, -1, 0, 2]
    is_step = torch.ones(4, 5) == 1
    is_step[3, 2:] = False
    assert first_wrong_steps(right, is_step).tolist() == [2, -1, 0, -1]
    assert first_wrong_steps(torch.zeros(2, 0) == 1).tolist() == [-1, -1]
    assert first_wrong_steps(torch.zeros(0, 3) == 1).tolist() == []


def test_step_dpo_takes_the_first_right_continuation():
    wrong = torch.tensor([2, -1, 0, 1])
    right = torch.tensor([[0, 1, 1], [1, 1, 1], [0, 0, 0], [1, 0, 0]]) == 1
    pairs = step_dpo_pairs(wrong, right)
    assert [x.tolist() for x in pairs] == [[0, 3], [2, 1], [1, 0]]
    for count in (0, 4):
        nothing = step_dpo_pairs(wrong, torch.zeros(4, count) == 1)
        assert [x.tolist() for x in nothing] == [[], [], []]
    assert step_dpo_pairs(wrong[:0], right[:0]).prompt.tolist() == []


def test_errors():
    with pytest.raises(ValueError, match=r"passes: expected bool \[B, M, K\], got torch.float32"):
        dstc_pairs(torch.zeros(1, 2, 2))
    with pytest.raises(ValueError, match=r"is_right: expected bool \[B, S\]"):
        first_wrong_steps(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="is_step: expected bool"):
        first_wrong_steps(torch.zeros(2, 2) == 1, torch.zeros(3, 2) == 1)
    with pytest.raises(ValueError, match=r"wrong_step: expected \[2\], got \[3\]"):
        step_dpo_pairs(torch.zeros(3), torch.zeros(2, 2) == 1)
