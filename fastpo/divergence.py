"""Divergences of a policy from a reference over the whole vocabulary, per token."""

from __future__ import annotations

import math

import torch

from fastpo import divergence_plans, linear
from fastpo.checks import check_operands, fail
from fastpo.linear import LoRA
from fastpo.ops import _check
from fastpo.ops.linear_divergence import linear_divergence as _linear_divergence
from fastpo.ops.logits_divergence import logits_divergence
from fastpo.tiles import accumulation_dtype

_KINDS = ("forward_kl", "reverse_kl", "js", "chi2", "alpha")


def _check_kind(op: str, kind: str, alpha: float | None) -> float:
    """Alpha as the op takes it; 0 where the kind has none."""
    if kind not in _KINDS:
        raise fail(op, "kind", f"one of {_KINDS}", repr(kind), "Pick one of them.")
    if kind == "js":
        if alpha is not None and not 0 < alpha < 1:
            expected = "a number in (0, 1), the policy's weight in the mixture"
            remedy = "Use kind='forward_kl' or 'reverse_kl' for the limits."
            raise fail(op, "alpha", expected, repr(alpha), remedy)
        return 0.5 if alpha is None else float(alpha)
    if kind == "alpha":
        if alpha is None or not math.isfinite(alpha) or alpha in (0, 1):
            expected = "a finite number other than 0 and 1 with kind='alpha'"
            remedy = "0 is kind='forward_kl', 1 is kind='reverse_kl'."
            raise fail(op, "alpha", expected, repr(alpha), remedy)
        return float(alpha)
    if alpha is not None:
        remedy = "Only the kinds 'js' and 'alpha' have one."
        raise fail(op, "alpha", f"None with kind={kind!r}", repr(alpha), remedy)
    return 0.0


def _check_mask(op: str, mask: torch.Tensor | None, shape: tuple[int, ...], why: str) -> None:
    if mask is None:
        return
    if mask.dtype != torch.bool:
        expected, remedy = "bool, True where a token counts", "Call mask.bool()."
        raise fail(op, "mask", expected, str(mask.dtype), remedy)
    _check.check_shape(op, "mask", mask, shape, why)


