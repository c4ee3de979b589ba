"""token_surrogate against its reference in float64, on every backend."""

from __future__ import annotations

import math

import pytest
import torch
from tolerance import assert_close_to_truth
from torch import Tensor

from fastpo import backends
from fastpo.operands import (
    CORRECTIONS,
    KL_KINDS,
    RATIO_LEVELS,
    SURROGATE_KINDS,
    SURROGATE_ROWS,
    Surrogate,
    SurrogateInputs,
)
from fastpo.ops.token_surrogate import setting_lists, token_surrogate
from fastpo.tiles import accumulation_dtype

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LAYOUTS = [
    (3, 7),  # below one vector, odd
    (2, 66),  # past a thread block of the simulator
    (1, 1037),  # past a thread block, and past several folds of the sums
    (4, 0),  # no position
    (0, 5),  # no sequence
    ([3, 0, 517, 1], 0, 0),  # an empty sequence
    ([4, 33], 2, 3),  # positions in no sequence
    ([], 0, 6),  # no sequence at all
]
_LOGPROBS = ("logprobs", "old_logprobs", "ref_logprobs", "sampler_logprobs")


class Case:
    """Inputs of one dtype; at masked positions lies NaN."""

    def __init__(self, layout, dtype, device, *, per_token=False, mask=True, seed=0) -> None:
        if isinstance(layout[0], int):
            self.shape, self.offsets, B = layout, None, layout[0]
        else:
            lengths, before, after = layout
            bounds = torch.tensor([before, *lengths]).cumsum(0)
            self.shape, self.offsets, B = (
                (int(bounds[-1]) + after,),
                bounds.to(device),
                len(lengths),
            )
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(shape or self.shape, generator=generator, dtype=torch.float64)

        wide = self.shape if per_token else (B, 1)
        lp = -normal().exp()
        tensors = {
            "logprobs": lp,
            "old_logprobs": lp + 0.3 * normal(),
            "ref_logprobs": lp + 0.3 * normal(),
            "sampler_logprobs": lp + 0.2 * normal(),
            "advantages": normal(*wide),
            "weights": normal(*wide).abs() if per_token else None,
            "penalties": normal(*wide).abs() if per_token else None,
            "clip_low": 0.3 * normal(*wide).abs() if per_token else None,
            "clip_high": 0.3 * normal(*wide).abs() if per_token else None,
        }
        active = torch.rand(self.shape, generator=generator) > 0.3
        if mask:
            for x in tensors.values():
                if x is not None and x.shape == self.shape:
                    x[~active] = math.nan
        acc = accumulation_dtype(dtype)
        self.mask = active.to(device) if mask else None
        self.inputs = SurrogateInputs(
            **{
                name: None if x is None else x.to(device, dtype if name in _LOGPROBS else acc)
                for name, x in tensors.items()
            }
        )

    def run(self, settings: Surrogate, backend: str | None = None, dtype=None, **changes):
        """Rows [15, B] and the gradient of a weighted sum of the losses."""
        inputs = self.inputs._replace(**changes)
        if dtype is not None:
            inputs = SurrogateInputs(*(None if x is None else x.to(dtype) for x in inputs))
        leaf = inputs.logprobs.detach().clone().requires_grad_()
        arguments = inputs._replace(logprobs=leaf), settings, self.mask, self.offsets
        if backend is None:
            loss, rows = token_surrogate(*arguments)
        else:
            with backends.use(backend):
                loss, rows = token_surrogate(*arguments)
        row = rows[SURROGATE_ROWS.index("loss")]
        torch.testing.assert_close(loss.detach(), row, rtol=0, atol=0, equal_nan=True)
        weights = torch.linspace(0.5, 1.5, loss.shape[0], dtype=loss.dtype, device=loss.device)
        (grad,) = torch.autograd.grad(loss, leaf, weights)
        return rows, grad


def check(case: Case, settings: Surrogate, backend, **changes) -> None:
    """Rows and gradient are as good as the reference in the same dtype."""
    rows, grad = case.run(settings, **changes)
    true_rows, true_grad = case.run(settings, "reference", torch.float64, **changes)
    base_rows, base_grad = case.run(settings, "reference", **changes)
    assert grad.dtype == case.inputs.logprobs.dtype
    assert torch.equal(rows[0].double(), true_rows[0])
    for name, *found in zip(SURROGATE_ROWS, rows, true_rows, base_rows, strict=True):
        if not name.endswith(("min", "max")):  # a sum, whose terms may cancel: as a mean
            found = [row / true_rows[0].to(row).clamp(min=1) for row in found]
        assert_close_to_truth(*found, what=name)
    assert_close_to_truth(grad, true_grad, base_grad, what="grad")
    if case.mask is not None:
        assert (grad[~case.mask] == 0).all()


