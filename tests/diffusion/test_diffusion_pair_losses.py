"""Published vectors of the diffusion losses over pairs, and the published code they come from."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from tolerance import assert_close_to_truth
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastpo.diffusion import losses, noise_errors, noise_errors_with_reference

# Bounds of the published vectors, which have ten decimals.
VECTOR_BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-5}


class Errors(NamedTuple):
    chosen_errors: Tensor
    rejected_errors: Tensor
    ref_chosen_errors: Tensor
    ref_rejected_errors: Tensor

    @property
    def policy(self) -> tuple[Tensor, Tensor]:
        return self[:2]

    @property
    def swapped(self) -> Errors:
        return Errors(self[1], self[0], self[3], self[2])


@pytest.fixture
def fields() -> tuple[Tensor, Tensor, Tensor]:
    """Prediction, reference and target [4, 1, 2, 2] in float64: two chosen rows, two rejected."""
    i = torch.arange(1, 17, dtype=torch.float64)
    fields = torch.sin(0.37 * i), torch.cos(0.21 * i), 0.5 * torch.sin(0.9 * i)
    return tuple(field.reshape(4, 1, 2, 2) for field in fields)


def pairs_of(prediction: Tensor, reference: Tensor, target: Tensor) -> Errors:
    errors, ref_errors = noise_errors_with_reference(prediction, reference, target)
    return Errors(*errors.chunk(2), *ref_errors.chunk(2))


@pytest.fixture
def pairs(fields) -> Errors:
    return pairs_of(*fields)


@pytest.fixture(params=list(VECTOR_BOUNDS), ids=str)
def vector_dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture
def cast(vector_dtype):
    """Numbers as a tensor of the dtype under test."""
    return lambda numbers: torch.as_tensor(numbers, dtype=vector_dtype)


@pytest.fixture
def check(vector_dtype):
    """Compare with a published vector in the dtype under test; it must come back in that dtype."""

    def check(got: Tensor, expected: list[float] | float) -> None:
        bound = VECTOR_BOUNDS[vector_dtype]
        want = torch.tensor(expected, dtype=vector_dtype)
        torch.testing.assert_close(got, want, rtol=0, atol=bound)

    return check


WITH_REFERENCE = {
    "dpo": (losses.dpo, dict(beta=2.0), 1.0555918744),
    "dpo_kappa_1": (losses.dpo, dict(beta=2.0, kappa=1.0), 1.5308585001),
    "dpo_weights": (losses.dpo, dict(beta=2.0, weights=[0.7, 1.3]), 1.1807451950),
    "dpo_as_dso": (losses.dpo, dict(beta=1.0), 0.8568180800),
    "hinge": (losses.hinge, dict(beta=2.0), 2.1584052994),
    "ipo": (losses.ipo, dict(beta=2.0), 0.9635468293),
    "pso": (losses.pso, dict(beta=2.0), 1.1043391942),
}
WITHOUT_REFERENCE = {
    "contrast": (losses.contrast, {}, 0.1498937423),
    "mapo_10": (losses.mapo, dict(timesteps=10), 0.8119428295),
    "mapo": (losses.mapo, {}, 4.0334663128),
    "orpo": (losses.orpo, {}, 0.8017600115),
    "orpo_published_sign": (losses.orpo, dict(published_sign=True), 0.7867706373),
    "pso_db": (losses.pso_db, dict(beta=2.0, prior_weight=0.0), 2.3343485682),
    "pso_db_prior": (losses.pso_db, dict(beta=2.0, prior_weight=0.5), 2.6217266469),
}


def check_reductions(check, loss, errors, options, mean):
    check(loss(*errors, **options).loss, mean)
    per_pair = loss(*errors, reduction="none", **options).loss
    check(per_pair.mean(), mean)
    torch.testing.assert_close(loss(*errors, reduction="sum", **options).loss, per_pair.sum())


@pytest.mark.parametrize("key", WITH_REFERENCE)
def test_vector_with_a_reference(key, pairs, cast, check):
    loss, options, mean = WITH_REFERENCE[key]
    if "weights" in options:
        options = options | {"weights": cast(options["weights"])}
    check_reductions(check, loss, [cast(x) for x in pairs], options, mean)


@pytest.mark.parametrize("key", WITHOUT_REFERENCE)
def test_vector_without_a_reference(key, pairs, cast, check):
    loss, options, mean = WITHOUT_REFERENCE[key]
    check_reductions(check, loss, [cast(x) for x in pairs.policy], options, mean)


def test_vector_of_mapo_on_small_errors(cast, check):
    check(losses.mapo(cast([0.20, 0.30]), cast([0.25, 0.28])).loss, 0.4883525294)


def test_rewards_of_dpo_differ_by_the_margin(pairs, cast, check):
    out = losses.dpo(*(cast(x) for x in pairs), beta=2.0)
    check(out.chosen_rewards - out.rejected_rewards, [-0.0538743762, -1.1045309233])
    assert (out.chosen_rewards > out.rejected_rewards).double().mean() == 0  # implicit accuracy


def test_gradient_of_dpo_in_the_prediction(fields):
    prediction, reference, target = fields
    prediction.requires_grad_()
    losses.dpo(*pairs_of(prediction, reference, target), beta=2.0).loss.backward()
    want = {
        0: [-0.0038571545, 0.0240512422, 0.0875469627, 0.1562399370],
        2: [0.0862929293, 0.0944641928, 0.0734125571, 0.0606739930],
    }
    for row, gradient in want.items():
        got = prediction.grad[row].flatten().tolist()
        assert got == pytest.approx(gradient, rel=0, abs=1e-9)


def test_vectors_of_smpo(pairs, cast, check):
    weights = losses.smpo_weights(cast([0.22]), cast([0.20]), gamma=1.0)
    check((weights + 1) / 2, [0.5299795237])
    scores = cast([math.log(0.6 / 0.4), math.log(0.8 / 0.2)]), cast([0.0, 0.0])
    options = dict(beta=2.0, lowest=0.0, highest=1.0)
    errors = [cast(x) for x in pairs]
    check(losses.smpo(*errors, *scores, **options).loss, 3.6884903136)
    check(losses.smpo(*errors, *scores, **options, first_pair=True).loss, 1.5308585001)


@pytest.mark.parametrize(("norm", "want"), [("none", 0.9130152524), ("all", 0.7620344253)])
def test_vector_of_dense_dpo(norm, want, cast, check):
    first, second = cast([[0.10, -0.05, 0.20]]), cast([[0.02, 0.07, 0.11]])
    zero, labels = torch.zeros_like(first), torch.tensor([[1, -1, 0]])
    check(losses.dense_dpo(first, second, zero, zero, labels, beta=2.0, norm=norm).loss, want)


def test_vectors_of_inversion_dpo(cast, check):
    errors = cast([[0.02, 0.05]]), cast([[0.04, 0.03]])
    alphas_cumprod, options = cast([0.9, 0.6]), dict(beta=20.0)
    published = losses.inversion_dpo(*errors, alphas_cumprod, **options)
    check(published.loss, 0.6793547392)
    check(published.rejected_rewards - published.chosen_rewards, [0.0027777778 * 10])
    derived = losses.inversion_dpo(*errors, alphas_cumprod, **options, published_sign=False)
    check(derived.loss, 0.7071325170)
    check(derived.rejected_rewards - derived.chosen_rewards, [0.0027777778 * 10])


def test_vectors_of_seppo(cast, check):
    errors = cast([0.20, 0.20]), cast([0.31, 0.31]), cast([0.26, 0.15]), cast([0.29, 0.29])
    loss = losses.seppo(*errors, beta=2.0, reduction="none").loss
    check(loss, [0.6163437730, 0.7655951823])


def test_vector_of_adaptive_balance(cast, check):
    check(losses.adaptive_balance([cast(0.9), cast(0.3)]), 0.75)


def loss_differences(errors: Errors) -> Tensor:
    """Difference of the reference's losses minus that of the model's, as diffusers forms them."""
    return (errors[2] - errors[3]) - (errors[0] - errors[1])


@pytest.mark.parametrize(
    ("published", "ours"),
    [
        # diffusers, SD 1.5: loss types sigmoid, hinge, and ipo once it reads the right argument
        (lambda m, b: -logsigmoid(b * m).mean(), lambda e, b: losses.dpo(*e, b, kappa=1.0)),
        (lambda m, b: torch.relu(1 - b * m).mean(), lambda e, b: losses.hinge(*e, b)),
        (lambda m, b: ((m - 1 / (2 * b)) ** 2).mean(), lambda e, b: losses.ipo(*e, b)),
        # diffusers, SDXL; the authors
        (lambda m, b: -logsigmoid(-0.5 * b * -m).mean(), lambda e, b: losses.dpo(*e, b)),
    ],
    ids=["sigmoid", "hinge", "ipo", "half"],
)
def test_parity_with_published_training_scripts(published, ours, pairs):
    for beta in (2.0, 2500.0):
        torch.testing.assert_close(ours(pairs, beta).loss, published(loss_differences(pairs), beta))


def gradients(loss, *errors: Tensor) -> tuple[Tensor, ...]:
    leaves = [error.clone().requires_grad_() for error in errors]
    return torch.autograd.grad(loss(*leaves).loss, leaves)


def test_published_orpo_is_less_averse_to_errors_of_the_chosen(pairs):
    """Its ratio term rewards them: against plain fine-tuning its gradient is the smaller one."""
    published, _ = gradients(lambda *e: losses.orpo(*e, published_sign=True), *pairs.policy)
    plain, _ = gradients(lambda *e: losses.orpo(*e, beta=0.0), *pairs.policy)
    ours, _ = gradients(losses.orpo, *pairs.policy)
    assert (published < plain).all()
    assert (ours > plain).all()


def test_published_inversion_dpo_drives_the_chosen_away_from_the_reference():
    errors, alphas_cumprod = (
        torch.tensor([[[0.02, 0.05]], [[0.04, 0.03]]]),
        torch.tensor([0.9, 0.6]),
    )
    derived, _ = gradients(
        lambda *e: losses.inversion_dpo(*e, alphas_cumprod, published_sign=False), *errors
    )
    published, _ = gradients(lambda *e: losses.inversion_dpo(*e, alphas_cumprod), *errors)
    assert (derived > 0).all()
    assert (published < 0).all()


def test_inversion_dpo_has_no_gradient_at_the_reference(fields):
    prediction, *_ = fields
    policy = prediction.clone().requires_grad_()
    errors = noise_errors(policy, prediction).reshape(2, 2)
    out = losses.inversion_dpo(errors[:1], errors[1:], torch.tensor([0.9, 0.6]))
    assert out.loss.item() == pytest.approx(math.log(2), rel=1e-15)
    out.loss.backward()
    assert not policy.grad.any()


def test_smpo_of_one_pair_does_not_know_the_published_flag(pairs):
    one = [x[1:] for x in pairs]
    scores = torch.tensor([0.22]), torch.tensor([0.20])
    assert torch.equal(
        losses.smpo(*one, *scores).loss, losses.smpo(*one, *scores, first_pair=True).loss
    )


def test_published_flag_of_smpo_keeps_the_order_of_each_pair(pairs, cast, check):
    """The code turns every pair by its scores, then weighs all by the first one's p."""
    errors, one, zero = [cast(x) for x in pairs], cast([1.0, 1.0]), cast([0.0, 0.0])
    options = dict(gamma=1.0, lowest=0.0, highest=1.0, first_pair=True)
    size = 2 / (1 + math.exp(-0.5)) - 1
    for signs in ([1, 1], [1, -1], [-1, 1], [-1, -1]):
        scores = cast([0.5, 0.2]) * cast(signs), zero
        weights = losses.smpo_weights(*scores, **options)
        check(weights, [size * sign for sign in signs])
        turned = [torch.where(cast(signs) > 0, *sides) for sides in (errors[:2], errors[1::-1])]
        refs = [torch.where(cast(signs) > 0, *sides) for sides in (errors[2:], errors[:1:-1])]
        want = losses.dpo(*turned, *refs, beta=2.0, weights=size * one).loss
        torch.testing.assert_close(losses.smpo(*errors, *scores, beta=2.0, **options).loss, want)


