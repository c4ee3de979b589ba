"""Guidance at sampling time, with a negative model of its own where there is one."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fastpo.checks import check_tensors
from fastpo.diffusion._inputs import check_fields, per_sample
from fastpo.ops._check import fail
from fastpo.ops.noise_errors import accumulation_of


def guided(conditional: Tensor, unconditional: Tensor, scale: Tensor | float) -> Tensor:
    """Classifier-free guidance: u + s (c - u) (arXiv:2207.12598), also with a negative model.

    For Diffusion-NPO (ICLR 2025) and Self-NPO (arXiv:2505.11777) c is the prediction of the
    positive model with the prompt, u that of the negative model without one.

    Args:
        conditional: [N, ...] c, any float dtype.
        unconditional: u, in the same shape.
        scale: s, [N] or a number; 1 gives c.

    Returns:
        In the dtype of ``conditional``; formed in float32, or float64 if a tensor is.

    Raises:
        ValueError: a shape, dtype or device does not fit.

    Example:
        >>> guided(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, 2.0]]), 5.0)
        tensor([[3., 2.]])
    """
    check_tensors("diffusion.guidance.guided", unconditional=unconditional)
    name = "diffusion.guidance.guided"
    check_fields(name, conditional=conditional, unconditional=unconditional)
    acc = accumulation_of(conditional, unconditional)
    scale_N = per_sample(name, "scale", scale, conditional, acc)
    u = unconditional.to(acc)
    scale_N = scale_N.reshape(-1, *[1] * (u.ndim - 1))
    return (u + scale_N * (conditional.to(acc) - u)).to(conditional.dtype)


def negative_weights(
    base: Mapping[str, Tensor],
    positive: Mapping[str, Tensor],
    delta: Mapping[str, Tensor],
    base_share: float = 0.0,
) -> dict[str, Tensor]:
    """Weights of Diffusion-NPO's negative model: a base + (1 - a) positive + delta.

    Of the authors' code (Diffusion-NPO, ICLR 2025): delta is what training on swapped pairs has
    changed, the product of a LoRA's factors, for instance. Kept near the positive model the two
    predictions differ by little beside the preference.

    Args:
        base: state dict of the pretrained model.
        positive: that of the preferred model, with the same names and shapes.
        delta: changes, for any of these names.
        base_share: a in [0, 1]; 0 starts from the positive model.

    Returns:
        A new state dict in the positive model's dtypes, without gradient; what is no float, such
        as a counter, is the positive model's.

    Raises:
        ValueError: names or shapes do not fit, or ``base_share`` is out of range.

    Example:
        >>> negative_weights({"w": torch.tensor([0.0])}, {"w": torch.tensor([1.0])},
        ...                  {"w": torch.tensor([0.5])}, base_share=0.25)
        {'w': tensor([1.2500])}
    """
    name = "diffusion.guidance.negative_weights"
    if not 0 <= base_share <= 1:
        remedy = "0 starts from the positive model, 1 from the base."
        raise fail(name, "base_share", "a number in [0, 1]", repr(base_share), remedy)
    for argument, state in (("base", base), ("delta", delta)):
        unknown = sorted(state.keys() - positive.keys())
        missing = sorted(positive.keys() - state.keys()) if argument == "base" else []
        if unknown or missing:
            got = f"{unknown[:3]} in excess, {missing[:3]} missing"
            remedy = "Merge adapters first, and strip prefixes such as module."
            raise fail(name, argument, "the names of positive", got, remedy)
        for key, tensor in state.items():
            if tensor.shape != positive[key].shape:
                expected = f"{list(positive[key].shape)} as in positive"
                remedy = "Give states of one architecture."
                raise fail(name, f"{argument}[{key!r}]", expected, f"{list(tensor.shape)}", remedy)
    merged = {}
    for key, tensor in positive.items():
        tensor = tensor.detach()
        if not tensor.is_floating_point():
            merged[key] = tensor.clone()
            continue
        fields = (base[key].detach(), *((delta[key].detach(),) if key in delta else ()))
        acc = accumulation_of(tensor, *fields)
        start, *change = (field.to(tensor.device, acc) for field in fields)
        total = base_share * start + (1 - base_share) * tensor.to(acc)
        merged[key] = (total + change[0] if change else total).to(tensor.dtype)
    return merged