SETTINGS = Surrogate(
    beta=0.3, delta=1.25, kl_max=0.2, sampler_min=0.8, sampler_max=1.3, log_ratio_max=0.6
)


@pytest.mark.parametrize("kl", KL_KINDS)
@pytest.mark.parametrize("level", RATIO_LEVELS)
@pytest.mark.parametrize("kind", SURROGATE_KINDS)
def test_every_kind_level_and_kl(kind, level, kl, backend):
    for per_token in (False, True):
        case = Case((2, 66), torch.float32, backend.device, per_token=per_token)
        settings = SETTINGS.with_options(kind=kind, level=level, kl=kl, unbiased_kl=per_token)
        check(case, settings, backend)


@pytest.mark.parametrize("correct_sequence", [False, True])
@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("level", ["token", "sequence", "sequence_sum"])
@pytest.mark.parametrize("kind", ["clip", "vespo", "gmpo"])
def test_corrections(kind, level, correction, correct_sequence, backend):
    case = Case((2, 37), torch.float64, backend.device)
    sampler = case.inputs.sampler_logprobs.clone()
    sampler[:, ::5] = math.nan  # tokens the sampler did not score
    options = dict(kind=kind, level=level, correction=correction)
    settings = SETTINGS.with_options(correct_sequence=correct_sequence, **options)
    for off_policy_max in (math.inf, 0.0):
        settings = settings.with_options(off_policy_max=off_policy_max, log_ratio_max=20.0)
        check(case, settings, backend, sampler_logprobs=sampler)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_layouts(layout, level, dtype, backend):
    settings = Surrogate(level=level, kl="k3", beta=0.1, correction="truncate", sampler_max=1.2)
    for per_token, mask in ((False, False), (True, True)):
        case = Case(layout, dtype, backend.device, per_token=per_token, mask=mask)
        check(case, settings, backend)


def test_absent_inputs(backend):
    case = Case((3, 37), torch.float64, backend.device)
    absent = dict.fromkeys(("ref_logprobs", "sampler_logprobs"))
    check(case, Surrogate(), backend, **absent)
    check(case, Surrogate(level="sequence_sum"), backend, **absent)
    # Without old log-probs the ratio is 1, and its gradient that of REINFORCE.
    rows, grad = case.run(Surrogate(), old_logprobs=None, **absent)
    want = case.run(Surrogate(kind="reinforce"), **absent)[1]
    torch.testing.assert_close(grad, want, rtol=0, atol=0)
    active = case.mask.sum(1)
    assert torch.equal(rows[SURROGATE_ROWS.index("ratio")], active.double())


def test_rows_of_any_stride(backend):
    case = Case((3, 37), torch.float32, backend.device, per_token=True)
    mask = case.mask

    def spread(x: Tensor, step: int) -> Tensor:
        wide = torch.zeros(3, step * 37 + 5, dtype=x.dtype, device=x.device)
        return wide[:, 3 : 3 + step * 37 : step].copy_(x)

    settings = SETTINGS.with_options(kl="k3", correction="mask")
    want = case.run(settings)
    changes = {n: spread(x, 1 + i % 2) for i, (n, x) in enumerate(case.inputs._asdict().items())}
    case.mask = spread(mask, 1)
    got = case.run(settings, **changes)
    # One value for all sequences, and a column of a wider tensor.
    for a in (torch.ones(1, 1).expand(3, 1), torch.arange(6.0).view(3, 2)[:, 1:]):
        strided = case.run(settings, advantages=a.to(mask.device))[0]
        dense = case.run(settings, advantages=a.to(mask.device).contiguous())[0]
        assert torch.equal(strided, dense)
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x, y)


def test_packing_does_not_change_a_bit(backend):
    lengths = [3, 130, 1, 0, 29]
    packed = Case((lengths, 0, 0), torch.float32, backend.device, per_token=True)
    settings = SETTINGS.with_options(kl="k3", level="sequence", correction="truncate")
    rows, grad = packed.run(settings)
    again = packed.run(settings)
    assert torch.equal(rows, again[0])
    assert torch.equal(grad, again[1])
    T = max(lengths) + 2

    def padded(x: Tensor) -> Tensor:
        pieces = x.split(lengths)
        return torch.stack([torch.nn.functional.pad(p, (0, T - len(p))) for p in pieces])

    row_case = Case((len(lengths), T), torch.float32, backend.device, per_token=True)
    row_case.inputs = SurrogateInputs(*(padded(x) for x in packed.inputs))
    row_case.mask = padded(packed.mask)
    wide_rows, wide_grad = row_case.run(settings)
    assert torch.equal(rows, wide_rows)
    for b, piece in enumerate(grad.split(lengths)):
        assert torch.equal(piece, wide_grad[b, : lengths[b]])


