"""segment_sums and its backward against float64, on every backend."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from tolerance import assert_close_to_truth
from torch import Tensor

from fastpo.ops.segment_sums import segment_sums, segment_sums_backward
from fastpo.tiles import accumulation_dtype

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

# Rows [B, T], and why.
ROWS = [
    (1, 1),  # the least there is
    (3, 7),  # below one vector, odd
    (2, 512),  # one block of the CPU kernel
    (5, 1025),  # past two blocks, and past a thread block
    (130, 3),  # more sequences than a thread block has warps
    (0, 5),  # no sequence
    (4, 0),  # no position
]
# Lengths of packed sequences, and what lies before and after them.
PACKED = [
    ([3, 1, 517, 2], 0, 0),
    ([0, 5, 0, 0, 1], 0, 0),  # empty sequences at either end and in the middle
    ([4, 33], 2, 3),  # positions that belong to no sequence
    ([], 0, 0),  # no sequence, no value
    ([], 0, 6),  # values without a sequence
]
LAYOUTS = [pytest.param(rows, id=f"rows{rows}") for rows in ROWS] + [
    pytest.param(packed, id=f"packed{packed}") for packed in PACKED
]


class Inputs(NamedTuple):
    values: Tensor
    reference: Tensor | None
    weights: Tensor | None
    mask: Tensor | None
    offsets: Tensor | None

    def cast(self, dtype: torch.dtype) -> Inputs:
        """All floats in one dtype, ready to be differentiated."""
        floats = (None if x is None else x.detach().to(dtype) for x in self[:3])
        return Inputs(*(None if x is None else x.requires_grad_() for x in floats), *self[3:])


@pytest.fixture
def device(backend) -> torch.device:
    return backend.device


def make_inputs(layout, dtype, device, *, reference=True, weights=True, mask=True) -> Inputs:
    """Token log-probs with positions outside the mask, at which NaN and infinities lie."""
    if isinstance(layout[0], int):
        shape, offsets = layout, None
    else:
        lengths, before, after = layout
        bounds = torch.tensor([before, *lengths]).cumsum(0)
        shape, offsets = (int(bounds[-1]) + after,), bounds.to(device)
    generator = torch.Generator().manual_seed(0)

    def normal():
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    values, other, factors = -normal().exp(), -normal().exp(), normal()
    active = torch.rand(shape, generator=generator) > 0.3
    if mask:
        for tensor, bad in ((values, torch.nan), (other, torch.inf), (factors, torch.nan)):
            tensor[~active] = bad
    acc = accumulation_dtype(dtype)
    return Inputs(
        values.to(device, dtype),
        other.to(device, dtype) if reference else None,
        factors.to(device, acc) if weights else None,
        active.to(device) if mask else None,
        offsets,
    )


def plain_sums(inputs: Inputs) -> Tensor:
    """The obvious torch code, in the dtype of the inputs."""
    terms = inputs.values if inputs.reference is None else inputs.values - inputs.reference
    if inputs.weights is not None:
        terms = terms * inputs.weights
    if inputs.mask is not None:
        # Boolean indexing gives a gradient of 0, not 0 * NaN, to what it leaves out.
        terms = torch.zeros_like(terms).masked_scatter(inputs.mask, terms[inputs.mask])
    if inputs.offsets is None:
        return terms.sum(dim=1)
    bounds = inputs.offsets.tolist()
    pieces = [terms[start:stop].sum() for start, stop in pairwise(bounds)]
    return torch.stack(pieces) if pieces else terms[:0]


def plain_grads(inputs: Inputs, grad_sums: Tensor) -> list[Tensor]:
    floats = [x for x in inputs[:3] if x is not None]
    sums = plain_sums(inputs)
    grads = torch.autograd.grad(sums, floats, grad_sums.to(sums.dtype), materialize_grads=True)
    return [g.nan_to_num(0.0) for g in grads]  # 0 * NaN outside the mask


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sums_and_gradients(layout, dtype, device):
    inputs = make_inputs(layout, dtype, device)
    leaves = [x.requires_grad_() for x in inputs[:3]]
    sums, counts = segment_sums(*inputs)
    assert sums.dtype == accumulation_dtype(dtype)
    assert counts.dtype == torch.int64

    truth, base = inputs.cast(torch.float64), inputs.cast(dtype)
    assert_close_to_truth(sums, plain_sums(truth), plain_sums(base))
    ones = inputs._replace(values=inputs.mask.double(), reference=None, weights=None)
    assert torch.equal(counts, plain_sums(ones).long())

    grad_sums = torch.randn(sums.shape, generator=torch.Generator().manual_seed(1)).to(sums)
    grads = torch.autograd.grad(sums, leaves, grad_sums)
    wanted = plain_grads(truth, grad_sums), plain_grads(base, grad_sums)
    for leaf, grad, want, plain in zip(leaves, grads, *wanted, strict=True):
        assert grad.dtype == leaf.dtype
        assert_close_to_truth(grad, want, plain)
        assert (grad[~inputs.mask] == 0).all()


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("layout", [(3, 7), ([3, 0, 5], 0, 2)], ids=["rows", "packed"])
def test_absent_inputs(layout, reference, weights, mask, device):
    options = dict(reference=reference, weights=weights, mask=mask)
    inputs = make_inputs(layout, torch.float64, device, **options)
    leaves = [x.requires_grad_() for x in inputs[:3] if x is not None]
    sums, counts = segment_sums(*inputs)
    torch.testing.assert_close(sums, plain_sums(inputs.cast(torch.float64)))
    lengths = inputs.offsets.diff() if inputs.mask is None and inputs.offsets is not None else None
    if lengths is not None:
        assert torch.equal(counts, lengths)
    grads = torch.autograd.grad(sums.square().sum(), leaves)
    wanted = plain_grads(inputs.cast(torch.float64), 2 * sums.detach())
    torch.testing.assert_close(list(grads), wanted)


def test_gradients_only_where_asked(device):
    inputs = make_inputs((3, 7), torch.float32, device)
    grad_sums = torch.ones(3, device=device)
    grads = segment_sums_backward(grad_sums, *inputs, [False, True, False])
    assert [g.numel() for g in grads] == [0, 21, 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_any_stride(dtype, device):
    B, T = 3, 37
    inputs = make_inputs((B, T), dtype, device)

    def spread(tensor: Tensor, column_step: int) -> Tensor:
        wide = torch.zeros(B, column_step * T + 5, dtype=tensor.dtype, device=device)
        view = wide[:, 3 : 3 + column_step * T : column_step]
        return view.copy_(tensor)

    # Rows off alignment with gaps, columns apart, and one mask row for all sequences.
    one_mask = inputs.mask[:1].expand(B, T)
    inputs = Inputs(*(x.nan_to_num(1.0, 1.0, 1.0) for x in inputs[:3]), one_mask, None)
    strided = Inputs(
        spread(inputs.values, 1), spread(inputs.reference, 2), inputs.weights.t().clone().t(),
        one_mask, None,
    )  # fmt: skip
    grad_sums = torch.ones(B, device=device, dtype=inputs.weights.dtype)
    dense = inputs._replace(mask=one_mask.contiguous())
    for got, want in zip(segment_sums(*strided), segment_sums(*dense), strict=True):
        assert torch.equal(got, want)
    needs = [True] * 3
    got = segment_sums_backward(grad_sums.expand(B), *strided, needs)
    want = segment_sums_backward(grad_sums, *dense, needs)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def test_packing_does_not_change_a_bit(device):
    lengths = [3, 700, 1, 0, 29]
    inputs = make_inputs((lengths, 0, 0), torch.float32, device)
    packed = segment_sums(*inputs)[0]
    for b in range(len(lengths)):
        row = Inputs(*(x.split(lengths)[b][None] for x in inputs[:4]), None)
        assert torch.equal(segment_sums(*row)[0], packed[b : b + 1])


@pytest.mark.parametrize("layout", [(5, 1025), ([3, 1, 517, 2], 0, 0)], ids=["rows", "packed"])
def test_two_runs_give_the_same_bits(layout, device):
    inputs = make_inputs(layout, torch.float32, device)
    first, second = segment_sums(*inputs), segment_sums(*inputs)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_non_finite_values_inside_the_mask_stay_in_their_row(device):
    values = torch.ones(3, 5, device=device)
    values[0, 1], values[1, 2] = torch.nan, -torch.inf
    sums = segment_sums(values, None, None, None, None)[0]
    assert sums.isnan().tolist() == [True, False, False]
    assert sums.tolist()[1:] == [-torch.inf, 5.0]


@pytest.mark.parametrize("layout", [(2, 5), ([2, 0, 3], 1, 0)], ids=["rows", "packed"])
def test_gradcheck(layout, device):
    inputs = make_inputs(layout, torch.float64, device)
    floats = [x.nan_to_num(1.0, 1.0, 1.0).requires_grad_() for x in inputs[:3]]
    assert torch.autograd.gradcheck(lambda *x: segment_sums(*x, *inputs[3:])[0], floats)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("layout", [(2, 5), ([2, 0, 3], 1, 0)], ids=["rows", "packed"])
def test_opcheck(layout, grad, device):
    inputs = make_inputs(layout, torch.float32, device, mask=False)
    if grad:
        inputs = inputs.cast(torch.float32)
    torch.library.opcheck(segment_sums, tuple(inputs))
    B = inputs.values.shape[0] if inputs.offsets is None else inputs.offsets.shape[0] - 1
    detached = (None if x is None else x.detach() for x in inputs)
    arguments = (torch.ones(B, device=device), *detached, [True, False, True])
    torch.library.opcheck(segment_sums_backward, arguments)


def test_offsets_are_checked_on_the_cpu(device):
    values = torch.ones(6, device=device)
    if values.is_cuda:
        pytest.skip("reading offsets would synchronise")
    for offsets, got in (
        ([0, 4, 3], "4 before 3"),
        ([-1, 2], "0 before -1"),
        ([0, 7], "7 before 6"),
    ):
        with pytest.raises(ValueError, match=f"cu_seqlens: expected numbers .* got {got}"):
            segment_sums(values, None, None, None, torch.tensor(offsets))
