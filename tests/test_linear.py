"""``linear_logprobs`` and ``linear_token_stats``: values and gradients of every plan."""

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_close_to_truth

import fastpo
from fastpo import plans
from fastpo.tiles import MOMENTS

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
OUTPUTS = ("logprobs", "lse", *MOMENTS)
DIFFERENTIABLE = ("logprobs", "lse", "entropy")


def problem(dtype, device, shape=(3, 11), H=19, V=157, bias=True):
    """Inputs in ``dtype``, with ignored tokens, a first and a last word, and confident tokens."""
    hidden = torch.randn(*shape, H, dtype=torch.float64)
    weight = torch.randn(V, H, dtype=torch.float64)
    targets = torch.randint(V, shape)
    flat = targets.view(-1)
    flat[: flat.shape[0] : 5] = -100
    if flat.shape[0] > 4:
        flat[1], flat[2] = 0, V - 1
        hidden.view(-1, H)[3] = weight[flat[3]]  # confident
    made = {"hidden": hidden, "weight": weight}
    if bias:
        made["bias"] = torch.randn(V, dtype=torch.float64)
    return {k: v.to(dtype).to(device) for k, v in made.items()}, targets.to(device)


def plain_stats(hidden, weight, targets, bias=None, *, temperature=1.0, logit_scale=1.0,
                softcap=None, lora=None, ignore_index=-100):  # fmt: skip
    """The same statistics by plain torch, in the inputs' own type."""
    z = F.linear(hidden, weight, bias)
    if lora is not None:
        z = z + F.linear(F.linear(hidden, lora.a), lora.b) * lora.scaling
    z = z * logit_scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    z = z / temperature
    keep = targets != ignore_index
    log_p = z.log_softmax(-1)
    found = {
        "logprobs": log_p.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1),
        "lse": z.logsumexp(-1),
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "log_sum_sq_probs": (2 * log_p).logsumexp(-1),
        "mean_logits": z.mean(-1),
    }
    found = {k: torch.where(keep, v, 0.0) for k, v in found.items()}
    return {**found, "is_top1": (z.argmax(-1) == targets) & keep}


def leaves(tensors, dtype, frozen=()):
    return {k: v.detach().to(dtype).requires_grad_(k not in frozen) for k, v in tensors.items()}


def run(function, tensors, targets, upstream, dtype, frozen, names, **options):
    """Outputs and gradients of ``function`` on copies of ``tensors`` in ``dtype``."""
    inputs = leaves(tensors, dtype, frozen)
    lora = options.pop("lora", None)
    if lora is not None:
        inputs |= leaves({"a": lora.a, "b": lora.b}, dtype)
        options["lora"] = fastpo.LoRA(inputs["a"], inputs["b"], lora.scaling)
    call = {k: v for k, v in inputs.items() if k not in ("a", "b")}
    stats = function(targets=targets, **call, **options)
    stats = stats if isinstance(stats, dict) else stats._asdict()
    loss = sum((stats[n].double() * upstream[n]).sum() for n in names)
    loss.backward()
    grads = {k: v.grad for k, v in inputs.items() if v.requires_grad}
    return stats, grads


def check(tensors, targets, dtype, frozen=(), names=("logprobs",), options=None, **fused):
    """fastpo against float64, with plain torch in ``dtype`` as the yardstick."""
    options = options or {}
    upstream = {n: torch.randn(targets.shape, device=targets.device).double() for n in names}
    arguments = (tensors, targets, upstream)
    truth, truth_grads = run(plain_stats, *arguments, torch.float64, frozen, names, **options)
    base, base_grads = run(plain_stats, *arguments, dtype, frozen, names, **options)
    out, grads = run(
        fastpo.linear_token_stats, *arguments, dtype, frozen, names, outputs=OUTPUTS,
        **options, **fused,
    )  # fmt: skip
    for name in OUTPUTS[:-1]:
        assert_close_to_truth(out[name], truth[name], base[name], what=name)
    for name, grad in grads.items():
        assert grad.dtype == dtype
        assert_close_to_truth(grad, truth_grads[name], base_grads[name], what=f"d {name}")
    ignored = targets == -100
    assert all((out[name][ignored] == 0).all() for name in OUTPUTS)
    assert (grads["hidden"][ignored] == 0).all()
    assert (out["logprobs"] <= 0).all()
    return out, grads


TRANSFORMS = [{}, {"temperature": 0.7, "logit_scale": 1.3, "softcap": 5.0}]


