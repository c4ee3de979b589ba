"""Masks and weights of tokens, responses and pairs."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fastpo import weights
from fastpo.weights import (
    answer_masks,
    bald,
    divergence_masks,
    ld_dpo_weights,
    ma_po_weights,
    madpo_weights,
    phrase_masks,
    sampo_masks,
    step_masks,
    tgdpo_weights,
    thinking_masks,
    upo_filter,
    upo_weights,
    wpo_weights,
)

START, END = 8, 9


def _masks():
    """Responses of 2, 4 and 0 tokens against 3, 1 and 2, with gaps and at any place in the row."""
    chosen = torch.tensor([[0, 1, 1, 0, 0], [1, 0, 1, 1, 1], [0, 0, 0, 0, 0]]).bool()
    rejected = torch.tensor([[1, 1, 0, 1], [0, 0, 1, 0], [0, 1, 0, 1]]).bool()
    return chosen, rejected


# Pairs


def test_ld_dpo_counts_masked_tokens_not_columns():
    chosen, rejected = ld_dpo_weights(*_masks(), alpha=0.25)
    assert chosen.tolist() == [[0, 1, 1, 0, 0], [1, 0, 0.25, 0.25, 0.25], [0] * 5]
    assert rejected.tolist() == [[1, 1, 0, 0.25], [0, 0, 1, 0], [0, 0.25, 0, 0.25]]


def test_sampo_keeps_as_many_of_each():
    masks = _masks()
    kept = sampo_masks(*masks)
    for mask, part in zip(masks, kept, strict=True):
        assert not (part & ~mask).any()
        assert part.sum(1).tolist() == [2, 1, 0]


def test_sampo_is_drawn_by_the_generator_and_uniform():
    long, short = torch.ones(4000, 4).bool(), torch.ones(4000, 2).bool()
    draws = [sampo_masks(long, short, torch.Generator().manual_seed(s))[0] for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    # The expectation of a sum is (m / n) times the full one: 5 standard errors of each token.
    error = 5 * math.sqrt(0.25 / 4000)
    assert (draws[0].double().mean(0) - 0.5).abs().max() < error
    # All six pairs of tokens are equally likely.
    codes = (draws[0] * torch.tensor([1, 2, 4, 8])).sum(1)
    shares = [
        (codes == 2**i + 2**j).double().mean() for i, j in itertools.combinations(range(4), 2)
    ]
    assert max(abs(share - 1 / 6) for share in shares) < 5 * math.sqrt(5 / 36 / 4000)


def test_equal_lengths_are_left_alone():
    mask = torch.ones(2, 3).bool()
    assert all(torch.equal(x, mask) for x in sampo_masks(mask, mask))
    assert all((x == 1).all() for x in ld_dpo_weights(mask, mask, alpha=0.0))


def test_divergence_starts_at_the_first_difference():
    chosen_mask, rejected_mask = _masks()
    # Responses 5 6 | 5 7 7 ; 1 2 3 4 | 1 ; (none) | 1 1
    chosen = torch.tensor([[0, 5, 6, 0, 0], [1, 0, 2, 3, 4], [0, 0, 0, 0, 0]])
    rejected = torch.tensor([[5, 7, 0, 7], [0, 0, 1, 0], [0, 1, 0, 1]])
    got = divergence_masks(chosen, rejected, chosen_mask, rejected_mask)
    assert got[0].int().tolist() == [[0, 0, 1, 0, 0], [0] * 5, [0] * 5]
    assert got[1].int().tolist() == [[0, 1, 0, 1], [0] * 4, [0] * 4]


def test_divergence_masks_drop_what_comes_before():
    """Changing any log-prob before the first difference changes no sum."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 3, (64, 8), generator=generator)
    other = torch.randint(0, 3, (64, 6), generator=generator)
    mask = torch.arange(8) < torch.randint(0, 9, (64, 1), generator=generator)
    other_mask = torch.arange(6) < torch.randint(0, 7, (64, 1), generator=generator)
    got, other_got = divergence_masks(tokens, other, mask, other_mask)
    for b in range(64):
        n, m = int(mask[b].sum()), int(other_mask[b].sum())
        first = next((t for t in range(min(n, m)) if tokens[b, t] != other[b, t]), None)
        want = [] if first is None else list(range(first, n))
        assert got[b].nonzero()[:, 0].tolist() == want
        assert other_got[b].nonzero()[:, 0].tolist() == (
            [] if first is None else list(range(first, m))
        )


