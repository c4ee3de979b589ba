"""The public sequence reductions: both layouts, dtypes, gradients, checks and compilation."""

from __future__ import annotations

import doctest

import pytest
import torch

from fastpo import sequences
from fastpo.sequences import sequence_counts, sequence_log_ratios, sequence_means, sequence_sums

LENGTHS = [3, 0, 5, 1]


@pytest.fixture
def padded(device):
    """Values [B, T] with a mask of leading tokens; what lies behind it is NaN."""
    values = -torch.rand(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor(LENGTHS)[:, None]
    return values.masked_fill(~mask, torch.nan).to(device), mask.to(device)


@pytest.fixture
def packed(padded):
    """The same tokens packed [N], with their cumulative lengths."""
    values, mask = padded
    return values[mask], torch.tensor([0, *LENGTHS], device=values.device).cumsum(0)


def test_examples_run():
    assert doctest.testmod(sequences).failed == 0


def test_layouts_agree(padded, packed):
    values, mask = padded
    tokens, cu_seqlens = packed
    for reduce in (sequence_sums, sequence_means):
        rows = reduce(values, mask)
        assert torch.equal(reduce(tokens, cu_seqlens=cu_seqlens), rows)
        assert torch.equal(reduce(tokens, cu_seqlens=cu_seqlens.int()), rows)
    assert sequence_counts(mask).tolist() == LENGTHS
    assert sequence_counts(cu_seqlens=cu_seqlens).tolist() == LENGTHS


def test_means_of_empty_sequences_are_zero(padded):
    values, mask = padded
    means = sequence_means(values, mask)
    torch.testing.assert_close(means[0], values[0, :3].mean())
    assert means[1] == 0


def test_weights_scale_the_terms_not_the_divisor(padded):
    values, mask = padded
    halves = torch.full_like(values, 0.5, dtype=torch.bfloat16)
    for reduce in (sequence_sums, sequence_means):
        torch.testing.assert_close(reduce(values, mask, weights=halves), reduce(values, mask) / 2)


def test_mask_inside_packed_values(packed):
    tokens, cu_seqlens = packed
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[4] = False
    sums = sequence_sums(tokens, mask, cu_seqlens)
    assert sequence_counts(mask, cu_seqlens).tolist() == [3, 0, 4, 1]
    torch.testing.assert_close(sums, sequence_sums(tokens.where(mask, 0.0), cu_seqlens=cu_seqlens))


def test_log_ratios(padded):
    values, mask = padded
    reference = values + 0.25
    ratios = sequence_log_ratios(values, reference, mask)
    torch.testing.assert_close(ratios, -0.25 * sequence_counts(mask).double())


@pytest.mark.parametrize(
    ("policy", "reference", "out"),
    [
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float32, torch.float64, torch.float64),
    ],
)
def test_dtypes_of_log_ratios(policy, reference, out, padded):
    values, mask = padded
    narrow = values.to(policy), (values + 0.5).to(reference)
    ratios = sequence_log_ratios(*narrow, mask)
    assert ratios.dtype == out
    wanted = sequence_log_ratios(*(x.double() for x in narrow), mask)
    torch.testing.assert_close(ratios.double(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("reduce", [sequence_sums, sequence_means])
def test_gradcheck(reduce, packed):
    tokens, cu_seqlens = packed
    weights = torch.rand_like(tokens, requires_grad=True)
    tokens = tokens.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda v, w: reduce(v, cu_seqlens=cu_seqlens, weights=w), (tokens, weights)
    )


def test_gradcheck_of_log_ratios(packed):
    tokens, cu_seqlens = packed
    inputs = [torch.rand_like(tokens).requires_grad_() for _ in range(3)]
    assert torch.autograd.gradcheck(
        lambda p, r, w: sequence_log_ratios(p, r, cu_seqlens=cu_seqlens, weights=w), inputs
    )


def test_gradient_outside_the_mask_is_zero(padded):
    values, mask = padded
    values, weights = values.requires_grad_(), values.clone().detach().requires_grad_()
    sequence_sums(values, mask, weights=weights).sum().backward()
    for leaf in (values, weights):
        assert (leaf.grad[~mask] == 0).all()
        assert leaf.grad[mask].isfinite().all()


def test_compiles_to_one_node(padded, packed):
    counted = []

    def count(graph, _):
        counted.append([n for n in graph.graph.nodes if "fastpo" in str(n.target)])
        return graph

    values, mask = padded
    compiled = torch.compile(sequence_sums, fullgraph=True, backend=count)
    assert torch.equal(compiled(values, mask), sequence_sums(values, mask))
    assert [len(nodes) for nodes in counted] == [1]


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_compiled_gradients(layout, padded, packed):
    values, mask = padded
    if layout == "packed":
        (values, cu_seqlens), mask = packed, None
    else:
        cu_seqlens = None
    values = values.float().requires_grad_()
    compiled = torch.compile(sequence_log_ratios, fullgraph=True, backend="aot_eager")
    reference = (values.detach() - 1).requires_grad_()
    for function in (sequence_log_ratios, compiled):
        sums = function(values, reference, mask, cu_seqlens)
        torch.testing.assert_close(sums.tolist(), [float(n) for n in LENGTHS])
        grads = torch.autograd.grad(sums.sum(), (values, reference))
        active = torch.ones_like(values) if mask is None else mask.float()
        assert torch.equal(grads[0], active)
        assert torch.equal(grads[1], -active)


VALUES = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(values=torch.zeros(6)), r"values: expected rows \[B, T\], got \[6\]"),
        (
            dict(cu_seqlens=torch.tensor([0, 6])),
            r"values: expected packed \[N\], as cu_seqlens is given, got \[2, 3\]",
        ),
        (dict(values=VALUES.long()), "values: expected float32.* got torch.int64"),
        (dict(mask=torch.ones(2, 2).bool()), r"mask: expected shape \(2, 3\).* got \(2, 2\)"),
        (dict(mask=torch.ones(2, 3)), r"mask: expected torch.bool.* got torch.float32"),
        (dict(weights=torch.ones(3)), r"weights: expected shape \(2, 3\).* got \(3,\)"),
        (dict(mask=torch.ones(2, 3).bool().to("meta")), "devices: .* values on cpu, mask on meta"),
        (
            dict(values=torch.zeros(6), cu_seqlens=torch.tensor([0.0, 6.0])),
            "cu_seqlens: expected int32 or int64, got torch.float32",
        ),
        (
            dict(values=torch.zeros(6), cu_seqlens=torch.tensor(6)),
            r"cu_seqlens: expected shape \[B \+ 1\], got \[\]",
        ),
        (
            dict(values=torch.zeros(6), cu_seqlens=torch.tensor([0, 4, 2])),
            r"cu_seqlens: expected numbers that never fall, in \[0, 6\], got 4 before 2",
        ),
    ],
)
def test_checks(arguments, message):
    with pytest.raises(ValueError, match=message):
        sequence_sums(**dict(values=VALUES) | arguments)


def test_reference_shape_is_checked():
    with pytest.raises(
        ValueError, match=r"sequence_log_ratios: reference: expected shape \(2, 3\)"
    ):
        sequence_log_ratios(VALUES, VALUES[:, :2])


def test_counts_need_something():
    with pytest.raises(
        ValueError, match="sequence_counts: mask, cu_seqlens: expected at least one"
    ):
        sequence_counts()
