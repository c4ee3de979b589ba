"""Hidden states and a head weight to per-token statistics, never holding the logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from fastpo import plans
from fastpo.checks import check_operands, fail
from fastpo.ops import _check
from fastpo.ops.linear_stats import Stats, linear_stats
from fastpo.tiles import MOMENTS

_OUTPUTS = ("logprobs", "lse", *MOMENTS)
_DIFFERENTIABLE = ("logprobs", "lse", "entropy")
_WORKSPACE_BYTES = {"cpu": 128 << 20}  # elsewhere 512 MiB


class LoRA(NamedTuple):
    """A low-rank addition to the head: ``logits += scaling * (hidden @ a.T) @ b.T``.

    Attributes:
        a: [r, H], the weight of peft's ``lora_A``.
        b: [V, r], the weight of peft's ``lora_B``.
        scaling: peft's ``lora_alpha / r``.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float = 1.0


class TokenStats(NamedTuple):
    """Per-token statistics, shaped as the targets; None where not asked for. Nats.

    Attributes:
        logprobs: log-probability of the target.
        lse: log-sum-exp of the (scaled) logits.
        entropy: entropy of the distribution over the vocabulary.
        log_sum_sq_probs: log of the sum of squared probabilities.
        mean_logits: mean of the (scaled) logits over the vocabulary.
        is_top1: bool, the target is the most probable token (the first one on ties).
    """

    logprobs: torch.Tensor | None = None
    lse: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    log_sum_sq_probs: torch.Tensor | None = None
    mean_logits: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None


class Inputs(NamedTuple):
    """Arguments of a public function, checked, cast and flattened.

    Fields are read by name: before torch 2.13 dynamo can unpack a NamedTuple but not slice it.
    """

    hidden_NH: torch.Tensor
    weight_VH: torch.Tensor
    targets_N: torch.Tensor
    bias_V: torch.Tensor | None
    lora_a_rH: torch.Tensor | None
    lora_b_Vr: torch.Tensor | None
    lora_scale: float

    def needs_grad(self) -> bool:
        """Whether autograd will ask for any gradient."""
        others = (self.bias_V, self.lora_a_rH, self.lora_b_Vr)
        tensors = (self.hidden_NH, self.weight_VH, *others)
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)

    def head_is_frozen(self) -> bool:
        """Only the hidden states want a gradient, and no LoRA factor stands between."""
        others = (self.weight_VH, self.bias_V)
        return self.lora_a_rH is None and not any(t is not None and t.requires_grad for t in others)


def _cast(tensor: torch.Tensor | None, device_type: str) -> torch.Tensor | None:
    """What ``F.linear`` does to an input under autocast, of which meta tensors know nothing."""
    if tensor is None or device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return tensor
    castable = tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(torch.get_autocast_dtype(device_type)) if castable else tensor


def check_head(op, hidden, weight, bias, lora, optional=None, /, **required) -> None:
    """The first check: one model's tensors, and others, are plain tensors on one device."""
    factors = {}
    if lora is not None:
        if not isinstance(lora, tuple) or len(lora) != 3:
            remedy = "Pass fastpo.LoRA(lora_A.weight, lora_B.weight, scaling)."
            raise fail(op, "lora", "a fastpo.LoRA", f"a {type(lora).__name__}", remedy)
        factors = {"lora.a": lora[0], "lora.b": lora[1]}
        if not isinstance(lora[2], (int, float)):
            remedy = "Pass layer.scaling[adapter] of peft, lora_alpha / r."
            raise fail(op, "lora.scaling", "a number", repr(lora[2]), remedy)
    optional = {"bias": bias} | (optional or {})
    check_operands(op, optional, hidden=hidden, weight=weight, **factors, **required)