def one_sequence(backend, log_ratios, advantages, **settings):
    """Rows by name and the gradient, of tokens with these log-ratios, in float64."""
    d = torch.tensor([log_ratios], dtype=torch.float64, device=backend.device)
    a = torch.tensor([advantages], dtype=torch.float64, device=backend.device).expand(d.shape)
    lp = torch.full_like(d, -2.0).requires_grad_()
    inputs = SurrogateInputs(lp, -2.0 - d, None, None, a, None, None, None, None)
    loss, rows = token_surrogate(inputs, Surrogate(**settings), None, None)
    (grad,) = torch.autograd.grad(loss.sum(), lp)
    return dict(zip(SURROGATE_ROWS, rows[:, 0].tolist(), strict=True)), grad[0].tolist()


def test_ties_have_the_full_gradient(backend):
    # Bounds of 1/2 and 2, that a ratio meets exactly.
    bounds = dict(clip_low=0.5, clip_high=1.0)
    for a in (1.0, -1.0):
        rows, grad = one_sequence(backend, [0.0], [a], **bounds)
        assert grad == [-a]
        assert (rows["clipped_low"], rows["clipped_high"]) == (0, 0)
    # At either bound, met to the last bit.
    for log_ratio, a, name, sign in ((0.5, 1.0, "clip_high", 1), (-0.5, -1.0, "clip_low", -1)):
        d = torch.tensor(log_ratio, dtype=torch.float64)
        bound = sign * (d.exp().item() - 1)
        assert 1 + sign * bound == d.exp().item()
        for held, slope in ((1e-6, 1.0), (0.0, None), (-1e-6, 0.0)):
            rows, grad = one_sequence(backend, [log_ratio], [a], **{name: bound + held})
            if slope is None:  # the ratio may differ in its last bit
                slope = 0.0 if rows["clipped_low"] + rows["clipped_high"] else 1.0
            assert grad[0] == pytest.approx(-a * slope * d.exp().item(), rel=1e-14)


def test_delta_and_dual_clip(backend):
    d, a = [math.log(5), 0.1, -1.0, math.log(1.25)], [-1.0]
    wanted = {"delta": 4.0, "dual_clip": 4.0}
    for name, most in wanted.items():
        rows, grad = one_sequence(backend, d[:1], a, **{name: most})
        assert rows["loss"] == pytest.approx(4.0)
        assert grad == [0.0]
        assert rows["dual_clipped"] == 1
    # Below the upper bound delta alone does not hold the ratio back, the dual clip does.
    rows, grad = one_sequence(backend, d[3:], a, clip_high=0.28, delta=1.1)
    assert rows["loss"] == pytest.approx(1.25)
    assert grad == pytest.approx([1.25])
    rows, grad = one_sequence(backend, d[3:], a, clip_high=0.28, dual_clip=1.1)
    assert rows["loss"] == pytest.approx(1.1)
    assert grad == [0.0]
    # Even below the lower bound.
    rows, grad = one_sequence(backend, [-1.0], a, dual_clip=0.5)
    assert rows["loss"] == pytest.approx(0.5)
    assert grad == [0.0]
    # With A > 0 delta is an upper bound too.
    rows, grad = one_sequence(backend, d[3:], [1.0], clip_high=0.28, delta=1.1)
    assert rows["loss"] == pytest.approx(-1.1)
    assert grad == [0.0]
    assert rows["dual_clipped"] == 0


def test_counts(backend):
    rows, _ = one_sequence(
        backend, [-0.5, -0.5, 0.5, 0.5, 0.0, 3.0], [-1, 1, 1, -1, 1, -1], dual_clip=3.0
    )
    names = ("tokens", "clipped_low", "clipped_high", "dual_clipped", "weight", "weight_sq")
    assert [rows[name] for name in names] == [6, 1, 1, 1, 6, 6]
    assert rows["ratio_min"] == pytest.approx(math.exp(-0.5))
    assert rows["ratio_max"] == pytest.approx(math.exp(3.0))


