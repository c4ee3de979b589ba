"""fastpo under TRL: the seam's contract, and its values and gradients against TRL's own."""

import subprocess
import sys

import pytest
import torch

import fastpo.integrations.trl as seam
from fastpo.integrations import IntegrationError

# Third parties warn while they are imported; nothing here is about them.
pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:::(torch|trl|transformers|peft|accelerate|datasets|triton).*"
    ),
    pytest.mark.filterwarnings("ignore:The installed version of:UserWarning"),
]
ALL = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@pytest.fixture(scope="module")
def utils():
    pytest.importorskip("trl", exc_type=ImportError)
    import trl.trainer.utils

    return trl.trainer.utils


@pytest.fixture
def own(utils):
    """TRL's own function; whatever a test does, it is back in place afterwards."""
    function = utils._ChunkedLogProbFunction
    yield function
    utils._ChunkedLogProbFunction = function
    seam._original = None


def test_importing_fastpo_imports_no_trl():
    code = "import sys, fastpo, fastpo.integrations.trl; sys.exit('trl' in sys.modules)"
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=False).returncode == 0


def test_enable_twice_and_disable_restore_exactly(utils, own):
    report = seam.enable()
    assert utils._ChunkedLogProbFunction is seam.ChunkedLogProb
    assert "_ChunkedLogProbFunction" in report
    assert seam.enable() == report
    seam.disable()
    assert utils._ChunkedLogProbFunction is own
    seam.disable()
    assert utils._ChunkedLogProbFunction is own


def test_block_leaves_the_switch_as_it_was(utils, own):
    with seam.enabled():
        assert utils._ChunkedLogProbFunction is seam.ChunkedLogProb
    assert utils._ChunkedLogProbFunction is own
    seam.enable()
    with seam.enabled():
        pass
    assert utils._ChunkedLogProbFunction is seam.ChunkedLogProb


@pytest.mark.parametrize("version", ["1.14.2", "1.17.0", "2.0.0", "unknown"])
def test_refuses_untested_versions(utils, own, monkeypatch, version):
    import trl

    monkeypatch.setattr(trl, "__version__", version)
    with pytest.raises(IntegrationError, match="Install a tested release"):
        seam.enable()
    assert utils._ChunkedLogProbFunction is own


def test_refuses_without_trl(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(IntegrationError, match="does not import"):
        seam.enable()


def test_refuses_a_missing_name(utils, own, monkeypatch):
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", None)
    with pytest.raises(IntegrationError, match="has no"):
        seam.enable()


def test_refuses_another_signature(utils, own, monkeypatch):
    class Changed:
        __module__ = "trl.kernels"

        @staticmethod
        def forward(ctx, hidden, weight, targets):
            """One argument fewer."""

    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Changed)
    with pytest.raises(IntegrationError, match="takes"):
        seam.enable()


def test_refuses_a_name_somebody_else_replaced(utils, own):
    class Other:
        __module__ = "unsloth_zoo.rl"

    utils._ChunkedLogProbFunction = Other
    with pytest.raises(IntegrationError, match=r"already replaced by unsloth_zoo\.rl"):
        seam.enable()
    utils._ChunkedLogProbFunction = own
    seam.enable()
    utils._ChunkedLogProbFunction = Other
    with pytest.raises(IntegrationError, match=r"replaced by unsloth_zoo\.rl after"):
        seam.disable()


def inputs(dtype, bias, N=37, H=24, V=131):
    generator = torch.Generator().manual_seed(1)
    hidden_NH = torch.randn(N, H, generator=generator).to(dtype)
    weight_VH = torch.randn(V, H, generator=generator).to(dtype)
    bias_V = torch.randn(V, generator=generator).to(dtype) if bias else None
    return hidden_NH, weight_VH, bias_V, torch.randint(V, (N,), generator=generator)


def run(apply, tensors, targets_N, options, outputs=ALL, entropy_gradient=True):
    """Outputs and the gradients of hidden, weight and bias under fixed upstream gradients."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    values = apply(*leaves, targets_N, *options, outputs)
    generator = torch.Generator().manual_seed(2)
    upstream = [torch.randn(len(targets_N), generator=generator) for _ in range(2)]
    loss = (values[0] * upstream[0]).sum()
    if entropy_gradient:
        loss = loss + (values[1] * upstream[1]).sum()
    loss.backward()
    return values, [None if t is None else t.grad for t in leaves]


def truth_apply(hidden, weight, bias, targets_N, temperature, chunk_size, softcap, scale, outputs):
    """The definition, on float64 tensors."""
    z_NV = torch.nn.functional.linear(hidden, weight, bias) * scale
    if softcap is not None:
        z_NV = softcap * torch.tanh(z_NV / softcap)
    z_NV = z_NV / temperature
    logp_NV = z_NV.log_softmax(-1)
    return (
        logp_NV.gather(1, targets_N[:, None])[:, 0],
        -(logp_NV.exp() * logp_NV).sum(-1),
        (2 * logp_NV).logsumexp(-1),
        z_NV.mean(-1),
        z_NV.argmax(-1) == targets_N,
    )


def assert_no_worse(got, theirs, truth, name):
    """At most twice TRL's error, plus a few float32 ulps; exact for booleans."""
    assert got.shape == truth.shape
    if got.dtype == torch.bool:
        assert torch.equal(got, truth), name
        return
    error = (got.double() - truth).abs().max().item()
    base = (theirs.double() - truth).abs().max().item()
    floor = 4 * torch.finfo(torch.float32).eps * max(1.0, truth.abs().max().item())
    assert error <= 2 * base + floor, f"{name}: error {error:.3g}, TRL's {base:.3g}"


