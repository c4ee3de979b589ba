"""The tile and row kernels of every backend against the reference in float64."""

import math

import pytest
import torch
from tolerance import assert_close_to_truth

from fastpo import backends, reference
from fastpo.tiles import MOMENTS, RowState, Tile, accumulation_dtype

ALL = sum(MOMENTS.values())
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# One column; less than a vector; odd; a vector and one; several rounds of a block with a ragged
# end.
WIDTHS = [1, 7, 31, 257, 1009]
TRANSFORMS = {
    "plain": {},
    "scaled": {"scale": -1.3, "temperature": 0.7},
    "capped": {"scale": 1.5, "softcap": 4.0, "temperature": 0.7},
}
OUTPUTS = ("logprobs", "lse", "lse_low", *MOMENTS)


def make_logits(n, V, dtype, device, spread=3.0):
    """[n, V] with an odd row stride, so that rows start at every alignment."""
    wide = torch.randn(n, V + 3, dtype=torch.float64) * spread
    return wide.to(dtype).to(device)[:, 1 : V + 1]


def tiles(logits, targets, bias, step, transform):
    V = logits.shape[1]
    for start in range(0, V, step):
        stop = min(start + step, V)
        part = None if bias is None else bias[start:stop]
        yield Tile(logits[:, start:stop], targets, start, part, **transform)


def run_stats(kernels, logits, targets, bias, step, transform, weight=None):
    """All outputs of the statistics, and with a weight also the unit gradient."""
    n, V = logits.shape
    acc = accumulation_dtype(logits.dtype)
    state = RowState.start(n, acc, logits.device, ALL)
    partial = None
    for tile in tiles(logits, targets, bias, step, transform):
        if weight is None:
            kernels.chunk_stats(tile, state)
            continue
        slice_vH = weight[tile.vocab_start : tile.vocab_start + tile.logits_nv.shape[1]]
        weights = torch.full_like(tile.logits_nv, torch.nan, dtype=acc)
        same = tile.logits_nv.dtype == acc
        out = weights if same else torch.full_like(tile.logits_nv, torch.nan)
        kernels.chunk_weights(tile, state, out, partial)
        product = out.to(acc) @ slice_vH.to(acc)
        partial = product if partial is None else partial + product
    outputs = {
        name: torch.full(
            (n,), True if name == "is_top1" else torch.nan,
            dtype=torch.bool if name == "is_top1" else acc, device=logits.device,
        )
        for name in OUTPUTS
    }  # fmt: skip
    kernels.finish_stats(state, targets, vocab=V, **outputs)
    if weight is not None:
        unit = torch.full((n, weight.shape[1]), torch.nan, dtype=weight.dtype, device=logits.device)
        at_target = weight[targets.clamp(0, V - 1)]
        kernels.finish_weights(state, partial, at_target, unit, targets, **transform)
        outputs["unit_grad"] = unit
    return outputs