def linear_divergence(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ref_hidden: torch.Tensor,
    ref_weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    ref_bias: torch.Tensor | None = None,
    *,
    kind: str = "forward_kl",
    alpha: float | None = None,
    mask: torch.Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    workspace_bytes: int | None = None,
    lora: LoRA | None = None,
) -> torch.Tensor:
    """Divergence of the policy from the reference per token, without the logits of either.

    With ``p = softmax(z)`` of the policy's ``z = hidden @ weight.T + bias`` (transformed as in
    :func:`fastpo.linear_token_stats`) and ``q`` likewise of the reference's:

    - ``forward_kl``: ``KL(q || p) = sum q log(q / p)``, what distillation minimises.
    - ``reverse_kl``: ``KL(p || q) = sum p log(p / q)``, the penalty of RL; MiniLLM
      (arXiv:2306.08543).
    - ``js``: ``w KL(p || m) + (1 - w) KL(q || m)``, ``m = w p + (1 - w) q`` and ``w = alpha``, 0.5
      if None. The generalised JSD of GKD (arXiv:2306.13649) and TRL with ``beta = 1 - w``.
    - ``chi2``: Pearson's ``sum (p - q)^2 / q``.
    - ``alpha``: ``sum (p^a q^(1-a) - 1) / (a (a - 1))``, Cressie and Read's power divergence (1984)
      and, as ``a = (1 + A) / 2``, Amari's (1985). Towards ``a = 0`` it is ``forward_kl``, towards 1
      ``reverse_kl``, at 2 half of ``chi2``; 0.5 gives 4 (1 - the Bhattacharyya coefficient).

    Every term of the sum is formed without cancellation, so values of models that nearly agree keep
    their digits, and none is negative.

    The gradient flows to whichever of hidden, weight, bias, the LoRA factors, ref_hidden,
    ref_weight and ref_bias requires it; the reference is a constant if it is passed without. No
    second derivatives. In matrix passes of ``2 N H V`` FLOP over the unmasked tokens, forward and
    backward together, with a gradient to the policy (to both): 2 without a gradient, 3 (4) with
    frozen heads, 5 (6) with a LoRA on one, 6 (8) with trained heads. Of the last two, the two
    passes that make the logits again fall away for the tokens whose logits the workspace holds.

    Args:
        hidden: [..., H] the policy's, float32, bfloat16, float16 or float64.
        weight: [V, H] the policy's head, in the type of hidden.
        ref_hidden: [..., R] the reference's; R may differ from H.
        ref_weight: [V, R] its head, in the type of ref_hidden. None for the policy's own weight and
            bias, without its LoRA and as a constant: the product then reads the weight once for
            both, as it does when ``weight`` itself or a detached alias is passed.
        bias: [V] or None.
        ref_bias: [V] or None.
        kind: the divergence, one of the five above.
        alpha: of ``js`` and ``alpha``; None elsewhere.
        mask: [...] bool, None for all: tokens where it is False cost nothing, give 0 and get a zero
            gradient.
        temperature: divides the logits of both. Nothing multiplies the result by its square.
        logit_scale: multiplies the logits of both, before the soft-cap.
        softcap: bounds the logits of both by a tanh; None for none.
        workspace_bytes: bound on the logits of both alive at a time, 16 tokens' at least; default
            512 MiB on a GPU, 128 MiB on a CPU.
        lora: a LoRA on the policy's head.

    Returns:
        [...] float32 (float64 for float64 inputs), never negative; nats where it is a KL or JS.

    Raises:
        ValueError: shapes, dtypes, devices or numbers that do not fit, two vocabularies among them.

    Example:
        >>> import torch, fastpo
        >>> hidden, ref_hidden = torch.randn(2, 5, 16, requires_grad=True), torch.randn(2, 5, 24)
        >>> weight, ref_weight = torch.randn(100, 16), torch.randn(100, 24)
        >>> values = fastpo.linear_divergence(hidden, weight, ref_hidden, ref_weight, kind="js")
        >>> values.sum().backward()
        >>> values.shape, hidden.grad.shape
        (torch.Size([2, 5]), torch.Size([2, 5, 16]))
    """
    op = "linear_divergence"
    optional = {"ref_weight": ref_weight, "ref_bias": ref_bias, "mask": mask}
    linear.check_head(op, hidden, weight, bias, lora, optional, ref_hidden=ref_hidden)
    alpha = _check_kind(op, kind, alpha)
    transform = _check.check_transform(op, logit_scale, softcap, temperature)
    budget = linear.workspace(op, hidden, workspace_bytes)
    shape = tuple(hidden.shape[:-1])
    policy = linear.head_tensors(op, hidden, weight, bias, lora)
    if tuple(ref_hidden.shape[:-1]) != shape:
        got = f"{tuple(ref_hidden.shape)} beside hidden {tuple(hidden.shape)}"
        remedy = "Both models must score the same tokens."
        raise fail(op, "ref_hidden", "the leading shape of hidden", got, remedy)
    _check_mask(op, mask, shape, "hidden without its last dimension")
    if ref_weight is None:
        if ref_bias is not None:
            remedy = "Pass the ref_weight that it belongs to, such as weight.detach()."
            raise fail(op, "ref_bias", "None without a ref_weight", "a tensor", remedy)
        # Of the tensors that autocast may have cast: one copy serves both.
        ref_weight, ref_bias = (None if t is None else t.detach() for t in policy[1:3])
    ref = linear.head_tensors(op, ref_hidden, ref_weight, ref_bias, None, "ref_")
    if policy[1].shape[0] != ref[1].shape[0]:
        got = f"{policy[1].shape[0]} rows in weight and {ref[1].shape[0]} in ref_weight"
        remedy = "Cut a padded vocabulary, as in ref_weight[:V]; other tokens do not compare."
        raise fail(op, "weight, ref_weight", "one vocabulary", got, remedy)
    dtypes = (policy[0].dtype, ref[0].dtype)
    if accumulation_dtype(dtypes[0]) != accumulation_dtype(dtypes[1]):
        expected, got = "float64 on both sides or on none", f"{dtypes[0]} and {dtypes[1]}"
        remedy = "Cast the reference to the policy's type."
        raise fail(op, "hidden, ref_hidden", expected, got, remedy)

    *policy_tensors, lora_scale = policy
    tensors = (*policy_tensors, *ref[:3])
    needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors]
    if any(needs[:5]) and any(needs[5:]) and dtypes[0] != dtypes[1]:
        expected, got = "one dtype where both get a gradient", f"{dtypes[0]} and {dtypes[1]}"
        remedy = "Cast one side, or detach the reference."
        raise fail(op, "hidden, ref_hidden", expected, got, remedy)
    hidden_needs = [needs[0], needs[5]]
    frozen = lora is None and sum(hidden_needs) == sum(needs)
    unit_grads = hidden_needs if frozen else [False, False]
    rows_to_save = 0
    if any(needs) and not frozen:
        rows_to_save = divergence_plans.rows_to_save(policy[0], policy[1].shape[0], budget)
    divergences_N, *_ = _linear_divergence(
        *tensors, None if mask is None else mask.reshape(-1), lora_scale, *transform,
        kind, alpha, budget, unit_grads, rows_to_save,
    )  # fmt: skip
    return divergences_N.view(shape)


