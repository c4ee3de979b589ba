"""The first check of every public function: what stands for a tensor is one.

Every message says what, expected, got and the remedy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def fail(function: str, argument: str, expected: str, got: str, remedy: str) -> ValueError:
    """The error every check raises."""
    text = f"fastpo.{function}: {argument}: expected {expected}, got {got}. {remedy}"
    return ValueError(text.rstrip())


def _remedy(argument: str, value: Any) -> str:
    if not isinstance(value, nn.Module):
        return f"Pass torch.as_tensor({argument})."
    if not isinstance(getattr(value, "weight", None), Tensor):
        return "Pass the tensor that it holds."
    bias = ", and its .bias as bias" if getattr(value, "bias", None) is not None else ""
    return f"Pass its .weight{bias}."


def check_tensors(
    function: str, optional: dict[str, Any] | None = None, /, **required: Any
) -> None:
    """Each is a tensor; of the optional ones, None says that it is not given.

    Raises:
        ValueError: one is something else, such as a list, an array or a module.
    """
    for argument, value in required.items():
        if value is None:
            raise fail(function, argument, "a tensor", "None", f"Give {argument}.")
    for argument, value in (required | (optional or {})).items():
        if value is not None and not isinstance(value, Tensor):
            kind = type(value)
            name = f"{'an' if kind.__name__[0] in 'aeiouAEIOU' else 'a'} {kind.__name__}"
            raise fail(function, argument, "a tensor", name, _remedy(argument, value))


def _not_plain(tensor: Tensor) -> tuple[str, str] | None:
    """What a tensor is whose memory does not hold its values as they are, and what to do."""
    kind, name = type(tensor), type(tensor).__name__
    integers = (torch.uint8, torch.int8)
    quantised = getattr(tensor, "quant_state", None) is not None or hasattr(tensor, "SCB")
    if quantised or (isinstance(tensor, nn.Parameter) and tensor.dtype in integers):
        remedy = (
            "Leave this layer out of the quantisation (llm_int8_skip_modules=['lm_head'] in"
            " transformers), or pass its dequantised weight."
        )
        return f"a quantised one ({name}, {tensor.dtype} {list(tensor.shape)})", remedy
    if not hasattr(kind, "__tensor_flatten__"):  # torch's protocol of tensors made of others
        return None
    if name == "DTensor":
        return "a DTensor, spread over ranks", "Gather it with .full_tensor()."
    if getattr(tensor, "is_nested", False):
        return "a nested one", "Pad it, or pass .values()."
    return f"a {name}, made of other tensors", "Pass it dequantised, or as a plain torch.Tensor."


def check_operands(
    function: str, optional: dict[str, Tensor | None] | None = None, /, **required: Tensor
) -> None:
    """Plain tensors on one device that there are kernels for; the optional ones may be None.

    Raises:
        ValueError: they are not.
    """
    check_tensors(function, optional, **required)
    tensors = required | (optional or {})
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    for argument, tensor in given.items():
        if not torch.compiler.is_compiling():
            found = _not_plain(tensor)
            if found is not None:
                got, remedy = found
                raise fail(function, argument, "a plain tensor", got, remedy)
        if tensor.device.type not in ("cpu", "cuda", "meta"):
            got, remedy = f"one on {tensor.device}", 'Move it with .to("cpu") or .to("cuda").'
            raise fail(function, argument, "a tensor on cpu or cuda", got, remedy)
    if len({tensor.device for tensor in given.values()}) > 1:
        got = ", ".join(f"{name} on {tensor.device}" for name, tensor in given.items())
        raise fail(
            function, "devices", "all tensors on one device", got, "Move them with .to(device)."
        )
