"""The one ``torch.library`` namespace, and how an op with its derivative is put into it.

All ops share one node of autograd. It serves plain autograd, ``torch.func`` and tracing, and
refuses by name what would else be a wrong number without a word: forward mode, second derivatives,
and the derivative of an op that has none.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

LIBRARY = torch.library.Library("fastpo", "DEF")


class Gradient(NamedTuple):
    """The derivative of an op.

    Attributes:
        setup_context: ``(ctx, inputs, outputs)`` keeps what ``backward`` needs. Outputs that users
            see are kept as clones: they may be written into.
        backward: ``(ctx, *grads)`` to the gradients of the op's arguments.
        differentiable: whether autograd may differentiate ``backward``, as it is made of torch's
            functions and of ops that it may.
        public: the function that users call, for messages; the op's name if it is the same.
    """

    setup_context: Callable[..., None]
    backward: Callable[..., Any]
    differentiable: bool = False
    public: str = ""


def transformed() -> bool:
    """Whether a transform of ``torch.func`` runs: grad, vmap, jvp and what is made of them."""
    return torch._C._are_functorch_transforms_active()


def _refusal(function: str, expected: str, got: str, remedy: str) -> RuntimeError:
    return RuntimeError(f"fastpo.{function}: backward: expected {expected}, got {got}. {remedy}")


def _second_derivative(function: str) -> RuntimeError:
    """The error of what would take a first derivative for a constant."""
    remedy = "Second derivatives are not implemented."
    return _refusal(function, "create_graph=False", "True", remedy)


def _no_derivative(function: str) -> RuntimeError:
    remedy = "Detach its inputs where they are constants."
    return _refusal(function, "an op with a derivative", "one without", remedy)


def _node(op: Callable, name: str, gradient: Gradient | None) -> type[_SingleLevelFunction]:
    """The class of the op's nodes in the graph of autograd."""
    public = (gradient and gradient.public) or name

    def forward(ctx, *inputs):
        # Autograd is off in here. It must not be for the transforms around this one, which come
        # back by the same way.
        with torch.set_grad_enabled(transformed()), torch._C._AutoDispatchBelowAutograd():
            output = op(*inputs)
        if gradient is not None:
            gradient.setup_context(ctx, inputs, output if isinstance(output, tuple) else (output,))
            if transformed() and not gradient.differentiable:
                ctx.of_transforms = [
                    x for x in inputs if isinstance(x, Tensor) and x.is_floating_point()
                ]
        return output

    def backward(ctx, *grads):
        if gradient is None:
            raise _no_derivative(public)
        if gradient.differentiable or not torch.is_grad_enabled():
            return gradient.backward(ctx, *grads)
        if not transformed():
            raise _second_derivative(public)
        # torch.func takes every gradient with create_graph=True, so nobody can know yet whether it
        # will be differentiated.
        found = gradient.backward(ctx, *grads)
        return tuple(None if x is None else _once(x, ctx.of_transforms, public) for x in found)

    functions = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(name, (_SingleLevelFunction,), functions)


def _refuse_tangents(function: str, tensors: list[Tensor]) -> None:
    if any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        remedy = "Use reverse mode: .backward(), torch.autograd.grad or torch.func.vjp."
        text = f"fastpo.{function}: expected no tangents, got forward mode (jvp). {remedy}"
        raise RuntimeError(text)


def register(
    schema: str, implementation: Callable, fake: Callable, gradient: Gradient | None = None
) -> Callable:
    """Define ``fastpo::<schema>`` for every device and return the callable op.

    ``Library.define`` with a plain implementation costs 15 us a call where ``custom_op`` costs 65.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.needs_fixed_stride_order,))
    LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastpo::{name}", fake, lib=LIBRARY)
    op = getattr(torch.ops.fastpo, name)
    node = _node(op.default, name, gradient)

    def autograd(*inputs):
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        if forward_ad._current_level >= 0:  # somebody has entered forward mode
            _refuse_tangents((gradient and gradient.public) or name, tensors)
        if not torch.is_grad_enabled() or not any(x.requires_grad for x in tensors):
            with torch._C._AutoDispatchBelowAutograd():
                return op.default(*inputs)
        if op.default._schema.is_mutable:
            raise _no_derivative(name)
        with enable_single_level_autograd_function() if transformed() else nullcontext():
            return node.apply(*inputs)

    LIBRARY.impl(name, autograd, "Autograd")
    return op


def _setup_once(ctx, inputs, outputs) -> None:
    ctx.function = inputs[2]


def _backward_once(ctx, grad):
    raise _second_derivative(ctx.function)


_depend = register(
    "first_derivative(Tensor grad, Tensor input, str function) -> Tensor",
    lambda grad, *_: grad.clone(),
    lambda grad, *_: torch.empty_like(grad),
    Gradient(_setup_once, _backward_once, differentiable=True),
)


def _once(grad: Tensor, inputs: list[Tensor], function: str) -> Tensor:
    """A gradient that depends on the inputs, so that its own derivative is an error."""
    for x in inputs:
        grad = _depend(grad, x, function)
    return grad