@pytest.mark.parametrize("options", TRANSFORMS, ids=["plain", "capped"])
@pytest.mark.parametrize("frozen", [("weight", "bias"), ("weight",), ()], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logprob_gradients(backend, dtype, frozen, options):
    shape = (1, 6) if backend.is_sim else (3, 11)
    tensors, targets = problem(dtype, backend.device, shape)
    check(tensors, targets, dtype, frozen, options=options, workspace_bytes=40_000)


@pytest.mark.parametrize("names", [("entropy",), ("lse",), DIFFERENTIABLE], ids=str)
@pytest.mark.parametrize("frozen", [("weight", "bias"), ()], ids=["frozen", "trained"])
def test_entropy_and_lse_gradients(backend, names, frozen):
    shape = (1, 6) if backend.is_sim else (3, 11)
    tensors, targets = problem(torch.float32, backend.device, shape)
    for hint in ({}, {"differentiable": names}):
        check(tensors, targets, torch.float32, frozen, names, workspace_bytes=40_000, **hint)


@pytest.mark.parametrize("frozen", [("weight",), ()], ids=["frozen", "trained"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lora_on_the_head(backend, dtype, frozen):
    shape = (1, 6) if backend.is_sim else (3, 11)
    tensors, targets = problem(dtype, backend.device, shape, bias=False)
    a, b = torch.randn(4, 19), torch.randn(157, 4)
    a, b = (t.to(dtype).to(backend.device) for t in (a, b))
    lora = fastpo.LoRA(a, b, 0.5)
    _, grads = check(
        tensors, targets, dtype, frozen, options={"lora": lora}, workspace_bytes=40_000
    )
    assert {"a", "b"} <= grads.keys()


@pytest.mark.parametrize("frozen", [("weight",), ()], ids=["frozen", "trained"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_scale_of_a_lora_is_not_rounded_to_the_inputs(dtype, frozen):
    """A CPU multiplies in float32: as good as plain torch there, gradients rounded once."""
    tensors, targets = problem(dtype, torch.device("cpu"), bias=False)
    a, b = torch.randn(4, 19).to(dtype), torch.randn(157, 4).to(dtype)
    lora = fastpo.LoRA(a, b, 16 / 8**0.5)
    upstream = {n: torch.randn(targets.shape).double() for n in DIFFERENTIABLE}
    truth, truth_grads, base, base_grads, out, grads = (
        x
        for function, wide, options in (
            (plain_stats, torch.float64, {}),
            (plain_stats, torch.float32, {}),
            (fastpo.linear_token_stats, dtype, {"outputs": OUTPUTS, "workspace_bytes": 40_000}),
        )
        for x in run(
            function, tensors, targets, upstream, wide, frozen, DIFFERENTIABLE, lora=lora, **options
        )
    )
    for name in DIFFERENTIABLE:
        assert_close_to_truth(out[name], truth[name], base[name], what=name)
    for name, grad in grads.items():
        base_grad = base_grads[name].to(dtype)
        assert_close_to_truth(grad, truth_grads[name], base_grad, what=f"d {name}")


@pytest.mark.parametrize("workspace_bytes", [1, 35_000, 50_000, 1 << 20])
def test_saved_logits_change_nothing_but_the_work(device, monkeypatch, workspace_bytes):
    monkeypatch.setattr(plans, "_COLUMNS", {device.type: 128})
    tensors, targets = problem(torch.float32, device)
    check(tensors, targets, torch.float32, workspace_bytes=workspace_bytes)


def test_saved_logits_with_rows_that_get_no_gradient(device):
    tensors, targets = problem(torch.float32, device)
    results = []
    for workspace_bytes in (1, 1 << 20):
        inputs = leaves(tensors, torch.float32)
        out = fastpo.linear_logprobs(**inputs, targets=targets, workspace_bytes=workspace_bytes)
        weights = torch.zeros(targets.shape, device=device)
        weights[1, ::2] = torch.arange(6.0, device=device)
        (out * weights).sum().backward()
        results.append([t.grad for t in inputs.values()])
    for saved, recomputed in zip(*results, strict=True):
        assert torch.allclose(saved, recomputed, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("frozen", [("weight", "bias"), ()], ids=["frozen", "trained"])
def test_results_do_not_depend_on_the_workspace(device, frozen):
    tensors, targets = problem(torch.float32, device, V=1000)
    for workspace_bytes in (1, 1 << 12, 1 << 16, 1 << 26):
        check(tensors, targets, torch.float32, frozen, workspace_bytes=workspace_bytes)


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("frozen", [("weight", "bias"), ()], ids=["frozen", "trained"])
def test_more_rows_than_a_tile_has(device, frozen, ignored):
    """Two whole blocks of rows and one row: every block's results must land in its own rows."""
    N = 2 * plans._ROWS[device.type] + 1
    tensors, targets = problem(torch.float32, device, (N,), H=8, V=150)
    if not ignored:
        targets = targets.clamp(min=0)
    for workspace_bytes in (1, 1 << 30):
        check(tensors, targets, torch.float32, frozen, workspace_bytes=workspace_bytes)


def test_gradients_are_rounded_once_however_many_blocks(device, monkeypatch):
    """A sum kept in bf16 between blocks of rows would be off by one rounding for each."""
    tensors, targets = problem(torch.bfloat16, device, (3, 40))
    grads = []
    for rows in (120, 2):
        monkeypatch.setattr(plans, "_ROWS", {device.type: rows})
        inputs = leaves(tensors, torch.bfloat16)
        fastpo.linear_logprobs(**inputs, targets=targets).sum().backward()
        grads.append({k: v.grad.double() for k, v in inputs.items()})
    for name, one_block in grads[0].items():
        difference = (grads[1][name] - one_block).abs()
        # Sums in fp32 that differ in their last bits may round to neighbours, no further.
        assert (difference <= torch.finfo(torch.bfloat16).eps * one_block.abs() + 1e-5).all(), name


@pytest.mark.parametrize("frozen", [("weight", "bias"), ()], ids=["frozen", "trained"])
def test_two_runs_are_bitwise_equal(device, frozen):
    tensors, targets = problem(torch.float32, device, (4, 300), V=1000)
    results = []
    for _ in range(2):
        inputs = leaves(tensors, torch.float32, frozen)
        out = fastpo.linear_logprobs(**inputs, targets=targets)
        out.sum().backward()
        results.append([out, *(t.grad for t in inputs.values() if t.requires_grad)])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.parametrize("frozen", [("weight", "bias"), ()], ids=["frozen", "trained"])
@pytest.mark.parametrize("kept", [0, 1])
def test_none_or_one_active_token(backend, frozen, kept):
    tensors, targets = problem(torch.float32, backend.device, (1, 6))
    targets[:] = -100
    targets[0, :kept] = 3
    _, grads = check(tensors, targets, torch.float32, frozen)
    if kept == 0:
        assert all((g == 0).all() for g in grads.values())


@pytest.mark.parametrize("trained", [False, True])
def test_no_tokens(backend, trained):
    hidden = torch.empty(0, 8, device=backend.device, requires_grad=True)
    weight = torch.randn(30, 8, device=backend.device, requires_grad=trained)
    targets = torch.empty(0, dtype=torch.int64, device=backend.device)
    out = fastpo.linear_logprobs(hidden, weight, targets)
    out.sum().backward()
    assert hidden.grad.shape == (0, 8)
    assert not trained or (weight.grad == 0).all()


@pytest.mark.parametrize("V", [1, 7])
@pytest.mark.parametrize("frozen", [("weight", "bias"), ()], ids=["frozen", "trained"])
def test_tiny_vocabularies(backend, V, frozen):
    tensors, targets = problem(torch.float32, backend.device, (1, 6), V=V)
    check(tensors, targets.clamp(max=V - 1), torch.float32, frozen)


@pytest.mark.parametrize("frozen", [("weight", "bias"), ()], ids=["frozen", "trained"])
def test_all_rows_enter_when_none_can_be_dropped(backend, monkeypatch, frozen):
    """As while a CUDA graph is captured, when the host may not wait for a count."""
    monkeypatch.setattr(plans, "kept", lambda keep: None)
    tensors, targets = problem(torch.float32, backend.device, (1, 6))
    check(tensors, targets, torch.float32, frozen)


@pytest.mark.parametrize("V", [32000, 99991, 128256, 151936, 152064, 256000])
@pytest.mark.parametrize("frozen", [("weight", "bias"), ()], ids=["frozen", "trained"])
def test_vocabularies_of_published_models(device, V, frozen):
    """And a prime; the hidden size is no multiple of 8."""
    tensors, targets = problem(torch.float32, device, (1, 6), H=19, V=V)
    check(tensors, targets, torch.float32, frozen)


def test_non_contiguous_inputs(device):
    H, V = 19, 157
    tensors, targets = problem(torch.float32, device, bias=False)
    for frozen in (("weight",), ()):
        _, expected = check(tensors, targets, torch.float32, frozen)
        hidden = tensors["hidden"].transpose(0, 1).contiguous().transpose(0, 1)
        weight = tensors["weight"].t().contiguous().t()
        assert not hidden.is_contiguous()
        assert weight.stride() == (1, V)
        strided = torch.zeros(*hidden.shape[:2], 2 * H, device=device)[..., ::2]
        strided.copy_(hidden)
        for h in (hidden, strided):
            h = h.detach().requires_grad_()
            w = weight.detach().requires_grad_("weight" not in frozen)
            out = fastpo.linear_logprobs(h, w, targets)
            plain = fastpo.linear_logprobs(*tensors.values(), targets)
            assert torch.allclose(out, plain, rtol=1e-5, atol=1e-6)
            out.sum().backward()
            assert h.grad.shape == expected["hidden"].shape
            assert not w.requires_grad or w.grad.shape == (V, H)


def test_tied_weight_gets_both_gradients(device):
    ids = torch.randint(50, (2, 6), device=device)
    grads = []
    for fused in (True, False):
        torch.manual_seed(1)
        table = torch.randn(50, 8, device=device, requires_grad=True)
        hidden = torch.tanh(table[ids])
        if fused:
            out = fastpo.linear_logprobs(hidden, table, ids)
        else:
            out = plain_stats(hidden, table, ids)["logprobs"]
        out.sum().backward()
        grads.append(table.grad)
    assert torch.allclose(*grads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_as_linear_does(device, dtype):
    tensors, targets = problem(torch.float32, device)
    inputs = leaves(tensors, torch.float32)
    with torch.autocast(device.type, dtype):
        out = fastpo.linear_logprobs(**inputs, targets=targets)
    cast = {k: v.to(dtype) for k, v in tensors.items()}
    assert torch.equal(out, fastpo.linear_logprobs(**cast, targets=targets))
    out.sum().backward()
    assert all(v.grad.dtype == torch.float32 for v in inputs.values())


def test_gradient_checkpointing_and_accumulation(device):
    tensors, targets = problem(torch.float32, device)
    grads = []
    for checkpointed in (False, True):
        inputs = leaves(tensors, torch.float32)
        for part in (slice(0, 1), slice(1, 3)):

            def loss(hidden, inputs=inputs, part=part):
                rest = {k: v for k, v in inputs.items() if k != "hidden"}
                return fastpo.linear_logprobs(hidden, **rest, targets=targets[part]).sum()

            hidden = inputs["hidden"][part]
            if checkpointed:
                value = torch.utils.checkpoint.checkpoint(loss, hidden, use_reentrant=False)
            else:
                value = loss(hidden)
            value.backward()
        grads.append([v.grad for v in inputs.values()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("frozen", [("weight", "bias"), ()], ids=["frozen", "trained"])
def test_gradcheck(frozen):
    """In float64 on the CPU kernels, through every differentiable output."""
    tensors, targets = problem(torch.float64, torch.device("cpu"), (1, 4), H=3, V=9)
    inputs = leaves(tensors, torch.float64, frozen)

    def function(hidden, weight, bias):
        return fastpo.linear_token_stats(
            hidden, weight, targets, bias, outputs=DIFFERENTIABLE, softcap=3.0, temperature=0.8
        )[:3]

    assert torch.autograd.gradcheck(function, tuple(inputs.values()))


def test_a_second_backward_gives_the_same_gradient(device):
    tensors, targets = problem(torch.float32, device)
    for frozen in (("weight", "bias"), ()):
        for workspace_bytes in (1, 1 << 20):
            inputs = leaves(tensors, torch.float32, frozen)
            options = {"targets": targets, "workspace_bytes": workspace_bytes}
            loss = fastpo.linear_logprobs(**inputs, **options).sum()
            wanted = [v for v in inputs.values() if v.requires_grad]
            first = torch.autograd.grad(loss, wanted, retain_graph=True)
            second = torch.autograd.grad(loss, wanted)
            assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_nan_in_hidden_reaches_its_own_tokens_only(device):
    tensors, targets = problem(torch.float32, device)
    targets[targets == -100] = 1
    tensors["hidden"][1, 4, 3] = torch.nan
    inputs = leaves(tensors, torch.float32, ("weight", "bias"))
    out = fastpo.linear_logprobs(**inputs, targets=targets)
    assert out.isnan().nonzero().tolist() == [[1, 4]]
    out.sum().backward()
    assert inputs["hidden"].grad.isnan().any(-1).nonzero().tolist() == [[1, 4]]