def divergence(
    logits: torch.Tensor,
    ref_logits: torch.Tensor,
    *,
    kind: str = "forward_kl",
    alpha: float | None = None,
    mask: torch.Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> torch.Tensor:
    """Divergence of the policy from the reference per token, from logits that are there already.

    The kinds are those of :func:`fastpo.linear_divergence`, which costs less where the logits need
    not exist. The gradient flows to either of the two; no other buffer of their size is made.

    Args:
        logits: [..., V] the policy's, float32, bfloat16, float16 or float64; rows may have any
            stride (a slice such as ``logits[:, :-1]`` is not copied).
        ref_logits: [..., V] the reference's, in the shape and type of logits.
        kind: ``forward_kl``, ``reverse_kl``, ``js``, ``chi2`` or ``alpha``.
        alpha: of ``js`` and ``alpha``; None elsewhere.
        mask: [...] bool, None for all: tokens where it is False give 0 and get a zero gradient.
        temperature: divides the logits of both.
        logit_scale: multiplies the logits of both, before the soft-cap.
        softcap: bounds the logits of both by a tanh; None for none.

    Returns:
        [...] float32 (float64 for float64 logits), never negative; nats where it is a KL or JS.

    Raises:
        ValueError: shapes, dtypes, devices or numbers that do not fit.

    Example:
        >>> import torch, fastpo
        >>> logits, ref_logits = torch.randn(2, 5, 100), torch.randn(2, 5, 100)
        >>> fastpo.divergence(logits, ref_logits, kind="reverse_kl").shape
        torch.Size([2, 5])
    """
    op = "divergence"
    check_operands(op, {"mask": mask}, logits=logits, ref_logits=ref_logits)
    alpha = _check_kind(op, kind, alpha)
    transform = _check.check_transform(op, logit_scale, softcap, temperature)
    _check.check_float(op, "logits", logits)
    if logits.dim() < 2 or logits.shape[-1] == 0:
        expected = "[..., V] with V > 0"
        remedy = "Add a dimension with logits[None]."
        raise fail(op, "logits", expected, str(tuple(logits.shape)), remedy)
    _check.check_shape(op, "ref_logits", ref_logits, tuple(logits.shape), "that of logits")
    _check.check_same_dtype(op, "logits, ref_logits", logits, ref_logits)
    shape = tuple(logits.shape[:-1])
    _check_mask(op, mask, shape, "logits without V")

    def flat(tensor: torch.Tensor) -> torch.Tensor:
        """[B, T, V], neighbours side by side."""
        tensor = tensor if tensor.stride(-1) == 1 else tensor.contiguous()
        return tensor[None] if tensor.dim() == 2 else tensor.flatten(0, -3)

    if mask is not None:
        mask = mask[None] if mask.dim() == 1 else mask.flatten(0, -2)
    values, _ = logits_divergence(flat(logits), flat(ref_logits), mask, *transform, kind, alpha)
    return values.view(shape)
