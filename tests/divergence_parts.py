"""Problems, plain torch and checks of the divergences' tests."""

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_close_to_truth

import fastpo
from fastpo import plans

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
KINDS = [
    ("forward_kl", None), ("reverse_kl", None), ("js", None), ("js", 0.2), ("chi2", None),
    ("alpha", 0.5), ("alpha", -0.7),
]  # fmt: skip
TRANSFORMS = [{}, {"temperature": 0.7, "logit_scale": 1.3, "softcap": 5.0}]
POLICY = ("hidden", "weight", "bias")
REF = ("ref_hidden", "ref_weight", "ref_bias")
# What gets a gradient; a plan each, for the policy alone and for both.
WANTED = {
    "frozen": ("hidden",),
    "frozen-both": ("hidden", "ref_hidden"),
    "trained": POLICY,
    "both": POLICY + REF,
    "ref-bias": ("ref_bias",),
}
FROZEN_AND_TRAINED = pytest.mark.parametrize("wanted", [WANTED["frozen"], WANTED["both"]], ids=len)


def problem(dtype, device, shape=(3, 11), H=19, R=13, V=157):
    """Inputs in ``dtype`` and a mask of four fifths.

    Logits of standard deviation 0.8: of larger ones a single term would be all of chi-squared, and
    its rounding, in fastpo or in plain torch, a matter of luck.
    """
    made = {
        "hidden": torch.randn(*shape, H),
        "weight": torch.randn(V, H) * 0.7 * H**-0.5,
        "bias": torch.randn(V) / 3,
        "ref_hidden": torch.randn(*shape, R),
        "ref_weight": torch.randn(V, R) * 0.7 * R**-0.5,
        "ref_bias": torch.randn(V) / 3,
    }
    mask = torch.ones(shape, dtype=torch.bool)
    mask.view(-1)[::5] = False
    return {k: v.to(dtype).to(device) for k, v in made.items()}, mask.to(device)


def of_logits(z, ref_z, kind, alpha, mask=None):
    """The divergence by plain torch, as its formula stands, in the logits' own type."""
    log_p, log_q = z.log_softmax(-1), ref_z.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    if kind == "forward_kl":
        terms = q * (log_q - log_p)
    elif kind == "reverse_kl":
        terms = p * (log_p - log_q)
    elif kind == "js":
        w = 0.5 if alpha is None else alpha
        log_m = (w * p + (1 - w) * q).log()
        terms = w * p * (log_p - log_m) + (1 - w) * q * (log_q - log_m)
    elif kind == "chi2":
        terms = (p - q) ** 2 / q
    else:
        power = (alpha * log_p + (1 - alpha) * log_q).exp()
        terms = (power - alpha * p - (1 - alpha) * q) / (alpha * (alpha - 1))
    values = terms.sum(-1)
    return values if mask is None else torch.where(mask, values, 0.0)


def transformed(z, temperature=1.0, logit_scale=1.0, softcap=None):
    z = z * logit_scale
    return (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature


def plain(hidden, weight, ref_hidden, ref_weight=None, bias=None, ref_bias=None, *, kind,
          alpha=None, mask=None, lora=None, **transform):  # fmt: skip
    if ref_weight is None:
        ref_weight, ref_bias = weight.detach(), None if bias is None else bias.detach()
    z = F.linear(hidden, weight, bias)
    if lora is not None:
        z = z + F.linear(F.linear(hidden, lora.a), lora.b) * lora.scaling
    logits = (z, F.linear(ref_hidden, ref_weight, ref_bias))
    return of_logits(*(transformed(x, **transform) for x in logits), kind, alpha, mask)


def leaves(tensors, dtype, wanted):
    return {k: v.detach().to(dtype).requires_grad_(k in wanted) for k, v in tensors.items()}


def run(function, tensors, upstream, dtype, wanted, lora=None, tied=False, **options):
    """Values and gradients of ``function`` on copies of ``tensors`` in ``dtype``."""
    inputs = leaves(tensors, dtype, wanted)
    call = dict(inputs)
    if lora is not None:
        inputs |= leaves({"a": lora.a, "b": lora.b}, dtype, wanted)
        options["lora"] = fastpo.LoRA(inputs["a"], inputs["b"], lora.scaling)
    if tied:
        call["ref_weight"] = call["weight"]
    values = function(**call, **options)
    (values.double() * upstream).sum().backward()
    return values, {k: inputs[k].grad for k in wanted if k in inputs}


def check(tensors, dtype, wanted, mask=None, workspace_bytes=None, **options):
    """fastpo against float64, with plain torch in ``dtype`` as the yardstick."""
    options = {"kind": "forward_kl", "mask": mask} | options
    shape = tensors["hidden"].shape[:-1]
    upstream = torch.randn(shape, device=tensors["hidden"].device).double()
    truth, truth_grads = run(plain, tensors, upstream, torch.float64, wanted, **options)
    base, base_grads = run(plain, tensors, upstream, dtype, wanted, **options)
    out, grads = run(
        fastpo.linear_divergence, tensors, upstream, dtype, wanted,
        workspace_bytes=workspace_bytes, **options,
    )  # fmt: skip
    assert out.dtype == plans.accumulation_dtype(dtype)
    assert_close_to_truth(out, truth, base, what="divergence")
    assert not (out < 0).any()
    for name, grad in grads.items():
        assert grad.dtype == dtype
        assert_close_to_truth(grad, truth_grads[name], base_grads[name], what=f"d {name}")
    if mask is not None:
        assert (out[~mask] == 0).all()
        for name in ("hidden", "ref_hidden"):
            assert name not in grads or (grads[name][~mask] == 0).all()
    return out, grads