def head_tensors(op, hidden, weight, bias, lora, prefix="") -> tuple:
    """Check one model's tensors and cast them as autocast would: Inputs without the targets."""
    device_type = hidden.device.type
    hidden, weight, bias = (_cast(t, device_type) for t in (hidden, weight, bias))
    both = f"{prefix}hidden, {prefix}weight"
    _check.check_float(op, f"{prefix}hidden", hidden)
    _check.check_float(op, f"{prefix}weight", weight)
    if hidden.dim() < 2 or weight.dim() != 2 or weight.shape[0] == 0:
        got = f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)}"
        expected = "hidden [..., H] and weight [V, H] with V > 0"
        raise fail(op, both, expected, got, "Add the dimension, or pass lm_head.weight.")
    if hidden.shape[-1] != weight.shape[1]:
        got = f"{hidden.shape[-1]} in hidden and {weight.shape[1]} in weight"
        remedy = "The weight is [V, H], as in nn.Linear; do not transpose it."
        raise fail(op, both, "one hidden size H", got, remedy)
    _check.check_same_dtype(op, both, hidden, weight)
    if bias is not None:
        _check.check_float(op, f"{prefix}bias", bias)
        why = "the vocabulary of weight"
        _check.check_shape(op, f"{prefix}bias", bias, (weight.shape[0],), why)
    a, b, scaling = (None, None, 1.0) if lora is None else lora
    if lora is not None:
        a, b = _cast(a, device_type), _cast(b, device_type)
        _check.check_same_dtype(op, "hidden, lora.a", hidden, a)
        _check.check_same_dtype(op, "hidden, lora.b", hidden, b)
        if a.dim() != 2 or a.shape[1] != weight.shape[1]:
            expected = f"[r, {weight.shape[1]}]"
            raise fail(op, "lora.a", expected, str(tuple(a.shape)), "Pass lora_A.weight.")
        _check.check_shape(op, "lora.b", b, (weight.shape[0], a.shape[0]), "[V, r]")
    return hidden.reshape(-1, hidden.shape[-1]), weight, bias, a, b, scaling


def prepare(op, hidden, weight, targets, bias, lora, ignore_index) -> Inputs:
    """Check the tensors of a public function, cast them as autocast would, flatten them."""
    check_head(op, hidden, weight, bias, lora, targets=targets)
    hidden_NH, weight, bias, a, b, scaling = head_tensors(op, hidden, weight, bias, lora)
    why = "hidden without its last dimension"
    _check.check_shape(op, "targets", targets, tuple(hidden.shape[:-1]), why)
    _check.check_targets(op, targets, weight.shape[0], ignore_index)
    return Inputs(hidden_NH, weight, targets.reshape(-1), bias, a, b, scaling)


def workspace(op, hidden, workspace_bytes) -> int:
    """The byte budget, checked; its default by the device."""
    if workspace_bytes is None:
        workspace_bytes = _WORKSPACE_BYTES.get(hidden.device.type, 512 << 20)
    _check.check_positive(op, "workspace_bytes", workspace_bytes)
    return int(workspace_bytes)


def scalars(op, hidden, temperature, logit_scale, softcap, ignore_index, workspace_bytes):
    """The op's scalar arguments, checked; ``softcap`` None becomes 0."""
    transform = _check.check_transform(op, logit_scale, softcap, temperature)
    return *transform, ignore_index, workspace(op, hidden, workspace_bytes)