def test_step_and_phrase_masks():
    mask = torch.tensor([[False, True, True, False, True, True, True]])
    got = step_masks(mask, torch.tensor([2]), torch.tensor([2]))
    assert got.int().tolist() == [[0, 0, 0, 0, 1, 1, 0]]
    assert step_masks(mask, torch.tensor([2])).int().tolist() == [[0, 0, 0, 0, 1, 1, 1]]
    assert step_masks(mask, torch.tensor([0])).equal(mask)
    ids = torch.tensor([[1, 0, 2, 2, 0, 3, 0]])
    assert phrase_masks(ids, mask).int().tolist() == [[0, 0, 1, 0, 0, 1, 0]]


def test_ma_po_weights_are_the_rescaled_z_scores():
    values = torch.randn(3, 7, 2, 4, dtype=torch.float64)
    mask = torch.rand(3, 7) > 0.3
    got = ma_po_weights(values, mask)
    means = values.mean((2, 3))
    for b in range(3):
        own = means[b][mask[b]]
        z = (own - own.mean()) / own.std()
        torch.testing.assert_close(got[b][mask[b]], (z - z.min()) / (z.max() - z.min()))
    assert (got[~mask] == 0).all()


# Thinking


def _thinking(tokens, **options):
    tokens = torch.tensor([tokens])
    mask = options.pop("mask", torch.ones_like(tokens).bool())
    return thinking_masks(tokens, mask, START, END, **options)[0].int().tolist()


@pytest.mark.parametrize(
    ("tokens", "without_markers", "with_markers"),
    [
        ([1, 8, 2, 9, 3], [1, 0, 0, 0, 1], [1, 1, 0, 1, 1]),
        ([8, 9], [0, 0], [1, 1]),
        # two blocks
        ([8, 1, 9, 2, 8, 3, 9], [0, 0, 0, 1, 0, 0, 0], [1, 0, 1, 1, 1, 0, 1]),
        # nested starts: the inner one counts
        ([8, 1, 8, 2, 9, 3], [1, 1, 0, 0, 0, 1], [1, 1, 1, 0, 1, 1]),
        # nested on both sides: the second end goes back to the inner start too
        ([8, 1, 8, 2, 9, 3, 9, 4], [1, 1, 0, 0, 0, 0, 0, 1], [1, 1, 1, 0, 0, 0, 1, 1]),
        # an end without a start, a start without an end
        ([1, 9, 2, 8, 3], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]),
        ([9, 8, 1, 9, 8], [1, 0, 0, 0, 1], [1, 1, 0, 1, 1]),
        ([1, 2, 3], [1, 1, 1], [1, 1, 1]),
    ],
)
def test_thinking_blocks(tokens, without_markers, with_markers):
    assert _thinking(tokens) == without_markers
    assert _thinking(tokens, keep_markers=True) == with_markers
    assert _thinking(tokens, share=0.0) == [1] * len(tokens)


def test_thinking_sees_the_response_alone():
    mask = torch.tensor([[False, False, True, True, True, False]])
    assert _thinking([8, 1, 2, 9, 3, 9], mask=mask) == [0, 0, 1, 1, 1, 0]


def test_a_share_of_thinking_is_drawn_per_block():
    # Blocks of 10 and 5 tokens, markers included, in 2000 rows.
    row = [7, 8, *[1] * 8, 9, 7, 7, 8, *[1] * 3, 9, 7]
    tokens = torch.tensor([row]).expand(2000, -1)
    mask = torch.ones_like(tokens).bool()
    got = thinking_masks(tokens, mask, START, END, 0.7, generator=torch.Generator().manual_seed(3))
    blocks = slice(1, 11), slice(13, 18)
    for block, dropped in zip(blocks, (7, 3), strict=True):
        assert ((~got[:, block]).sum(1) == dropped).all()
        size = block.stop - block.start
        error = 5 * math.sqrt(0.25 / 2000)
        shares = (~got[:, block]).double().mean(0)
        assert (shares - dropped / size).abs().max() < error
    outside = [0, 11, 12, 18]
    assert got[:, outside].all()
    again = thinking_masks(
        tokens, mask, START, END, 0.7, generator=torch.Generator().manual_seed(3)
    )
    assert torch.equal(again, got)


def test_answers():
    tokens = torch.tensor([[8, 1, 9, 2, 9, 3], [1, 2, 3, 4, 5, 6], [9, 1, 2, 3, 4, 9]])
    mask = torch.ones_like(tokens).bool()
    mask[2, 5] = False
    got = answer_masks(tokens, mask, END)
    assert got.int().tolist() == [[0, 0, 0, 0, 1, 1], [1] * 6, [1] * 5 + [0]]


