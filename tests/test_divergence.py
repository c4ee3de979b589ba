"""``linear_divergence`` and ``divergence``: values and gradients of every kind and plan."""

import pytest
import torch
import torch.nn.functional as F
from divergence_parts import (
    DTYPES,
    FROZEN_AND_TRAINED,
    KINDS,
    POLICY,
    REF,
    TRANSFORMS,
    WANTED,
    check,
    leaves,
    plain,
    problem,
    run,
)
from tolerance import assert_close_to_truth

import fastpo
from fastpo import divergence_plans, plans


@pytest.mark.parametrize(("kind", "alpha"), KINDS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kind(backend, dtype, kind, alpha):
    tensors, mask = problem(dtype, backend.device, (1, 6) if backend.is_sim else (3, 11))
    for wanted in (WANTED["frozen-both"], WANTED["both"]):
        check(tensors, dtype, wanted, mask, 40_000, kind=kind, alpha=alpha)


@pytest.mark.parametrize("options", TRANSFORMS, ids=["plain", "capped"])
@pytest.mark.parametrize("wanted", WANTED.values(), ids=WANTED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_plan(device, dtype, wanted, options):
    tensors, mask = problem(dtype, device)
    for workspace_bytes in (1, None):
        check(tensors, dtype, wanted, mask, workspace_bytes, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wanted", WANTED.values(), ids=WANTED)
def test_one_head_for_both(device, dtype, wanted):
    """Given by nothing, by an alias, and by the weight itself, whose gradients then add."""
    tensors, mask = problem(dtype, device, R=19)
    shared = {k: v for k, v in tensors.items() if k not in ("ref_weight", "ref_bias")}
    for workspace_bytes in (1, None):
        options = {"mask": mask, "workspace_bytes": workspace_bytes}
        if set(wanted) & set(shared):
            out, _ = check(shared, dtype, wanted, **options)
            alias, bias = tensors["weight"].detach(), tensors["bias"]
            other = fastpo.linear_divergence(**shared, ref_weight=alias, ref_bias=bias, **options)
            assert torch.equal(out, other)
        check(tensors, dtype, [k for k in wanted if k != "ref_weight"], tied=True, **options)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("wanted", [("a", "b"), ("hidden", "a", "b"), ("hidden",), (*POLICY, "a")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lora_on_the_head(device, dtype, wanted, shared):
    tensors, mask = problem(dtype, device, R=19)
    if shared:
        del tensors["ref_weight"], tensors["ref_bias"]
    a, b = torch.randn(4, 19) / 4, torch.randn(157, 4) / 4
    lora = fastpo.LoRA(*(t.to(dtype).to(device) for t in (a, b)), 2 / 8**0.5)
    for workspace_bytes in (1, None):
        check(tensors, dtype, wanted, mask, workspace_bytes, lora=lora)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_scale_of_a_lora_is_not_rounded_to_the_inputs(dtype):
    """A CPU multiplies in float32: as good as plain torch there, gradients rounded once."""
    tensors, mask = problem(dtype, torch.device("cpu"))
    lora = fastpo.LoRA(torch.randn(4, 19).to(dtype), torch.randn(157, 4).to(dtype), 0.5 / 8**0.5)
    upstream = torch.randn(mask.shape).double()
    arguments, options = (tensors, upstream), {"kind": "forward_kl", "mask": mask, "lora": lora}
    wanted = ("hidden", "a", "b")
    truth, truth_grads = run(plain, *arguments, torch.float64, wanted, **options)
    base, base_grads = run(plain, *arguments, torch.float32, wanted, **options)
    out, grads = run(fastpo.linear_divergence, *arguments, dtype, wanted, **options)
    assert_close_to_truth(out, truth, base)
    for name, grad in grads.items():
        base_grad = base_grads[name].to(dtype)
        assert_close_to_truth(grad, truth_grads[name], base_grad, what=f"d {name}")


@pytest.mark.parametrize("absent", ["bias", "ref_bias"])
def test_a_bias_on_one_side_only(device, absent):
    tensors, mask = problem(torch.float32, device)
    del tensors[absent]
    check(tensors, torch.float32, [k for k in POLICY + REF if k != absent], mask)


def test_without_a_gradient(device):
    tensors, mask = problem(torch.float32, device)
    with torch.no_grad():
        out = fastpo.linear_divergence(**leaves(tensors, torch.float32, POLICY), mask=mask)
    assert not out.requires_grad
    assert torch.equal(out, fastpo.linear_divergence(**tensors, mask=mask))


@pytest.mark.parametrize("wanted", WANTED.values(), ids=WANTED)
@pytest.mark.parametrize("workspace_bytes", [1, 50_000, 60_000, 150_000, 1 << 20])
def test_results_do_not_depend_on_the_workspace(device, monkeypatch, wanted, workspace_bytes):
    """In the middle the logits of 16 and of 48 tokens are kept."""
    monkeypatch.setattr(plans, "_COLUMNS", {device.type: 128})
    monkeypatch.setattr(plans, "_ROWS", {device.type: 16})
    monkeypatch.setattr(divergence_plans, "_ROWS", {device.type: 16})
    tensors, mask = problem(torch.float32, device, (3, 25), V=300)
    check(tensors, torch.float32, wanted, mask, workspace_bytes)
    check(tensors, torch.float32, wanted, None, workspace_bytes)


@FROZEN_AND_TRAINED
def test_results_do_not_depend_on_packing(device, wanted):
    """The tokens that count, alone or among masked ones: the same bits."""
    tensors, mask = problem(torch.float32, device, (3, 25))
    packed = {k: v[mask] if "hidden" in k else v for k, v in tensors.items()}
    upstream = torch.randn(mask.shape, device=device)
    options = {"dtype": torch.float32, "wanted": wanted, "kind": "js", "workspace_bytes": 1}
    out, grads = run(fastpo.linear_divergence, tensors, upstream, mask=mask, **options)
    other, others = run(fastpo.linear_divergence, packed, upstream[mask], **options)
    assert torch.equal(out[mask], other)
    for name, grad in grads.items():
        assert torch.equal(grad[mask] if "hidden" in name else grad, others[name])


@pytest.mark.parametrize("masked", [False, True])
@FROZEN_AND_TRAINED
def test_rows_that_get_no_gradient(device, monkeypatch, wanted, masked):
    """Zeros upstream, where the logits of no row, of some and of all were kept."""
    tensors, mask = problem(torch.float32, device)
    upstream = torch.zeros(mask.shape, device=device)
    upstream[1, ::2] = torch.arange(6.0, device=device)
    options = {"kind": "reverse_kl", "mask": mask if masked else None}
    _, truth = run(plain, tensors, upstream, torch.float64, wanted, **options)
    _, base = run(plain, tensors, upstream, torch.float32, wanted, **options)
    monkeypatch.setattr(divergence_plans, "_ROWS", {device.type: 4})
    for workspace_bytes in (1, 60_000, None):  # of 33 rows 0, 20 and all
        _, grads = run(
            fastpo.linear_divergence, tensors, upstream, torch.float32, wanted,
            workspace_bytes=workspace_bytes, **options,
        )  # fmt: skip
        for name, grad in grads.items():
            assert_close_to_truth(grad, truth[name], base[name], what=name)


@FROZEN_AND_TRAINED
@pytest.mark.parametrize("kept", [0, 1])
def test_none_or_one_token_that_counts(backend, wanted, kept):
    tensors, mask = problem(torch.float32, backend.device, (1, 6))
    mask[:] = False
    mask[0, :kept] = True
    for workspace_bytes in (1, None):
        _, grads = check(tensors, torch.float32, wanted, mask, workspace_bytes)
        assert kept or all((g == 0).all() for g in grads.values())


@FROZEN_AND_TRAINED
def test_no_tokens(backend, wanted):
    tensors, mask = problem(torch.float32, backend.device, (0, 3))
    inputs = leaves(tensors, torch.float32, wanted)
    out = fastpo.linear_divergence(**inputs, mask=mask)
    out.sum().backward()
    assert out.shape == (0, 3)
    assert all((inputs[k].grad == 0).all() for k in wanted)


@FROZEN_AND_TRAINED
def test_masked_tokens_are_never_read(device, wanted):
    tensors, mask = problem(torch.float32, device)
    upstream = torch.randn(mask.shape, device=device)
    results = []
    for value in (0.0, torch.nan):
        for name in ("hidden", "ref_hidden"):
            tensors[name][~mask] = value
        options = {"kind": "chi2", "mask": mask}
        results.append(
            run(fastpo.linear_divergence, tensors, upstream, torch.float32, wanted, **options)
        )
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(g, results[1][1][name]) for name, g in results[0][1].items())


@FROZEN_AND_TRAINED
def test_all_rows_enter_when_none_can_be_dropped(backend, monkeypatch, wanted):
    """As while a CUDA graph is captured, when the host may not wait for a count."""
    monkeypatch.setattr(plans, "kept", lambda keep: None)
    tensors, mask = problem(torch.float32, backend.device, (1, 6))
    for workspace_bytes in (1, None):
        check(tensors, torch.float32, wanted, mask, workspace_bytes)


@FROZEN_AND_TRAINED
def test_dropped_tokens_do_no_harm_while_a_graph_is_captured(device, monkeypatch, wanted):
    """NaN in hidden states that are masked, or whose row gets no gradient."""
    monkeypatch.setattr(plans, "capturing", lambda tensor: True)
    tensors, mask = problem(torch.float32, device)
    upstream = torch.randn(mask.shape, device=device)
    upstream[:, 1] = 0
    for name in ("hidden", "ref_hidden"):
        tensors[name][~mask] = torch.nan
        tensors[name][:, 1] = torch.nan
    for workspace_bytes in (1, None):
        _, grads = run(
            fastpo.linear_divergence, tensors, upstream, torch.float32, wanted, kind="js",
            mask=mask, workspace_bytes=workspace_bytes,
        )  # fmt: skip
        assert not any(grad.isnan().any() for grad in grads.values())


@pytest.mark.parametrize("V", [1, 7, 50257])
@FROZEN_AND_TRAINED
def test_vocabularies(device, V, wanted):
    tensors, _ = problem(torch.float32, device, (1, 6), V=V)
    check(tensors, torch.float32, wanted)


@FROZEN_AND_TRAINED
def test_two_runs_are_bitwise_equal(device, wanted):
    tensors, mask = problem(torch.float32, device, (4, 100), V=1000)
    upstream = torch.randn(mask.shape, device=device)
    arguments = (fastpo.linear_divergence, tensors, upstream, torch.float32, wanted)
    (one, grads), (two, others) = (run(*arguments, mask=mask) for _ in range(2))
    assert torch.equal(one, two)
    assert all(torch.equal(grad, others[name]) for name, grad in grads.items())


def test_non_contiguous_inputs(device):
    tensors, mask = problem(torch.float32, device)
    plainly = fastpo.linear_divergence(**tensors, mask=mask)
    for name in ("hidden", "ref_hidden", "weight", "ref_weight"):
        tensors[name] = tensors[name].transpose(0, -1).contiguous().transpose(0, -1)
    mask = mask.t().contiguous().t()
    assert torch.allclose(fastpo.linear_divergence(**tensors, mask=mask), plainly, atol=1e-6)
    wide = torch.zeros(*mask.shape, 38, device=device)
    wide[..., ::2] = tensors["hidden"]
    tensors["hidden"] = wide[..., ::2].requires_grad_()
    out = fastpo.linear_divergence(**tensors, mask=mask)
    out.sum().backward()
    assert torch.allclose(out, plainly, atol=1e-6)


@pytest.mark.parametrize(("kind", "alpha"), [k for k in KINDS if k[0] != "chi2"], ids=str)
def test_models_that_nearly_agree_keep_their_digits(device, kind, alpha):
    """The plain formulas, chi-squared's apart, lose them to terms that cancel."""
    tensors, _ = problem(torch.float32, device, (200,), R=19, V=1000)
    noise = 1e-3 * torch.randn(tensors["hidden"].shape, device=device)
    tensors = {"hidden": tensors["hidden"], "weight": tensors["weight"]}
    tensors["ref_hidden"] = tensors["hidden"] + noise
    truth = plain(**leaves(tensors, torch.float64, ()), kind=kind, alpha=alpha)
    base = plain(**tensors, kind=kind, alpha=alpha)
    out = fastpo.linear_divergence(**tensors, kind=kind, alpha=alpha)
    error, base_error = ((x.double() - truth).square().mean().sqrt() for x in (out, base))
    assert error < base_error / 10
    tensors["ref_hidden"] = tensors["hidden"]
    assert (fastpo.linear_divergence(**tensors, kind=kind, alpha=alpha) == 0).all()


def test_what_the_kinds_are(device):
    """The identities that the docstring names."""
    tensors, _ = problem(torch.float64, device)

    def value(kind, alpha=None):
        return fastpo.linear_divergence(**tensors, kind=kind, alpha=alpha)

    logits = (F.linear(*(tensors[n] for n in names)) for names in (POLICY, REF))
    p, q = (z.softmax(-1) for z in logits)
    assert torch.allclose(value("forward_kl"), F.kl_div(p.log(), q, reduction="none").sum(-1))
    assert torch.allclose(value("reverse_kl"), F.kl_div(q.log(), p, reduction="none").sum(-1))
    assert torch.allclose(value("alpha", 0.5), 4 * (1 - (p * q).sqrt().sum(-1)))
    assert torch.allclose(value("alpha", 2.0), value("chi2") / 2)
    assert torch.allclose(value("alpha", 1e-6), value("forward_kl"), rtol=1e-4)
    assert torch.allclose(value("alpha", 1 + 1e-6), value("reverse_kl"), rtol=1e-4)
    assert torch.equal(value("js"), value("js", 0.5))
    beta = 0.3  # the generalised JSD of GKD: beta is the reference's weight
    m = beta * q + (1 - beta) * p
    gkd = beta * (q * (q / m).log()).sum(-1) + (1 - beta) * (p * (p / m).log()).sum(-1)
    assert torch.allclose(value("js", 1 - beta), gkd)


def test_two_types_of_numbers(device):
    """A bfloat16 policy against a float32 reference: each is multiplied as it is."""
    tensors, mask = problem(torch.bfloat16, device)
    mixed = {k: v.float() if k in REF else v for k, v in tensors.items()}
    inputs = {k: v.detach().requires_grad_(k in POLICY) for k, v in mixed.items()}
    out = fastpo.linear_divergence(**inputs, mask=mask)
    out.sum().backward()
    truth = plain(**{k: v.double() for k, v in tensors.items()}, kind="forward_kl", mask=mask)
    assert_close_to_truth(out, truth, plain(**tensors, kind="forward_kl", mask=mask))
    assert all(inputs[k].grad.dtype == torch.bfloat16 for k in POLICY)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shared", [False, True])
def test_autocast_casts_as_linear_does(device, dtype, shared):
    tensors, mask = problem(torch.float32, device, R=19)
    if shared:
        del tensors["ref_weight"], tensors["ref_bias"]
    inputs = leaves(tensors, torch.float32, POLICY)
    with torch.autocast(device.type, dtype):
        out = fastpo.linear_divergence(**inputs, mask=mask)
    cast = {k: v.to(dtype) for k, v in tensors.items()}
    assert torch.equal(out, fastpo.linear_divergence(**cast, mask=mask))
    out.sum().backward()
    assert all(inputs[k].grad.dtype == torch.float32 for k in POLICY)


@pytest.mark.parametrize(("kind", "alpha"), KINDS, ids=str)
@pytest.mark.parametrize("wanted", WANTED.values(), ids=WANTED)
def test_gradcheck(kind, alpha, wanted):
    """In float64 on the CPU kernels."""
    tensors, _ = problem(torch.float64, torch.device("cpu"), (4,), H=3, R=2, V=9)
    inputs = leaves(tensors, torch.float64, wanted)
    mask = torch.tensor([True, False, True, True])

    def function(*given):
        return fastpo.linear_divergence(
            **dict(zip(inputs, given, strict=True)), kind=kind, alpha=alpha, mask=mask,
            softcap=3.0, temperature=0.8,
        )  # fmt: skip

    assert torch.autograd.gradcheck(function, tuple(inputs.values()))


@FROZEN_AND_TRAINED
def test_a_second_backward_gives_the_same_gradient(device, wanted):
    tensors, mask = problem(torch.float32, device)
    for workspace_bytes in (1, None):
        inputs = leaves(tensors, torch.float32, wanted)
        options = {"mask": mask, "workspace_bytes": workspace_bytes}
        loss = fastpo.linear_divergence(**inputs, **options).sum()
        leaf = [inputs[k] for k in wanted]
        first = torch.autograd.grad(loss, leaf, retain_graph=True)
        second = torch.autograd.grad(loss, leaf)
        assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@FROZEN_AND_TRAINED
def test_a_second_derivative_is_an_error(device, wanted):
    tensors, _ = problem(torch.float32, device)
    inputs = leaves(tensors, torch.float32, wanted)
    loss = fastpo.linear_divergence(**inputs).square().sum()
    with pytest.raises(RuntimeError, match=r"create_graph=False.*not implemented"):
        torch.autograd.grad(loss, inputs["hidden"], create_graph=True)


def test_nan_in_hidden_reaches_its_own_tokens_only(device):
    tensors, _ = problem(torch.float32, device)
    tensors["hidden"][1, 4, 3] = torch.nan
    inputs = leaves(tensors, torch.float32, ("hidden",))
    out = fastpo.linear_divergence(**inputs)
    assert out.isnan().nonzero().tolist() == [[1, 4]]
    out.sum().backward()
    assert inputs["hidden"].grad.isnan().any(-1).nonzero().tolist() == [[1, 4]]