def compare(kernels, logits, targets, bias, step, transform, weight=None, per_element=False):
    arguments = (targets, bias, step, transform)
    out = run_stats(kernels, logits, *arguments, weight)
    base = run_stats(reference, logits, *arguments, weight)
    wide = None if weight is None else weight.double()
    wide_bias = None if bias is None else bias.double()
    truth = run_stats(reference, logits.double(), targets, wide_bias, step, transform, wide)
    for name, value in out.items():
        if name == "is_top1":
            assert torch.equal(value, base[name])
        elif name == "lse_low":
            pass  # belongs to its own lse: test_lse_low
        else:
            assert_close_to_truth(
                value, truth[name], base[name], what=name, per_element=per_element
            )
    return out


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", WIDTHS)
def test_statistics(backend, V, dtype, transform):
    logits = make_logits(5, V, dtype, backend.device)
    targets = torch.randint(V, (5,), device=backend.device)
    acc = accumulation_dtype(dtype)
    bias = torch.randn(V, dtype=acc, device=backend.device) if transform != "plain" else None
    kernels = backends.kernels(backend.device)
    for step in {V, 100, max(V // 3, 1)}:
        options = {"per_element": V == 257}  # the rule by element, on an odd size
        compare(kernels, logits, targets, bias, step, TRANSFORMS[transform], **options)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("V", WIDTHS)
def test_unit_gradient(backend, V, dtype, transform):
    logits = make_logits(5, V, dtype, backend.device)
    targets = torch.randint(V, (5,), device=backend.device)
    weight = torch.randn(V, 13, dtype=dtype, device=backend.device)
    bias = torch.randn(V, dtype=dtype, device=backend.device) if transform != "plain" else None
    for step in {V, max(V // 3, 1)}:
        arguments = (logits, targets, bias, step, TRANSFORMS[transform], weight)
        compare(backends.kernels(backend.device), *arguments)


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_rounded_once(backend, out_dtype):
    logits = make_logits(4, 201, torch.float32, backend.device)
    targets = torch.tensor([0, 7, 200, -100], device=backend.device)
    results = []
    for kernels in (backends.kernels(backend.device), reference):
        state = RowState.start(4, torch.float32, backend.device, 0)
        out = torch.full((4, 201), torch.nan, dtype=out_dtype, device=backend.device)
        kernels.chunk_weights(Tile(logits, targets), state, out, None)
        results.append(out.float())
    # Two correct roundings of values an ulp of fp32 apart differ by one ulp of the output at most.
    ulp = torch.finfo(out_dtype).eps
    assert ((results[0] - results[1]).abs() <= ulp * results[1].abs() + 1e-7).all()
    assert (results[0][3] == 0).all()
    assert (results[0][torch.arange(3), targets[:3]] == 0).all()


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(
    ("dtype", "out_dtype"),
    [(d, d) for d in DTYPES] + [(torch.float32, torch.bfloat16), (torch.float32, torch.float16)],
    ids=str,
)
@pytest.mark.parametrize("V", [1, 31, 1009])
def test_gradient(backend, V, dtype, out_dtype, transform):
    n, device, acc = 5, backend.device, accumulation_dtype(dtype)
    logits = make_logits(n, V, dtype, device)
    targets = torch.randint(V, (n,), device=device)
    targets[1] = -100
    bias = torch.randn(V, dtype=acc, device=device) if transform != "plain" else None
    wide_bias = None if bias is None else bias.double()
    transform = TRANSFORMS[transform]
    forward = run_stats(reference, logits.double(), targets, wide_bias, V, transform)
    upstream = {
        name: torch.randn(n, dtype=acc, device=device)
        for name in ("grad_logprobs", "grad_entropy", "grad_lse")
    }
    for missing in (None, *upstream):
        given = {k: v for k, v in upstream.items() if k != missing}

        def run(kernels, kind, into, given=given):
            rows = {k: forward[k].to(kind) for k in ("logprobs", "lse", "lse_low", "entropy")}
            rows |= {k: v.to(kind) for k, v in given.items()}
            out = torch.full((n, V + 2), torch.nan, dtype=into, device=device)[:, :V]
            source = logits.double() if kind == torch.float64 else logits
            part = None if bias is None else bias.to(kind)
            tile = Tile(source, targets, 0, part, **transform)
            kernels.chunk_grad(tile, out, **rows)
            return out

        out = run(backends.kernels(device), acc, out_dtype)
        base = run(reference, acc, out_dtype)
        truth = run(reference, torch.float64, torch.float64)
        assert_close_to_truth(out, truth, base, what=f"without {missing}")
        assert (out[1] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_in_place_equals_out_of_place(backend, dtype):
    logits = make_logits(4, 515, dtype, backend.device)
    targets = torch.tensor([0, 514, 257, -100], device=backend.device)
    rows = {"logprobs": -3.0, "lse": 8.0, "lse_low": 1e-7}
    rows = {k: torch.full((4,), v) for k, v in rows.items()}
    rows = {k: v.to(backend.device) for k, v in rows.items()}
    rows["grad_logprobs"] = torch.randn(4, device=backend.device)
    kernels = backends.kernels(backend.device)
    apart = torch.empty_like(logits)
    kernels.chunk_grad(Tile(logits, targets), apart, **rows)
    kernels.chunk_grad(Tile(logits, targets), logits, **rows)
    assert torch.equal(logits, apart)


@pytest.mark.parametrize("spread", [30.0, 1e4])
def test_extreme_logits(backend, spread):
    logits = make_logits(6, 300, torch.float32, backend.device, spread)
    targets = torch.randint(300, (6,), device=backend.device)
    targets[0] = logits[0].argmax()
    targets[1] = logits[1].argmin()
    weight = torch.randn(300, 5, device=backend.device)
    for step in (300, 128):
        kernels = backends.kernels(backend.device)
        out = compare(kernels, logits, targets, None, step, {}, weight)
        assert (out["logprobs"] <= 0).all()


def test_confident_tokens_keep_their_digits(backend):
    """1 - p is a sum: its relative error does not grow as p goes to 1."""
    logits = torch.zeros(6, 500, dtype=torch.float64)
    logits[:, :-1] = torch.randn(6, 499, dtype=torch.float64)
    other = logits[:, :-1].logsumexp(1)
    miss = torch.tensor([0.5, 0.1, 1e-2, 1e-4, 1e-8, 1e-16], dtype=torch.float64)
    logits[:, -1] = other + torch.log((1 - miss) / miss)
    logits = logits.float().to(backend.device)
    targets = torch.full((6,), 499, device=backend.device)
    kernels = backends.kernels(backend.device)
    state = RowState.start(6, torch.float32, backend.device, 0)
    kernels.chunk_stats(Tile(logits, targets), state)
    out = torch.empty(6, device=backend.device)
    lse = torch.empty(6, device=backend.device)
    kernels.finish_stats(state, targets, vocab=500, logprobs=out, lse=lse)
    wide = logits.double()
    truth = -torch.nn.functional.softplus(wide[:, :-1].logsumexp(1) - wide[:, -1], threshold=700)
    relative = ((out.double() - truth) / truth).abs()
    # The margin z_y - lse_rest is exact to an ulp of the logits, which the exponential turns into a
    # relative error of the same size times the margin (at most 40 here).
    assert (relative <= 40 * 4 * torch.finfo(torch.float32).eps).all(), relative


def test_lse_low_is_what_rounding_took(backend):
    """lse + lse_low is exact to the logits' spread, whatever offset they share."""
    logits = make_logits(5, 90, torch.float32, backend.device) + 3000
    targets = torch.arange(5, device=backend.device)
    out = run_stats(backends.kernels(backend.device), logits, targets, None, 32, {})
    truth = logits.double().logsumexp(1)
    alone = (out["lse"].double() - truth).abs().max()
    both = (out["lse"].double() + out["lse_low"].double() - truth).abs().max()
    assert both < 30 * torch.finfo(torch.float32).eps < alone


def test_infinite_and_nan_logits(backend):
    logits = make_logits(6, 70, torch.float32, backend.device).contiguous()
    targets = torch.arange(6, device=backend.device)
    logits[0, 10:20] = -math.inf  # harmless
    logits[1, 1] = -math.inf  # the target itself
    logits[2, 50] = math.nan
    logits[3, :] = -math.inf
    logits[3, 3] = 1.0  # all but the target
    logits[4, 60] = math.inf
    logits[5, 5] = math.inf  # the target itself
    for step in (70, 16):
        out = run_stats(backends.kernels(backend.device), logits, targets, None, step, {})
        logprobs = out["logprobs"]
        assert logprobs[[0, 3]].isfinite().all()
        assert logprobs[3] == 0
        assert out["entropy"][3] == 0
        assert logprobs[1] == -math.inf
        assert not logprobs[2].isfinite()
        assert not logprobs[4:].isfinite().any()
        truth = torch.log_softmax(logits.double(), 1)[0, 0]
        assert abs(logprobs[0].item() - truth.item()) < 1e-5


def test_target_outside_the_vocabulary_poisons_its_row_only(backend):
    logits = make_logits(3, 40, torch.float32, backend.device)
    targets = torch.tensor([5, 40, 7], device=backend.device)
    weight = torch.randn(40, 3, device=backend.device)
    out = run_stats(backends.kernels(backend.device), logits, targets, None, 16, {}, weight)
    assert out["logprobs"].isnan().tolist() == [False, True, False]
    assert out["unit_grad"].isnan().all(1).tolist() == [False, True, False]


def test_ignored_rows_are_zeros(backend):
    logits = make_logits(3, 40, torch.float32, backend.device)
    targets = torch.tensor([5, -100, 7], device=backend.device)
    weight = torch.randn(40, 3, device=backend.device)
    out = run_stats(backends.kernels(backend.device), logits, targets, None, 16, {}, weight)
    for name, value in out.items():
        assert (value[1] == 0).all(), name


def test_first_maximum_wins(backend):
    logits = torch.zeros(4, 300, device=backend.device)
    logits[:, [40, 130, 299]] = 2.0
    targets = torch.tensor([40, 130, 299, 0], device=backend.device)
    for step in (300, 128, 41):
        out = run_stats(backends.kernels(backend.device), logits, targets, None, step, {})
        assert out["is_top1"].tolist() == [True, False, False, False]


def test_no_rows(backend):
    logits = torch.empty(0, 40, device=backend.device)
    targets = torch.empty(0, dtype=torch.int64, device=backend.device)
    weight = torch.randn(40, 3, device=backend.device)
    out = run_stats(backends.kernels(backend.device), logits, targets, None, 16, {}, weight)
    assert out["unit_grad"].shape == (0, 3)


def test_outputs_go_to_the_given_rows(backend):
    logits = make_logits(3, 40, torch.float32, backend.device)
    targets = torch.tensor([5, 6, 7], device=backend.device)
    rows = torch.tensor([4, 0, 2], device=backend.device)
    kernels = backends.kernels(backend.device)
    state = RowState.start(3, torch.float32, backend.device, 0)
    kernels.chunk_stats(Tile(logits, targets), state)
    packed, spread = (
        torch.zeros(3, device=backend.device),
        torch.full((5,), 9.0, device=backend.device),
    )
    kernels.finish_stats(state, targets, vocab=40, logprobs=packed)
    kernels.finish_stats(state, targets, vocab=40, rows=rows, logprobs=spread)
    assert torch.equal(spread[rows], packed)
    assert (spread[[1, 3]] == 9.0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("H", [1, 33, 260])
def test_scale_rows(backend, dtype, H):
    rows = torch.randn(5, H + 1, dtype=torch.float64).to(dtype).to(backend.device)[:, 1:]
    factors = torch.randn(5, dtype=accumulation_dtype(dtype), device=backend.device)
    factors[2] = 0
    rows[2] = torch.nan
    out = torch.full((5, H), torch.nan, dtype=dtype, device=backend.device)
    backends.kernels(backend.device).scale_rows(rows, factors, out)
    expected = (factors[:, None] * rows.to(factors.dtype)).to(dtype)
    expected[2] = 0
    assert torch.equal(out, expected)


def test_two_runs_are_bitwise_equal(backend):
    logits = make_logits(4, 777, torch.float32, backend.device)
    targets = torch.randint(777, (4,), device=backend.device)
    weight = torch.randn(777, 9, device=backend.device)
    kernels = backends.kernels(backend.device)
    first = run_stats(kernels, logits, targets, None, 256, {}, weight)
    second = run_stats(kernels, logits, targets, None, 256, {}, weight)
    assert all(torch.equal(first[name], second[name]) for name in first)