def test_thinking_and_answer_masks_of_random_tokens():
    """Against the rules spelt out for one sequence at a time."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(5, 10, (200, 12), generator=generator)
    mask = torch.rand(200, 12, generator=generator) > 0.2
    dropped = ~thinking_masks(tokens, mask, START, END) & mask
    kept = ~thinking_masks(tokens, mask, START, END, keep_markers=True) & mask
    for b, row in enumerate(tokens.tolist()):
        starts = [t for t, x in enumerate(row) if x == START and mask[b, t]]
        ends = [t for t, x in enumerate(row) if x == END and mask[b, t]]
        whole, inner = set(), set()
        for end in ends:
            before = [t for t in starts if t < end]
            if before:
                whole |= set(range(before[-1], end + 1))
                inner |= set(range(before[-1] + 1, end))
        inside = {t for t in range(12) if mask[b, t]}
        assert set(dropped[b].nonzero()[:, 0].tolist()) == whole & inside
        assert set(kept[b].nonzero()[:, 0].tolist()) == inner & inside
        answer = answer_masks(tokens, mask, END)[b].nonzero()[:, 0].tolist()
        assert answer == sorted(t for t in inside if t >= max(ends, default=0))


# Responses and pairs


def test_madpo_c():
    """c is 1 at the threshold, near c_max below it and c_min above; w is 1 at h = 0."""
    options = dict(c_max=3.0, threshold=2.0, steepness=20.0)

    def weight(h):
        return madpo_weights(torch.tensor([h]).double(), torch.zeros(1).double(), **options).item()

    def ratio(c, h):
        return (1 + math.exp(-h)) / (1 + math.exp(-c * h))

    assert weight(0.0) == 1
    assert weight(2.0) == pytest.approx(1)
    assert weight(0.5) == pytest.approx(ratio(3, 0.5), rel=1e-9)
    assert weight(6.0) == pytest.approx(ratio(1 / 3, 6.0), rel=1e-9)
    assert weight(-0.5) == pytest.approx(ratio(3, -0.5), rel=1e-9)
    assert weight(-2.0) == weight(-1e4) == 1
    assert math.isfinite(weight(1e4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_madpo_published_amplification(dtype):
    h = torch.tensor([0.5, 3.0, -2.5], dtype=dtype)
    got = madpo_weights(h, torch.zeros(3, dtype=dtype), threshold=2.0)
    bound = 1e-9 if dtype == torch.float64 else 1e-5
    want = [1.0976032554, 0.9449883273, 1.0]
    torch.testing.assert_close(got, torch.tensor(want, dtype=dtype), rtol=0, atol=bound)


def test_wpo_weights():
    uniform = torch.full((2, 3), 0.25).log()
    mask = torch.tensor([[True, True, False], [False, False, False]])
    logprobs = uniform.masked_fill(~mask, torch.nan)
    assert wpo_weights(logprobs, uniform, mask).tolist() == [1, 1]
    # The argmax of an uneven distribution: p / sum p^2 >= 1
    p = torch.tensor([0.7, 0.2, 0.1])
    got = wpo_weights(p[:1].log()[None], p.square().sum().log()[None, None], mask[:1, :1])
    assert got.item() == pytest.approx(0.7 / 0.54)


UPO = [[[0.9, 0.1], [0.2, 0.8]], [[0.8, 0.2], [0.6, 0.4]], [[0.95, 0.05], [0.4, 0.6]]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_upo(dtype):
    bound = 1e-9 if dtype == torch.float64 else 1e-5
    uncertainty = bald(torch.tensor(UPO, dtype=dtype))
    for got, want in (
        (uncertainty, [0.018896974436, 0.05753641449]),
        (upo_weights(uncertainty), [0.51004369691, 0.48995630309]),
    ):
        torch.testing.assert_close(got, torch.tensor(want, dtype=dtype), rtol=0, atol=bound)
    # A ratio of differences: in float32 its error is that of U over U itself.
    hard = torch.tensor([0.247234548952, 0.752765451048], dtype=dtype)
    bound = bound if dtype == torch.float64 else 1e-5 / 0.018
    torch.testing.assert_close(upo_weights(uncertainty, "hard"), hard, rtol=0, atol=bound)


def test_upo_of_passes_that_agree():
    same = torch.tensor([[[0.3, 0.7], [1.0, 0.0]]]).expand(10, -1, -1)
    assert bald(same).abs().max() < torch.finfo(torch.float32).eps
    assert upo_weights(torch.zeros(4), "hard").tolist() == [0.25] * 4
    assert upo_weights(torch.zeros(0)).shape == (0,)


def test_upo_filter_takes_the_majority():
    right, wrong = [0.9, 0.1], [0.4, 0.6]
    probs = torch.tensor(
        [[right, wrong, right], [right, wrong, wrong], [wrong, right, right], [right, wrong, wrong]]
    )
    assert upo_filter(probs).tolist() == [True, False, True]


# All of them


def test_nothing_carries_a_gradient():
    values = torch.rand(2, 3, requires_grad=True)
    mask = torch.ones(2, 3).bool()
    results = [
        *tgdpo_weights(values, values),
        wpo_weights(values, values, mask),
        ma_po_weights(values, mask),
        madpo_weights(values[:, 0], values[:, 1]),
        bald(torch.stack((values, 1 - values), -1)),
        upo_weights(values[0]),
    ]
    assert not any(x.requires_grad for x in results)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_empty_batches_and_rows(shape):
    mask, values = torch.zeros(shape).bool(), torch.zeros(shape)
    tokens = values.long()
    for got in (
        *ld_dpo_weights(mask, mask),
        *sampo_masks(mask, mask),
        *divergence_masks(tokens, tokens, mask, mask),
        thinking_masks(tokens, mask, START, END, share=0.5),
        answer_masks(tokens, mask, END),
        phrase_masks(tokens, mask),
        step_masks(mask, tokens.sum(1)),
        ma_po_weights(values, mask),
        *tgdpo_weights(values, values),
    ):
        assert got.shape == shape
        assert not got.any() or got.dtype != torch.bool
    assert wpo_weights(values, values, mask).tolist() == [1.0] * shape[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype):
    values, mask = torch.rand(2, 3).to(dtype), torch.ones(2, 3).bool()
    for function in (
        lambda x: wpo_weights(x, x + x, mask),
        lambda x: ma_po_weights(x, mask),
        lambda x: madpo_weights(x[:, 0], x[:, 1]),
        lambda x: tgdpo_weights(x, x)[0],
        bald_of := (lambda x: bald(torch.stack((x, x), -1))),
    ):
        got = function(values)
        assert got.dtype == torch.float32
        if function is not bald_of:
            assert torch.equal(got, function(values.float()))


def test_errors():
    mask = torch.ones(2, 3).bool()
    cases = {
        "ld_dpo_weights: alpha: expected a number in [0, 1], got 2.0": lambda: ld_dpo_weights(
            mask, mask, 2.0
        ),
        "ld_dpo_weights: chosen_mask: expected bool [B, T], got torch.int64 [2, 3]": lambda: (
            ld_dpo_weights(mask.long(), mask)
        ),
        "sampo_masks: rejected_mask: expected 2 rows on cpu as chosen_mask, got 1": lambda: (
            sampo_masks(mask, mask[:1])
        ),
        "divergence_masks: rejected_tokens: expected shape [2, 3]": lambda: divergence_masks(
            mask.long(), mask[:, :2].long(), mask, mask
        ),
        "thinking_masks: share: expected a number in [0, 1], got -1": lambda: thinking_masks(
            mask.long(), mask, START, END, share=-1
        ),
        "tgdpo_weights: alpha, beta: expected finite numbers": lambda: tgdpo_weights(
            mask.float(), mask.float(), alpha=math.inf
        ),
        "madpo_weights: c_max: expected a finite number >= 1, got 0.5": lambda: madpo_weights(
            torch.ones(2), torch.ones(2), c_max=0.5
        ),
        "madpo_weights: c_min: expected a number in [0, 1), got 1.5": lambda: madpo_weights(
            torch.ones(2), torch.ones(2), c_min=1.5
        ),
        "madpo_weights: steepness, threshold: expected a finite number": lambda: madpo_weights(
            torch.zeros(2), torch.zeros(2), steepness=math.nan
        ),
        "madpo_weights: rejected_scores: expected shape [2]": lambda: madpo_weights(
            torch.ones(2), torch.ones(3)
        ),
        "bald: probs: expected [T, B, C] with T > 0, got [2, 3]": lambda: bald(mask.float()),
        "upo_weights: prefer: expected one of easy, hard, got 'all'": lambda: upo_weights(
            torch.ones(2), "all"
        ),
    }
    for message, call in cases.items():
        with pytest.raises(ValueError, match=r"^fastpo\.weights\.") as error:
            call()
        assert message in str(error.value)


def test_every_public_name_is_documented_with_an_example():
    for name in weights.__all__:
        member = getattr(weights, name)
        if callable(member) and name not in ("AllReduce", "BatchBeta"):
            assert ">>>" in member.__doc__, name


def test_they_compile_to_one_graph():
    chosen, rejected = _masks()
    tokens, others = torch.randint(5, 10, (3, 5)), torch.randint(5, 10, (3, 4))
    values = torch.rand(3, 5)
    for function, arguments in (
        (ld_dpo_weights, (chosen, rejected)),
        (divergence_masks, (tokens, others, chosen, rejected)),
        (thinking_masks, (tokens, chosen, START, END)),
        (answer_masks, (tokens, chosen, END)),
        (wpo_weights, (values, values, chosen)),
        (ma_po_weights, (values, chosen)),
        (madpo_weights, (values[:, 0], values[:, 1])),
    ):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*arguments), function(*arguments))
