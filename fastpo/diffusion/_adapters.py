"""The adapter layers of a model, by what they look like: no adapter library is imported.

PEFT's layers, inside its own models or put into those of diffusers and transformers, name their
containers of weights in ``adapter_layer_names``; each maps an adapter's name to a module or tensor.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from operator import attrgetter

from torch import Tensor, nn

_WRAPPER, _BASE = "base_model.model.", ".base_layer."


def adapter_tensors(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """For each adapter its tensors, by a name that twins in another adapter share."""
    found: dict[str, dict[str, Tensor]] = {}
    for path, layer in model.named_modules():
        for container in getattr(layer, "adapter_layer_names", ()):
            for adapter, part in attrgetter(container)(layer).items():
                tensors = part.state_dict() if isinstance(part, nn.Module) else {"": part.detach()}
                named = found.setdefault(adapter, {})
                named.update({f"{path}.{container}.{key}": t for key, t in tensors.items()})
    return found


def adapter_scales(model: nn.Module, adapter: str) -> list[float | None]:
    """What each layer multiplies the adapter's output with; None where the layer has no such."""
    layers = (getattr(layer, "scaling", None) for layer in model.modules())
    return [scaling.get(adapter) for scaling in layers if isinstance(scaling, dict)]


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights without those of adapters, named as in the model before it had any."""
    adapters = tuple(
        f"{path}.{container}.".removeprefix(".")
        for path, layer in model.named_modules()
        for container in getattr(layer, "adapter_layer_names", ())
    )
    return {
        name.removeprefix(_WRAPPER).replace(_BASE, "."): tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith(adapters)
    }


def outside_adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that stay in use with all adapters off, by name.

    The decision for every reference that is the policy without its adapters: one of these that
    trains would let the reference drift.
    """
    inside: set[int] = set()
    for layer in model.modules():
        if hasattr(layer, "adapter_layer_names"):
            # peft's modules_to_save stands beside the original instead of around it.
            below = dict(layer.named_children()).get("base_layer") or layer.original_module
            kept = {id(parameter) for parameter in below.parameters()}
            inside |= {id(parameter) for parameter in layer.parameters()} - kept
    return {name: p for name, p in model.named_parameters() if id(p) not in inside}


def active_adapters(model: nn.Module) -> dict[str, bool]:
    """Names of the adapters that take part in the forward, and whether each of them trains."""
    found: dict[str, bool] = {}
    for layer in model.modules():
        if not hasattr(layer, "adapter_layer_names") or layer.disable_adapters:
            continue
        for container in layer.adapter_layer_names:
            parts = attrgetter(container)(layer)
            for adapter in layer.active_adapters:
                if adapter in parts:
                    part = parts[adapter]
                    tensors = part.parameters() if isinstance(part, nn.Module) else [part]
                    trains = any(tensor.requires_grad for tensor in tensors)
                    found[adapter] = found.get(adapter, False) or trains
    return found


def merged_adapters(model: nn.Module) -> set[str]:
    """Names of the adapters whose weights were added to those below them in some layer."""
    layers = (layer for layer in model.modules() if hasattr(layer, "adapter_layer_names"))
    return {name for layer in layers for name in layer.merged_adapters}


def kept_adapters(model: nn.Module) -> list[str]:
    """The adapters that a reference without the trained ones keeps: the active frozen ones."""
    active = active_adapters(model)
    return [name for name, trains in active.items() if not trains] if any(active.values()) else []


@contextlib.contextmanager
def adapters_switched(model: nn.Module, adapters: Sequence[str]) -> Iterator[None]:
    """The model with these adapters active, all off if there are none; afterwards as before.

    Args:
        model: of peft, or one of diffusers or transformers with adapters.
        adapters: names of some of the active ones.
    """
    with trainability_kept(model):
        if adapters:
            # PeftModel itself takes one name only.
            owner = model.base_model if hasattr(model, "peft_type") else model
            active = list(active_adapters(model))
            try:
                owner.set_adapter(list(adapters))
                yield
            finally:
                owner.set_adapter(active)
        elif hasattr(model, "disable_adapter"):
            with model.disable_adapter():
                yield
        else:
            model.disable_adapters()
            try:
                yield
            finally:
                model.enable_adapters()


@contextlib.contextmanager
def trainability_kept(model: nn.Module) -> Iterator[None]:
    """Afterwards every parameter requires a gradient as before: switches of adapters change it."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
