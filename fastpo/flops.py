"""What torch's ``FlopCounterMode`` reports for the ops. Import this module to register it.

It is not imported with fastpo because ``torch.utils.flop_counter`` imports a compiler.

>>> import torch, fastpo.flops
>>> from torch.utils.flop_counter import FlopCounterMode
>>> with FlopCounterMode(display=False) as counter:
...     logprobs = fastpo.linear_logprobs(torch.ones(4, 8), torch.ones(10, 8), torch.arange(4))
>>> counter.get_total_flops() == 2 * 4 * 8 * 10
True
"""

from __future__ import annotations

import torch
from torch.utils.flop_counter import register_flop_formula

import fastpo.ops.linear_divergence
import fastpo.ops.linear_nll
import fastpo.ops.linear_stats  # noqa: F401  they define the ops named below


def _active(targets: torch.Tensor, ignore_index: int) -> int:
    """Rows that enter a product; all of them where the values are not known (tracing)."""
    if isinstance(targets, torch._subclasses.FakeTensor):
        return targets.shape[0]
    return int((targets != ignore_index).sum())


@register_flop_formula(torch.ops.fastpo.linear_stats, get_raw=True)
def _flops(hidden, weight, targets, bias, lora_a, lora_b, *scalars, out_val=None) -> int:
    """What ``FlopCounterMode`` reports: the products over the active rows."""
    ignore_index, keep_unit_grad = scalars[4], scalars[7]
    (V, H), r = weight.shape, 0 if lora_a is None else lora_a.shape[0]
    rows = _active(targets, ignore_index)
    return 2 * rows * (V * H * (2 if keep_unit_grad else 1) + r * (V + H))


@register_flop_formula(torch.ops.fastpo.linear_stats_backward, get_raw=True)
def _backward_flops(hidden, weight, targets, bias, lora_a, lora_b, *rest, out_val=None) -> int:
    """As above; rows without an upstream gradient enter none."""
    ignore_index, saved_columns = rest[4], rest[10].shape[1]
    *grads, (needs_hidden, needs_weight, _, needs_a, needs_b) = rest[11:]
    (V, H), r = weight.shape, 0 if lora_a is None else lora_a.shape[0]
    rows = _active(targets, ignore_index)
    if not isinstance(targets, torch._subclasses.FakeTensor):
        moved = sum((g != 0) for g in grads if g is not None)
        rows = int(((moved > 0) & (targets != ignore_index)).sum())
    recomputed = V - saved_columns
    products = recomputed * H + V * H * (needs_hidden + needs_weight)
    lora = r * (recomputed + H + V * (needs_a or needs_hidden) + V * needs_b)
    return 2 * rows * (products + lora + r * H * (needs_a + needs_hidden))


@register_flop_formula(torch.ops.fastpo.linear_nll, get_raw=True)
def _nll_flops(hidden, weight, targets, bias, factors, *rest, out_val=None) -> int:
    """What ``FlopCounterMode`` reports: the products over the active rows."""
    rows = hidden.shape[0]
    if not isinstance(targets, torch._subclasses.FakeTensor):
        rows = int((factors != 0).sum())
    return 2 * rows * weight.numel() * (1 + rest[-3] + rest[-2])


@register_flop_formula(torch.ops.fastpo.linear_divergence, get_raw=True)
def _divergence_flops(*arguments, out_val=None) -> int:
    """What ``FlopCounterMode`` reports: both models' products over the unmasked rows."""
    hidden, weight, _, lora_a, _, _, ref_weight, _, mask = arguments[:9]
    unit_grad, ref_unit_grad = arguments[-2]
    rows = hidden.shape[0]
    if mask is not None and not isinstance(mask, torch._subclasses.FakeTensor):
        rows = int(mask.sum())
    r = 0 if lora_a is None else lora_a.shape[0]
    products = weight.numel() * (1 + unit_grad) + ref_weight.numel() * (1 + ref_unit_grad)
    return 2 * rows * (products + r * sum(weight.shape))


@register_flop_formula(torch.ops.fastpo.linear_divergence_backward, get_raw=True)
def _divergence_backward_flops(*arguments, out_val=None) -> int:
    """As above; rows without an upstream gradient enter none."""
    hidden, weight, _, lora_a, _, _, ref_weight, _, mask = arguments[:9]
    saved_logits, grads, needs = arguments[-3:]
    rows, saved = hidden.shape[0], saved_logits.shape[0]
    if not isinstance(grads, torch._subclasses.FakeTensor):
        mask = torch.ones_like(grads, dtype=torch.bool) if mask is None else mask
        moved = (grads != 0) & mask
        rows, saved = int(moved.sum()), int((moved & (mask.cumsum(0) <= saved)).sum())
    (V, H), r = weight.shape, 0 if lora_a is None else lora_a.shape[0]
    needs_hidden, needs_weight, _, needs_a, needs_b, *ref_needs = needs
    products = V * H * (needs_hidden + needs_weight)
    products += ref_weight.numel() * (ref_needs[0] + ref_needs[1])
    lora = H * (1 + needs_a + needs_hidden) + V * ((needs_a or needs_hidden) + needs_b)
    recomputed = V * (H + r) + ref_weight.numel()
    return 2 * (rows * (products + r * lora) + (rows - saved) * recomputed)