def test_mapo_at_errors_of_zero():
    """The published quotient is 0 / 0 there; the limits are 1 for phi and -1/2 for its slope."""
    zero = torch.zeros(1)
    assert (zero / torch.expm1(zero)).isnan().all()
    out = losses.mapo(zero, zero)
    assert out.chosen_rewards.tolist() == [1000.0]
    # d / d e = 1 + beta T snr sigmoid(0) / 2 for the chosen, beta T snr sigmoid(0) / -2 else
    chosen, rejected = gradients(losses.mapo, zero, zero)
    assert (chosen.item(), rejected.item()) == pytest.approx((13.5, -12.5))


def test_mapo_gradient_keeps_its_digits_at_small_errors():
    """Those of the plain quotient lose them: its terms are 1 / x large, and cancel."""
    errors = torch.logspace(-7, 2, 91)
    beta = 2.0**20  # the slope of the loss is 1 - beta sigmoid(phi(0) - phi(x)) phi'(x)
    slopes = []
    for x in (errors, errors.double()):
        x.requires_grad_()
        options = dict(beta=beta, snr=1.0, timesteps=1, reduction="sum")
        out = losses.mapo(x, torch.zeros_like(x), **options)
        (gradient,) = torch.autograd.grad(out.loss, x)
        slopes.append((1 - gradient) / (beta * torch.sigmoid(1 - out.chosen_rewards)))
    narrow, wide = slopes
    assert_close_to_truth(narrow, wide, wide.float())
    x = errors.detach().double()
    exact = (torch.expm1(x) - x * x.exp()) / torch.expm1(x) ** 2
    bound = 16 * torch.finfo(torch.float64).eps * (1 + 1 / x)  # the exact form cancels
    assert ((wide - exact).abs() <= bound).all()