OPTIONS = {  # temperature, chunk_size, softcap, logit_scale
    "plain": (1.0, 32768, None, 1.0),
    "temperature, tiles": (0.7, 50, None, 1.0),
    "softcap, scale": (1.3, 32768, 5.0, 0.25),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_values_and_gradients(own, options, bias, autocast):
    *tensors, targets_N = inputs(torch.float32, bias)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = run(seam.ChunkedLogProb.apply, tensors, targets_N, options)
        theirs = run(own.apply, tensors, targets_N, options)
    # Under autocast the inputs are those that autocast rounded.
    exact = [t if t is None or not autocast else t.bfloat16() for t in tensors]
    truth = run(truth_apply, [t if t is None else t.double() for t in exact], targets_N, options)
    for name, *values in zip(ALL, got[0], theirs[0], truth[0], strict=True):
        assert values[0].dtype == values[1].dtype
        assert_no_worse(*values, name)
    for name, *grads in zip(("hidden", "weight", "bias"), got[1], theirs[1], truth[1], strict=True):
        if grads[2] is not None:
            assert grads[0].dtype == grads[1].dtype
            assert_no_worse(*grads, f"gradient of {name}")


def test_head_of_another_dtype(own):
    """TRL's ``cast_lm_head_to_fp32``: float32 hidden states on a bfloat16 head."""
    hidden_NH, _, _, targets_N = inputs(torch.float32, False)
    _, weight_VH, bias_V, _ = inputs(torch.bfloat16, True)
    tensors = (hidden_NH, weight_VH, bias_V)
    got, theirs, truth = (
        run(apply, [convert(t) for t in tensors], targets_N, OPTIONS["plain"])
        for apply, convert in (
            (seam.ChunkedLogProb.apply, lambda t: t),
            (own.apply, lambda t: t),
            (truth_apply, torch.Tensor.double),
        )
    )
    for *values, name in zip(got[0], theirs[0], truth[0], ALL, strict=True):
        assert_no_worse(*values, name)
    for *grads, name in zip(got[1], theirs[1], truth[1], ("hidden", "weight", "bias"), strict=True):
        assert grads[0].dtype == grads[1].dtype
        assert_no_worse(*grads, f"gradient of {name}")


def test_frozen_head_and_outputs_not_asked_for(own):
    hidden_NH, weight_VH, _, targets_N = inputs(torch.float32, False)
    grads = []
    for apply in (seam.ChunkedLogProb.apply, own.apply):
        leaf = hidden_NH.clone().requires_grad_()
        values = apply(leaf, weight_VH, None, targets_N, *OPTIONS["plain"], ("log_probs",))
        assert [v is None for v in values] == [False, True, True, True, True]
        values[0].sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)
    assert weight_VH.grad is None


def test_only_the_differentiable_outputs_carry_a_gradient():
    hidden_NH, weight_VH, _, targets_N = inputs(torch.float32, False)
    args = (hidden_NH.requires_grad_(), weight_VH, None, targets_N, *OPTIONS["plain"], ALL)
    values = seam.ChunkedLogProb.apply(*args)
    assert [v.requires_grad for v in values] == [True, True, False, False, False]


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_no_tokens(frozen):
    hidden_NH, weight_VH, _, targets_N = inputs(torch.float32, False, N=0)
    hidden_NH.requires_grad_()
    weight_VH.requires_grad_(not frozen)
    values = seam.ChunkedLogProb.apply(
        hidden_NH, weight_VH, None, targets_N, *OPTIONS["plain"], ALL
    )
    assert [v.shape for v in values] == [(0,)] * 5
    (values[0].sum() + values[1].sum()).backward()
    assert hidden_NH.grad.shape == hidden_NH.shape
    if not frozen:
        assert not weight_VH.grad.any()


def test_parameter_emptied_between_forward_and_backward():
    """What DeepSpeed ZeRO-3 does to a head gathered for the forward alone."""
    hidden_NH, weight_VH, _, targets_N = inputs(torch.float32, False)
    want_VH = run(seam.ChunkedLogProb.apply, (hidden_NH, weight_VH, None), targets_N,
                  OPTIONS["plain"])[1][1]  # fmt: skip
    parameter = torch.nn.Parameter(weight_VH.clone())
    parameter.ds_id = 0
    emptied = []

    def gather_again(grad):
        """Runs between the op's backward and the accumulation, which needs the parameter whole."""
        emptied.append(parameter.numel() == 0)
        parameter.data = weight_VH.clone()

    parameter.register_hook(gather_again)

    def apply(hidden, weight, bias, *rest):
        values = seam.ChunkedLogProb.apply(hidden, parameter, bias, *rest)
        parameter.data = torch.empty(0)
        return values

    run(apply, (hidden_NH, weight_VH, None), targets_N, OPTIONS["plain"])
    assert emptied == [True]
    assert torch.equal(parameter.grad, want_VH)
