"""What an output layer computes, as weight, bias and LoRA; every other kind is refused by name."""

from __future__ import annotations

from torch import Tensor, nn

import fastpo


class HeadError(NotImplementedError, ValueError):
    """A model's loss or its output head is of a kind that the fused statistics cannot serve."""


def _is(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a layer computes what that class does, as FSDP2's subclasses do."""
    return isinstance(layer, kind) and type(layer).forward is kind.forward


def _refusal(layer: nn.Module, reason: str = "") -> HeadError:
    kind = f"{type(layer).__module__}.{type(layer).__qualname__}"
    served = "an nn.Linear, a copy of one by modules_to_save, and one plain LoRA on an nn.Linear"
    remedy = "Leave the lm_head out of target_modules and of quantisation"
    return HeadError(
        f"the output head is a {kind}{reason}, and the fused head serves {served}. {remedy}."
    )


def _require_plain(layer: nn.Module) -> None:
    """That nothing was hung around the layer's forward; FSDP2's hooks only gather its weights."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    is_hooked = any(getattr(layer, name) for name in hooks) and not hasattr(layer, "unshard")
    if "forward" in vars(layer) or is_hooked:
        raise _refusal(layer, " with a replaced forward or with hooks")


def _lora(layer: nn.Module) -> fastpo.LoRA | None:
    """The LoRA of a peft layer on the head, None if it is off or merged."""
    if layer.disable_adapters and layer.merged:
        raise _refusal(layer, " that is merged and off: call unmerge_adapter()")
    if layer.disable_adapters or layer.merged:
        return None
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if not names:
        return None
    name = names[0]
    a, b, dropout = (part[name] for part in (layer.lora_A, layer.lora_B, layer.lora_dropout))
    has_dropout = getattr(dropout, "p", 0.0) > 0
    is_linear = all(_is(part, nn.Linear) and part.bias is None for part in (a, b))
    if len(names) > 1 or name in layer.lora_variant or not is_linear or has_dropout:
        unsupported = "several adapters, DoRA or another variant, lora_bias or dropout"
        raise _refusal(layer, f" with {unsupported}")
    for part in (a, b):
        _require_plain(part)
    return fastpo.LoRA(a.weight, b.weight, layer.scaling[name])


def output_head(model: nn.Module) -> tuple[Tensor, Tensor | None, fastpo.LoRA | None]:
    """Weight [V, H], bias [V] and LoRA of the output head, through peft and FSDP2.

    Raises:
        HeadError: the layer computes anything but ``hidden @ weight.T + bias`` and such a LoRA; the
            message names its type.
    """
    layer, lora = model.get_output_embeddings(), None
    if hasattr(layer, "original_module") or hasattr(layer, "base_layer"):
        from peft.tuners.lora import Linear as LoraLinear
        from peft.utils import ModulesToSaveWrapper

        _require_plain(layer)
        if _is(layer, ModulesToSaveWrapper):
            active = layer.active_adapters
            is_off = layer.disable_adapters or not active
            is_off = is_off or any(name not in layer.modules_to_save for name in active)
            layer = layer.original_module if is_off else layer.modules_to_save[active[0]]
        elif _is(layer, LoraLinear):
            lora, layer = _lora(layer), layer.base_layer
    if layer is None or not _is(layer, nn.Linear):
        raise _refusal(layer)
    _require_plain(layer)
    if hasattr(layer.weight, "ds_id"):
        remedy = "Use DistributedDataParallel, FSDP2 or ZeRO stage 2."
        raise HeadError(f"the fused head does not gather ZeRO-3 shards. {remedy}")
    weight, bias = (
        p.full_tensor() if hasattr(p, "full_tensor") else p  # FSDP2 shards.
        for p in (layer.weight, layer.bias)
    )
    if type(weight) not in (Tensor, nn.Parameter) or not weight.is_floating_point():
        raise _refusal(layer, f" with a quantised weight ({type(weight).__qualname__})")
    return weight, bias, lora
