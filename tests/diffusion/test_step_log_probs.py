"""Gaussian denoising steps: vectors, conversions, log-densities, gradients, KL, errors."""

from __future__ import annotations

import inspect
import math
import re

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from fastpo import diffusion
from fastpo.diffusion import (
    Step,
    dance_step,
    ddim_step,
    flow_step,
    renoise_step,
    step_kl,
    step_log_probs,
    wan_step,
)


def doubles(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


X, PREDICTION = doubles([0.5, -0.3, 0.8, 0.1]), doubles([0.2, 0.1, -0.4, 0.6])
X_NEXT = doubles([0.48, -0.25, 0.9, 0.0])
TYPES = ["epsilon", "v_prediction", "sample"]
STEPS = {
    "ddim": lambda *ends: ddim_step(*ends, eta=0.8),
    "renoise": renoise_step,
    "flow": lambda *ends: flow_step(*(1 - torch.stack(ends)), sigma_max=0.95),
    "wan": lambda *ends: wan_step(*(1 - torch.stack(ends)), sigma_max=0.95),
    "dance": lambda *ends: dance_step(*(1 - torch.stack(ends))),
}


def check_vector(got, expected):
    torch.testing.assert_close(got, got.new_tensor(expected), rtol=0, atol=1e-9)


VECTORS = [
    pytest.param(
        ddim_step(0.5, 0.6), 0.3651483717,
        [0.4960827796, -0.3544534235, 0.9796356479, -0.0453748223], 0.0701662104, id="ddim",
    ),
    pytest.param(
        flow_step(0.6, 0.5, 0.7), 0.8573214100 * 0.1**0.5,
        [0.4444750000, -0.2940750000, 0.8008000000, 0.0191750000], 0.3634852605, id="flow",
    ),
    pytest.param(
        dance_step(0.6, 0.5, 0.3), 0.0948683298,
        [0.4756500000, -0.3080500000, 0.8352000000, 0.0374500000], None, id="dance",
    ),
    pytest.param(
        renoise_step(0.5, 0.6), 0.4**0.5,
        [0.3928032237, -0.4060932014, 1.1861947597, -0.3552134900], -0.5358095514, id="renoise",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("step", "std", "mean", "logprob"), VECTORS)
def test_vectors(backend, step, std, mean, logprob):
    x, prediction, x_next = (t.to(backend.device) for t in (X, PREDICTION, X_NEXT))
    check_vector(step.std, std)
    check_vector(step.mean(prediction, x), [mean])
    logprobs = step_log_probs(step, prediction, x, x_next)
    if logprob is None:  # published without its constants
        constants = step.std.log() + 0.5 * doubles(2 * torch.pi).log()
        check_vector(logprobs + constants.to(backend.device), [-0.1248648264])
    else:
        check_vector(logprobs, [logprob])


def test_kl_vector():
    """The repository's figure, of a std without sqrt(-dt), is -dt times the exact one."""
    step = flow_step(0.6, 0.5, 0.7)
    shift = doubles([0.01, -0.02, 0.03, 0.0]) / step.prediction_scale
    kl = step_kl(step, PREDICTION + shift, PREDICTION)
    check_vector(kl, [0.0023809524])
    check_vector(0.1 * kl, [0.0002380952])


@pytest.mark.parametrize("make", [ddim_step, renoise_step])
def test_prediction_types_agree(make):
    """One step, whatever its model predicts of the same x0 and epsilon."""
    abar, previous = doubles(0.5, 0.1, 0.99), doubles(0.6, 0.4, 0.999)
    clean, noise = torch.randn(2, 3, 7, dtype=torch.float64)
    root, rest = (x.sqrt().view(3, 1) for x in (abar, 1 - abar))
    x = root * clean + rest * noise
    predictions = {"epsilon": noise, "v_prediction": root * noise - rest * clean, "sample": clean}
    steps = {kind: make(abar, previous, prediction_type=kind) for kind in TYPES}
    for kind in TYPES:
        torch.testing.assert_close(steps[kind].std, steps["epsilon"].std, rtol=0, atol=0)
        torch.testing.assert_close(
            steps[kind].mean(predictions[kind], x), steps["epsilon"].mean(noise, x),
            rtol=1e-12, atol=1e-12,
        )  # fmt: skip


def test_limits_of_steps():
    clean, noise = torch.randn(2, 1, 5, dtype=torch.float64)
    x = 0.5**0.5 * (clean + noise)
    # Without noise, the next state of the same x0 and epsilon.
    step = ddim_step(0.5, 0.6, eta=doubles(0.0))
    assert step.std == 0
    torch.testing.assert_close(step.mean(noise, x), 0.6**0.5 * clean + 0.4**0.5 * noise)
    # To the end, x0; from pure noise too, where v is predicted.
    last = ddim_step(0.5, doubles(1.0))
    assert last.std == 0
    torch.testing.assert_close(last.mean(noise, x), clean)
    step = ddim_step(0.0, 0.1, prediction_type="v_prediction")
    torch.testing.assert_close(step.mean(-clean, noise), 0.1**0.5 * clean)
    # The velocity alone, as an ODE steps.
    none = doubles(0.0)
    assert flow_step(0.6, 0.5, noise_level=none) == dance_step(0.6, 0.5, eta=none)
    assert flow_step(0.6, 0.5, noise_level=none)[0] == 1
    check_vector(flow_step(0.6, 0.5, noise_level=none)[1], [-0.1])


def test_flow_step_from_pure_noise():
    """sigma 1, or UniPC's 1 - 1e-6, takes the second sigma under the root, and others do not."""
    step = flow_step(doubles(1.0, 0.9), doubles(0.9, 0.8), sigma_max=0.9)
    check_vector(step.std, [0.7 * (1 / 0.1 * 0.1) ** 0.5, 0.7 * (0.9 / 0.1 * 0.1) ** 0.5])
    assert torch.equal(step.std[1], flow_step(0.9, 0.8).std)
    second = 0.982989  # 91.3 is 0.7 sqrt(1e6 (1 - 0.982989))
    for sigma in (1.0, 0.999999):
        std = 0.7 * sigma**0.5 * ((sigma - second) / (1 - second)) ** 0.5
        check_vector(flow_step(sigma, second, sigma_max=second).std, std)
        check_vector(flow_step(sigma, second).std, std)
    assert std == pytest.approx(0.70, abs=1e-4)


@pytest.mark.parametrize("solver", ["unipc", "euler"])
def test_steps_of_schedulers_for_flows(solver):
    """Every step of a schedule of Wan's, against the lines of the repositories."""
    diffusers = pytest.importorskip("diffusers")
    if solver == "unipc":
        scheduler = diffusers.UniPCMultistepScheduler(
            use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"
        )
    else:
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(20)
    sigmas = scheduler.sigmas.double()
    second, last = sigmas[1], sigmas[-1]
    held = torch.where(sigmas[:-1] > 0.99999, second, sigmas[:-1])  # Flow-GRPO: sigma == 1
    spreads = {
        flow_step: 0.7 * (sigmas[:-1] / (1 - held)).sqrt(),
        wan_step: last + (second - last) * sigmas[:-1],
    }
    x, velocity = torch.randn(2, 20, 5, dtype=torch.float64)
    for make, spread in spreads.items():
        options = {"sigma_min": last} if make is wan_step else {}
        step = make(sigmas[:-1], sigmas[1:], sigma_max=second, **options)
        sigma, dt, spread = (t[:, None] for t in (sigmas[:-1], sigmas.diff(), spread))
        drift = x * (1 + spread**2 / (2 * sigma) * dt)
        mean = drift + velocity * (1 + spread**2 * (1 - sigma) / (2 * sigma)) * dt
        torch.testing.assert_close(step.mean(velocity, x), mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(step.std, (spread * (-dt).sqrt())[:, 0], rtol=1e-12, atol=0)
        assert step.std.max() < 1


# Every builder, with a number of each argument inside its range.
INSIDE = {
    "alphas_cumprod": 0.5, "alphas_cumprod_prev": 0.6, "eta": 0.5, "sigma": 0.6, "sigma_next": 0.5,
    "noise_level": 0.7, "sigma_max": 0.95, "sigma_min": 0.01,
}  # fmt: skip
BUILDERS = [
    function
    for name in diffusion.__all__
    if inspect.isfunction(function := getattr(diffusion, name))
    and inspect.signature(function).return_annotation in (Step, "Step")
]
ENDS = {"alphas_cumprod": "alphas_cumprod_prev", "sigma": "sigma_next"}


def arguments_of(make):
    return [name for name in inspect.signature(make).parameters if name in INSIDE]


def test_all_builders_are_walked():
    assert {ddim_step, renoise_step, flow_step, wan_step, dance_step} <= set(BUILDERS)
    for make in BUILDERS:
        unknown = set(inspect.signature(make).parameters) - INSIDE.keys()
        assert unknown <= {"prediction_type"}


@pytest.mark.parametrize(
    ("make", "argument"),
    [pytest.param(m, a, id=f"{m.__name__}-{a}") for m in BUILDERS for a in arguments_of(m)],
)
def test_numbers_out_of_range_are_refused(make, argument):
    """Python numbers, and tensors where reading them waits for nothing; NaN is in no range."""
    inside = {name: INSIDE[name] for name in arguments_of(make)}
    assert make(**inside).has_density().all()
    outside = [-0.1, math.nan, math.inf]
    if argument not in ("noise_level", "eta"):
        outside.append(1.1)
    if argument not in ("sigma_next", "sigma_min"):
        outside.append(0.0)
    if argument in ENDS:  # the order of the two, and no step at all
        outside += [
            INSIDE[ENDS[argument]],
            INSIDE[ENDS[argument]] + (0.1, -0.1)["sigma" in argument],
        ]
    match = rf"^fastpo\.diffusion\.{make.__name__}: \w+: expected a number in .*, got "
    for number in outside:
        with pytest.raises(ValueError, match=match):
            make(**inside | {argument: number})
    for number in outside[:3]:
        with pytest.raises(ValueError, match=match):
            make(**inside | {argument: doubles(INSIDE[argument], number)})


@pytest.mark.parametrize("make", BUILDERS)
@pytest.mark.parametrize("K", [None, 2])
def test_steps_without_a_density_are_masked(make, K):
    """In a batch they give 0 and no gradient, and change nothing of the others."""
    inside = {name: INSIDE[name] for name in arguments_of(make)}
    start = "sigma" if "sigma" in inside else "alphas_cumprod"
    shape = (3, 4) if K is None else (3, K, 4)
    prediction, x = torch.randn(2, 3, 4, dtype=torch.float64)
    x_next, prediction = torch.randn(shape, dtype=torch.float64), prediction.requires_grad_()
    bad = {
        "no way to go": {ENDS[start]: INSIDE[start]},
        "from the end": {start: 0.0, ENDS[start]: 0.0} if start == "sigma" else {start: 0.0},
        "to the end": {ENDS[start]: 1.0} if start != "sigma" else {},
        "no noise": {name: 0.0 for name in ("eta", "noise_level") if name in inside},
    }
    for changes in filter(None, bad.values()):
        given = {n: doubles(v, changes.get(n, v), v) for n, v in inside.items()}
        step = make(**given)
        has = step.has_density(torch.float64)
        alone = make(**inside)
        if has.all():  # this builder's noise does not end there
            continue
        assert has.tolist() == [True, False, True]
        got = step_log_probs(step, prediction, x, x_next)
        kl = step_kl(step, prediction, x)
        for values, truth in (
            (got, step_log_probs(alone, prediction, x, x_next)),
            (kl, step_kl(alone, prediction, x)),
        ):
            assert not values[1].any()
            assert torch.equal(values[::2], truth[::2])
            grad, expected = (
                torch.autograd.grad(v.sum(), prediction, retain_graph=True)[0]
                for v in (values, truth[::2])
            )
            assert not grad[1].any()
            assert torch.equal(grad[::2], expected[::2])


def test_other_devices_are_not_read():
    """A tensor elsewhere is not waited for: what it holds shows in the density alone."""
    step = flow_step(torch.full((2,), 0.4, device="meta"), 0.5)
    assert ddim_step(doubles(0.5), 0.6, eta=0.0).std == 0  # an ODE's step, for its mean
    assert step.std.device.type == "meta"


def random_step(name, N, device):
    """Coefficients of N samples, from abar in (.1, .5) to (.6, .9)."""
    ends = torch.linspace(0.1, 0.5, N), torch.linspace(0.6, 0.9, N)
    return STEPS[name](*(end.double().to(device) for end in ends))


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("K", [None, 1, 3])
@pytest.mark.parametrize("guided", [False, True])
def test_density_and_gradients(backend, name, reduction, K, guided):
    """Against torch's normal distribution and finite differences, per sample."""
    N, shape, device = 3, (2, 4, 3), backend.device
    step = random_step(name, N, device)
    prediction, unconditional, x = torch.randn(3, N, *shape, dtype=torch.float64).to(device)
    x_next = torch.randn(N, *(() if K is None else (K,)), *shape, dtype=torch.float64).to(device)
    guidance = doubles(5.0, 1.0, -0.5).to(device)
    options = {"unconditional": unconditional, "guidance_scale": guidance} if guided else {}
    prediction.requires_grad_()
    unconditional.requires_grad_()

    def expected(prediction, unconditional):
        if guided:
            g = guidance.view(-1, 1, 1, 1)
            prediction = unconditional + g * (prediction - unconditional)
        std, mean = step.std.view(-1, 1, 1, 1), step.mean(prediction, x)
        if K is not None:
            std, mean = std[:, None], mean[:, None]
        densities = Normal(mean, std, validate_args=False).log_prob(x_next)
        return getattr(densities.flatten(-3), reduction)(-1)

    got = step_log_probs(step, prediction, x, x_next, reduction=reduction, **options)
    truth = expected(prediction, unconditional)
    torch.testing.assert_close(got, truth, rtol=1e-12, atol=1e-12)
    if backend.is_sim:
        return
    inputs = (prediction, unconditional) if guided else (prediction,)
    probe = torch.randn_like(got)
    grads = [torch.autograd.grad((out * probe).sum(), inputs) for out in (got, truth)]
    torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-11)

    def function(prediction, *unconditional):
        guide = dict(options, unconditional=unconditional[0]) if unconditional else {}
        return step_log_probs(step, prediction, x, x_next, reduction=reduction, **guide)

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


def test_candidates_share_a_prediction(backend):
    """K next states give what K calls do, in values exactly."""
    step = random_step("ddim", 3, backend.device)
    prediction, x = torch.randn(2, 3, 2, 5).to(backend.device)
    x_next = torch.randn(3, 4, 2, 5).to(backend.device)
    prediction.requires_grad_()
    together = step_log_probs(step, prediction, x, x_next)
    apart = [step_log_probs(step, prediction, x, x_next[:, k]) for k in range(4)]
    assert torch.equal(together, torch.stack(apart, 1))
    weights = torch.randn_like(together)
    grads = [
        torch.autograd.grad((out * weights).sum(), prediction)[0]
        for out in (together, torch.stack(apart, 1))
    ]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ratio_of_equal_policies_is_exactly_one(backend, dtype):
    step = random_step("flow", 3, backend.device)
    prediction, x, x_next = torch.randn(3, 3, 4, 33).to(backend.device, dtype)
    old = step_log_probs(step, prediction, x, x_next)
    new = step_log_probs(step, prediction.clone().requires_grad_(), x, x_next)
    ratio = (new - old).exp()
    assert (ratio == 1).all()
    advantages = doubles(1.2, -0.7, 5.0).to(backend.device)
    assert -(advantages * ratio).mean() == -advantages.mean()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_are_computed_in_float32(backend, dtype):
    step = random_step("flow", 3, backend.device)
    fields = torch.randn(4, 3, 50).to(backend.device, dtype)
    guide = {"guidance_scale": 4.5}
    got = step_log_probs(step, *fields[:3], unconditional=fields[3], **guide)
    wide = fields.float()
    assert torch.equal(got, step_log_probs(step, *wide[:3], unconditional=wide[3], **guide))
    mixed = step_log_probs(step, fields[0], *wide[1:3], unconditional=wide[3], **guide)
    assert torch.equal(got, mixed)
    assert got.dtype == torch.float32


def test_a_detached_branch_gets_no_gradient():
    step = flow_step(0.6, 0.5)
    prediction, unconditional = PREDICTION.clone().requires_grad_(), X.clone().requires_grad_()
    options = {"guidance_scale": 4.5}
    both = step_log_probs(step, prediction, X, X_NEXT, unconditional=unconditional, **options)
    grads = torch.autograd.grad(both, (prediction, unconditional))
    torch.testing.assert_close(grads[1], grads[0] * -3.5 / 4.5)
    one = step_log_probs(step, prediction, X, X_NEXT, unconditional=X, **options)
    assert torch.equal(one, both)
    assert torch.equal(torch.autograd.grad(one, prediction)[0], grads[0])
    other = step_log_probs(step, PREDICTION, X, X_NEXT, unconditional=unconditional, **options)
    assert torch.equal(torch.autograd.grad(other, unconditional)[0], grads[1])


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_kl_is_that_of_the_normals(backend, name, guided, reduction):
    step = random_step(name, 3, backend.device)
    prediction, u, reference, ref_u, x = torch.randn(5, 3, 2, 6, dtype=torch.float64).to(
        backend.device
    )
    options = {"unconditional": u, "reference_unconditional": ref_u} if guided else {}
    g = 3.0 if guided else 1.0
    prediction.requires_grad_()
    got = step_kl(step, prediction, reference, guidance_scale=g, reduction=reduction, **options)
    std = step.std.view(-1, 1, 1)
    policies = [
        Normal(step.mean(b + g * (a - b), x), std) for a, b in ((prediction, u), (reference, ref_u))
    ]
    truth = getattr(kl_divergence(*policies).flatten(1), reduction)(1)
    torch.testing.assert_close(got, truth, rtol=1e-11, atol=1e-11)
    grads = [torch.autograd.grad(kl.sum(), prediction) for kl in (got, truth)]
    torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-11)
    same = step_kl(step, reference.requires_grad_(), reference, guidance_scale=g, **(
        {"unconditional": ref_u, "reference_unconditional": ref_u} if guided else {}
    ))  # fmt: skip
    # What is left is the rounding of residuals: their terms are below 100 in size.
    residual = 100 * torch.finfo(torch.float64).eps
    assert same.max() <= 12 * residual**2
    assert torch.autograd.grad(same.sum(), reference)[0].abs().max() <= 100 * residual


def test_one_step_for_all_samples():
    prediction, x, x_next = torch.randn(3, 4, 6, dtype=torch.float64)
    expected = step_log_probs(ddim_step(*doubles([0.5] * 4, [0.6] * 4)), prediction, x, x_next)
    for step in (
        ddim_step(0.5, 0.6),
        ddim_step(doubles(0.5), 0.6),
        ddim_step(*doubles([0.5], [0.6])),
    ):
        assert torch.equal(step_log_probs(step, prediction, x, x_next), expected)
    broadcast = ddim_step(doubles(0.5, 0.5, 0.5, 0.5), 0.6)
    assert torch.equal(step_log_probs(broadcast, prediction, x, x_next), expected)
    assert all(field.shape == (4,) for field in broadcast)


def test_empty():
    step = flow_step(0.6, 0.5)
    nothing = torch.zeros(0, 4)
    assert step_log_probs(step, nothing, nothing, nothing).shape == (0,)
    assert step_log_probs(step, nothing, nothing, torch.zeros(0, 3, 4)).shape == (0, 3)
    assert step_kl(step, nothing, nothing).shape == (0,)
    prediction = X.clone().requires_grad_()
    none = step_log_probs(step, prediction, X, torch.zeros(1, 0, 4))
    assert none.shape == (1, 0)
    none.sum().backward()
    assert not prediction.grad.any()


@pytest.mark.parametrize(
    ("make", "argument", "others"),
    [
        (ddim_step, "alphas_cumprod", {"alphas_cumprod_prev": 0.6}),
        (ddim_step, "eta", {"alphas_cumprod": 0.5, "alphas_cumprod_prev": 0.6}),
        (renoise_step, "alphas_cumprod_prev", {"alphas_cumprod": 0.5}),
        (flow_step, "sigma", {"sigma_next": 0.4}),
        (flow_step, "sigma_max", {"sigma": 1.0, "sigma_next": 0.4}),
        (flow_step, "noise_level", {"sigma": 1.0, "sigma_next": 0.4}),
        (wan_step, "sigma_min", {"sigma": 1.0, "sigma_next": 0.4}),
        (dance_step, "sigma_next", {"sigma": 0.6}),
    ],
)
def test_no_gradient_is_promised_to_schedules(make, argument, others):
    match = rf"^fastpo\.diffusion\.{make.__name__}: {argument}: expected a constant"
    with pytest.raises(ValueError, match=match):
        make(**others, **{argument: doubles(0.5).requires_grad_()})


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"prediction": X.int()}, "prediction: expected float32, bfloat16, float16 or float64"),
        ({"sample": X[:, :2]}, "sample: expected shape (1, 4) (that of prediction), got (1, 2)"),
        ({"sample": X.clone().requires_grad_()}, "sample: expected a constant, got a tensor with"),
        ({"sample": X.to("meta")}, "sample on meta"),
        ({"next_samples": X[0]}, "next_samples: expected shape (1, 4) ([N, K, ...] of prediction"),
        ({"next_samples": X[:, :2, None]}, "next_samples: expected shape (1, 2, 4)"),
        ({"next_samples": X.clone().requires_grad_()}, "next_samples: expected a constant"),
        ({"next_samples": X.to("meta")}, "next_samples on meta"),
        ({"unconditional": X[:, :2]}, "unconditional: expected shape (1, 4)"),
        ({"guidance_scale": 2.0}, "unconditional: expected the prediction to guide away from"),
        ({"guidance_scale": doubles(1.0)}, "got a guidance scale alone. Pass the unconditional"),
        ({"unconditional": X, "guidance_scale": doubles(1, 2)}, "guidance_scale: expected [1] or"),
        ({"step": ddim_step(doubles(0.5, 0.4), 0.6)}, "step.sample_scale: expected [1] or one"),
        (
            {"unconditional": X, "guidance_scale": doubles(2).requires_grad_()},
            "guidance_scale: expected a constant",
        ),
        (
            {"step": flow_step(0.6, 0.5)._replace(sample_scale=doubles(0.7).requires_grad_())},
            "step.sample_scale: expected a constant",
        ),
        ({"reduction": "none"}, "reduction: expected mean or sum, got 'none'. Pick one of them"),
    ],
)
def test_bad_log_probs(changes, match):
    arguments = {"step": ddim_step(0.5, 0.6), "prediction": X, "sample": X, "next_samples": X}
    with pytest.raises(ValueError, match=f"^fastpo.diffusion.step_log_probs: .*{re.escape(match)}"):
        step_log_probs(**arguments | changes)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"reference": X[:, :2]}, "reference: expected shape (1, 4)"),
        (
            {"unconditional": X},
            "reference_unconditional: expected one for each prediction",
        ),
        ({"reference_unconditional": X}, "Guide both predictions, or neither"),
        ({"guidance_scale": 2.0}, "unconditional: expected the prediction to guide away from"),
        ({"step": Step(*doubles([1, 1], [1, 1], [1, 1]))}, "step.sample_scale: expected [1]"),
        ({"reduction": "none"}, "reduction: expected mean or sum, got 'none'"),
    ],
)
def test_bad_kl(changes, match):
    arguments = {"step": ddim_step(0.5, 0.6), "prediction": X, "reference": X}
    with pytest.raises(ValueError, match=f"^fastpo.diffusion.step_kl: .*{re.escape(match)}"):
        step_kl(**arguments | changes)


@pytest.mark.parametrize("make", [ddim_step, renoise_step], ids=lambda f: f.__name__)
def test_bad_prediction_type(make):
    match = f"^fastpo.diffusion.{make.__name__}: prediction_type: expected epsilon, v_prediction"
    with pytest.raises(ValueError, match=match):
        make(0.5, 0.6, prediction_type="flow")
