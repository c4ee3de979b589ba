import subprocess
import sys

import pytest
import torch

from fastpo.data.ids import content_id, drop_identical, has_variety, pair_ids, response_ids
from fastpo.data.masks import has_eos, until_first_eos
from fastpo.data.pairs import above_gap, best_worst

CODE = "from fastpo.data.ids import pair_ids; print(pair_ids(['a', 7], ['b', [1, 2]], ['c', [3]]))"


def test_ids_are_the_same_in_every_process():
    here = pair_ids(["a", 7], ["b", [1, 2]], ["c", [3]])
    for seed in ("0", "1"):
        env = {"PYTHONHASHSEED": seed}
        there = subprocess.run(
            [sys.executable, "-c", CODE], env=env, capture_output=True, text=True
        )
        assert there.stdout.strip() == str(here), there.stderr


def test_ids_tell_apart_what_differs():
    parts = [("a", "b", "c"), ("a", "c", "b"), ("ab", "", "c"), ("a", "bc", ""), ("b", "b", "c")]
    parts += [("1", "b", "c"), (1, "b", "c"), ([1], "b", "c"), ("[1]", "b", "c")]
    ids = pair_ids(*zip(*parts, strict=True))
    assert len(set(ids.tolist())) == len(parts)
    assert (ids >= 0).all()
    assert ids.dtype == torch.int64


def test_ids_do_not_depend_on_order_kind_or_company():
    prompts, chosen, rejected = ["a", "b", "c"], [[1, 2], [3], []], [[4], [5], [6]]
    ids = pair_ids(prompts, chosen, rejected)
    assert torch.equal(pair_ids(prompts[::-1], chosen[::-1], rejected[::-1]), ids.flip(0))
    as_tensors = [torch.tensor(c, dtype=torch.int64) for c in chosen]
    assert torch.equal(pair_ids(prompts, as_tensors, rejected), ids)
    numbers = torch.arange(3)
    assert torch.equal(pair_ids(numbers, chosen, rejected), pair_ids([0, 1, 2], chosen, rejected))
    one, other = {"role": "user", "content": "é"}, {"content": "é", "role": "user"}
    assert content_id([one]) == content_id([other])
    assert pair_ids([], [], []).shape == (0,)
    with pytest.raises(ValueError, match="expected one length, got 1, 1 and 2"):
        pair_ids(["a"], ["b"], ["c", "d"])


def test_ids_spread_over_63_bits():
    ids = torch.tensor([content_id(i) for i in range(4096)])
    assert len(ids.unique()) == 4096
    bits = (ids[:, None] >> torch.arange(63)) & 1
    # A fair coin over 4096 ids: six standard errors of the mean are 6 / (2 * 64).
    assert (bits.double().mean(0) - 0.5).abs().max() < 6 / 128


def test_identical_responses():
    texts = [
        ["x", "x", "x"],
        ["x", "y", "x"],
        ["x", None, "x"],
        [None, None, None],
        ["x", "y", None],
    ]
    ids = response_ids(texts)
    assert has_variety(ids).tolist() == [False, True, False, False, True]
    scores = torch.tensor([[3.0, 2.0, 1.0]]).expand(5, 3)
    kept = drop_identical(above_gap(scores[:2]), ids[:2])
    assert list(zip(*(x.tolist() for x in kept[:3]), strict=True)) == [(1, 0, 1), (1, 1, 2)]
    # REBEL: best and worst are the same text in both.
    assert drop_identical(best_worst(scores[:2]), ids[:2]).num_pairs == 0
    assert response_ids([]).shape == (0, 0)
    assert has_variety(torch.zeros(2, 1, dtype=torch.int64)).tolist() == [False, False]
    with pytest.raises(ValueError, match="expected K for every prompt"):
        response_ids([["a"], ["a", "b"]])


def first_eos_loop(tokens, ends, mask):
    rows = []
    for ids, counted in zip(tokens.tolist(), mask.tolist(), strict=True):
        row, ended = [], False
        for token, counts in zip(ids, counted, strict=True):
            row.append(counts and not ended)
            ended |= counts and token in ends
        rows.append(row)
    return torch.tensor(rows, dtype=torch.bool).reshape(tokens.shape)


@pytest.mark.parametrize("ends", [[2], [2, 5]])
@pytest.mark.parametrize("shape", [(50, 9), (1, 1), (0, 4), (3, 0)])
def test_first_eos_against_a_loop(ends, shape):
    tokens, mask = torch.randint(0, 8, shape), torch.rand(shape) < 0.8
    want = first_eos_loop(tokens, ends, mask)
    assert torch.equal(until_first_eos(tokens, ends, mask), want)
    assert torch.equal(
        has_eos(tokens, ends, mask), (torch.isin(tokens, torch.tensor(ends)) & want).any(1)
    )
    everything = torch.ones(shape, dtype=torch.bool)
    assert torch.equal(until_first_eos(tokens, ends), first_eos_loop(tokens, ends, everything))


def test_ends_in_the_prompt_and_padding_do_not_count():
    tokens = torch.tensor([[2, 7, 8, 2, 2, 2]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]]) == 1
    assert until_first_eos(tokens, 2, mask).int().tolist() == [[0, 0, 1, 1, 0, 0]]
    # What comes after the end changes nothing.
    tokens[0, 4:] = 5
    assert until_first_eos(tokens, 2, mask).int().tolist() == [[0, 0, 1, 1, 0, 0]]
    assert has_eos(tokens, 2, mask).tolist() == [True]
    assert has_eos(tokens, 2, mask & (tokens != 2)).tolist() == [False]


def test_mask_errors():
    for rule in (until_first_eos, has_eos):
        with pytest.raises(ValueError, match=r"tokens: expected token ids \[B, T\]"):
            rule(torch.zeros(2, 2), 2)
        with pytest.raises(ValueError, match=r"tokens: expected token ids \[B, T\]"):
            rule(torch.zeros(2, dtype=torch.int64), 2)
        with pytest.raises(ValueError, match="mask: expected bool"):
            rule(torch.zeros(2, 2, dtype=torch.int64), 2, torch.ones(2, 2))