def linear_token_stats(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    outputs: Sequence[str] = ("logprobs",),
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    workspace_bytes: int | None = None,
    lora: LoRA | None = None,
    differentiable: Sequence[str] | None = None,
) -> TokenStats:
    """Statistics of ``softmax(z)`` per token, ``z = hidden @ weight.T``, without the logits.

    ``z = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap) / temperature``.

    The gradient flows from ``logprobs``, ``lse`` and ``entropy`` to hidden, weight, bias and the
    LoRA factors; the others carry none. It is the only derivative: a second one
    (``create_graph=True``) and forward mode are errors. In matrix passes of ``2 N H V`` FLOP over
    the active tokens, forward and backward together: 1 without a gradient, 2 with a frozen head, 4
    with a trained one.

    Args:
        hidden: [..., H] float32, bfloat16, float16 or float64, any strides.
        weight: [V, H] the head's weight, in the type of hidden.
        targets: [...] int64 token ids, ``ignore_index`` for tokens to skip: those cost nothing,
            give 0 and get a zero gradient.
        bias: [V] or None.
        outputs: any of ``logprobs``, ``lse``, ``entropy``, ``log_sum_sq_probs``, ``mean_logits``,
            ``is_top1``.
        temperature: divides the logits.
        logit_scale: multiplies them, before the soft-cap.
        softcap: bounds them by a tanh; None for none.
        ignore_index: the target of tokens to skip.
        workspace_bytes: bound on the logits alive at any time; default 512 MiB on a GPU, 128 MiB on
            a CPU. A tile of them takes at most 510 MiB (4 MiB on a CPU). With a trained head the
            rest keeps logits from forward to backward, which are then not recomputed: 4 passes
            become 3 when all ``4 N V`` bytes fit.
        lora: a LoRA on the head, whose factors get gradients while ``weight`` stays frozen.
        differentiable: the outputs whose gradient will be used, if known. With a frozen head a
            gradient through ``entropy`` or ``lse`` then costs 3 passes in all; None leaves the
            choice to backward (2 passes if only ``logprobs`` is used, 4 otherwise). Outputs not
            named are detached.

    Returns:
        The statistics in float32 (float64 for float64 inputs), each shaped as ``targets``.

    Raises:
        ValueError: shapes, dtypes, devices or names that do not fit, what is no plain tensor (a
            module, a quantised or distributed weight); on a CPU also a target out of range (on a
            GPU it gives NaN at its token, without a synchronisation).
        RuntimeError: a second derivative or forward mode.

    Example:
        >>> import torch, fastpo
        >>> hidden, weight = torch.randn(2, 5, 16), torch.randn(100, 16)
        >>> targets = torch.randint(100, (2, 5))
        >>> stats = fastpo.linear_token_stats(
        ...     hidden, weight, targets, outputs=("logprobs", "entropy")
        ... )
        >>> stats.logprobs.shape, stats.entropy.shape
        (torch.Size([2, 5]), torch.Size([2, 5]))
    """
    op = "linear_token_stats"
    for name in outputs:
        if name not in _OUTPUTS:
            remedy = "Pass a tuple of these names."
            raise fail(op, "outputs", f"names among {_OUTPUTS}", repr(name), remedy)
    for name in differentiable or ():
        if name not in _DIFFERENTIABLE or name not in outputs:
            expected = f"names among outputs and {_DIFFERENTIABLE}"
            remedy = "Ask for it in outputs too; the others have no gradient."
            raise fail(op, "differentiable", expected, repr(name), remedy)
    inputs = prepare(op, hidden, weight, targets, bias, lora, ignore_index)
    numbers = scalars(op, hidden, temperature, logit_scale, softcap, ignore_index, workspace_bytes)
    stats = run(inputs, numbers, outputs, differentiable)
    values = {}
    for name in outputs:
        value = getattr(stats, name).view(targets.shape)
        drop = differentiable is not None and name not in differentiable
        values[name] = value.detach() if drop else value
    return TokenStats(**values)


def run(inputs, numbers, outputs, differentiable=None) -> Stats:
    """Choose the plan by what requires a gradient, and run the op."""
    moments = sum(bit for name, bit in MOMENTS.items() if name in outputs)
    keep_unit_grad, saved_columns = False, 0
    if inputs.needs_grad():
        only_logprobs = differentiable is None or set(differentiable) <= {"logprobs"}
        keep_unit_grad = inputs.head_is_frozen() and only_logprobs
        if not keep_unit_grad:
            vocab, workspace_bytes = inputs.weight_VH.shape[0], numbers[-1]
            saved_columns = plans.columns_to_save(inputs.hidden_NH, vocab, workspace_bytes)
    return Stats(*linear_stats(*inputs, *numbers, moments, keep_unit_grad, saved_columns))


def linear_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    workspace_bytes: int | None = None,
    lora: LoRA | None = None,
) -> torch.Tensor:
    """Log-probabilities of the targets under ``softmax(hidden @ weight.T)``, without the logits.

    Equal to ``log_softmax(F.linear(hidden, weight, bias), -1).gather(-1, targets)`` up to rounding,
    of which it has less: logits are accumulated and kept in float32 whatever the inputs are, and
    ``1 - p(target)`` is a sum, so the gradients of confident tokens keep their digits. Never above
    0.

    Arguments and errors are those of :func:`linear_token_stats`.

    Returns:
        [...] float32 (float64 for float64 inputs), nats; 0 at ignored tokens.

    Example:
        >>> import torch, fastpo
        >>> hidden, weight = torch.randn(6, 16, requires_grad=True), torch.randn(100, 16)
        >>> logprobs = fastpo.linear_logprobs(hidden, weight, torch.arange(6))
        >>> logprobs.sum().backward()
        >>> hidden.grad.shape
        torch.Size([6, 16])
    """
    op = "linear_logprobs"
    inputs = prepare(op, hidden, weight, targets, bias, lora, ignore_index)
    numbers = scalars(op, hidden, temperature, logit_scale, softcap, ignore_index, workspace_bytes)
    stats = run(inputs, numbers, ("logprobs",))
    return stats.logprobs.view(targets.shape)