def test_extreme_log_ratios(backend):
    case = Case((1, 40), torch.float32, backend.device, mask=False)
    for bad in (1000.0, -1000.0, -math.inf):
        old = case.inputs.old_logprobs.clone()
        lp = case.inputs.logprobs.clone()
        lp[0, 3] = bad if bad < 0 else -1.0
        old[0, 3] = -1.0 if bad < 0 else -1001.0
        for level in ("token", "sequence", "sequence_sum"):
            settings = Surrogate(level=level, kl="k3", beta=0.1, kl_max=10.0)
            check(case, settings, backend, logprobs=lp, old_logprobs=old)
            rows, grad = case.run(settings, logprobs=lp, old_logprobs=old)
            assert rows.isfinite()[: SURROGATE_ROWS.index("sampler_gap")].all()
            assert grad.isfinite().all()


def test_all_masked(backend):
    case = Case((2, 40), torch.float32, backend.device)
    case.mask[0] = False
    for level in RATIO_LEVELS:
        for kind in SURROGATE_KINDS:
            settings = SETTINGS.with_options(kind=kind, level=level, kl="k3", correction="mask")
            rows, grad = case.run(settings)
            first = dict(zip(SURROGATE_ROWS, rows[:, 0].tolist(), strict=True))
            assert first.pop("ratio_min") == math.inf
            assert first.pop("ratio_max") == -math.inf
            assert set(first.values()) == {0.0}
            assert (grad[0] == 0).all()
            assert rows[:, 1].isfinite().all()


@pytest.mark.parametrize("name", ["logprobs", "old_logprobs", "ref_logprobs", "advantages"])
@pytest.mark.parametrize("kind", ["clip", "cispo", "sapo", "gmpo"])
def test_nan_inside_shows(kind, name, backend):
    case = Case((2, 37), torch.float32, backend.device, per_token=True, mask=False)
    tensor = getattr(case.inputs, name).clone()
    tensor[0, 9] = math.nan
    rows, grad = case.run(Surrogate(kind=kind, kl="k3", beta=0.1), **{name: tensor})
    assert rows[SURROGATE_ROWS.index("loss"), 0].isnan()
    assert grad[0, 9].isnan()
    assert rows[:, 1].isfinite().all()
    assert grad[1].isfinite().all()
    if kind != "gmpo":  # whose ratio is that of all tokens
        assert grad[0].isnan().sum() == 1
    ratio = rows[[SURROGATE_ROWS.index(n) for n in ("ratio_min", "ratio_max")], 0]
    assert ratio.isnan().tolist() == [name in ("logprobs", "old_logprobs")] * 2


def test_rows_without_gradients(backend):
    case = Case((3, 37), torch.float32, backend.device, per_token=True)
    for level in RATIO_LEVELS:
        settings = SETTINGS.with_options(level=level, kl="k3", unbiased_kl=True)
        with torch.no_grad():
            loss, rows = token_surrogate(case.inputs, settings, case.mask, case.offsets)
        assert not loss.requires_grad
        assert torch.equal(rows, case.run(settings)[0])


@pytest.mark.parametrize("level", RATIO_LEVELS)
@pytest.mark.parametrize("kind", ["clip", "sapo", "gmpo", "reinforce"])
def test_gradcheck(kind, level, backend):
    case = Case((2, 5), torch.float64, backend.device, per_token=True)
    if level == "sequence_token":
        pytest.skip("its gradient is not that of its value")
    if backend.is_sim:
        pytest.skip("slow there; test_every_kind_level_and_kl compares it with the reference")
    settings = Surrogate(kind=kind, level=level, kl="k3", beta=0.1, unbiased_kl=True)
    clean = SurrogateInputs(*(x.nan_to_num(0.0, 0.0, 0.0) for x in case.inputs))
    leaf = clean.logprobs.clone().requires_grad_()

    def losses(lp):
        return token_surrogate(clean._replace(logprobs=lp), settings, case.mask, None)[0]

    torch.autograd.gradcheck(losses, leaf)
    torch.autograd.gradcheck(lambda lp: losses(lp).square().sum(), leaf)


def test_opcheck(backend):
    case = Case(([3, 5], 1, 2), torch.float32, backend.device)
    leaf = case.inputs.logprobs.clone().requires_grad_()
    settings = Surrogate(kl="k3", beta=0.1)
    tensors = (leaf, *case.inputs[1:], case.mask, case.offsets)
    arguments = (*tensors, True, *setting_lists(settings))
    torch.library.opcheck(torch.ops.fastpo.token_surrogate.default, arguments)
