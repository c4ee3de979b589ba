"""What is no plain tensor on a device with kernels is refused by name, in every public function."""

from __future__ import annotations

import inspect

import pytest
import torch
from documented import Ops, calls, change, functions
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastpo
from fastpo.diffusion import Target

RUNS_ITS_OWN = "fastpo.diffusion.accumulate"  # takes functions


def _lists_and_arrays(tensor: Tensor):
    """What people have in hand in the place of a tensor."""
    tensor = tensor.detach()
    return (tensor.tolist(), tensor.numpy(), nn.Linear(2, 2))


@pytest.mark.parametrize("name", [name for name in functions() if name != RUNS_ITS_OWN])
def test_what_is_no_tensor_is_refused_by_name(name):
    function = functions()[name]
    args, kwargs = calls(name)[0]
    signature = inspect.signature(function)
    given = signature.bind(*args, **kwargs).arguments
    for argument, value in given.items():
        if not isinstance(value, Tensor):
            continue
        is_required = signature.parameters[argument].default is inspect.Parameter.empty
        for other in (*_lists_and_arrays(value), *([None] if is_required else [])):
            bound = signature.bind(*args, **kwargs)
            bound.arguments[argument] = other
            with pytest.raises(ValueError, match=r"fastpo\..*expected .*, got .*\. \w") as raised:
                function(*bound.args, **bound.kwargs)
            assert f"{argument}:" in str(raised.value) or "groups:" in str(raised.value)


def _functions_with_ops():
    found = []
    for name in functions():
        if name == RUNS_ITS_OWN:
            continue
        args, kwargs = calls(name)[0]
        with Ops() as ops:
            functions()[name](*args, **kwargs)
        found += [name] if ops.calls else []
    return found


@pytest.mark.parametrize("device", ["mps", "xpu"])
def test_devices_without_kernels_are_refused(device):
    names = _functions_with_ops()
    assert len(names) > 30
    for name in names:
        args, kwargs = calls(name)[0]
        with FakeTensorMode():  # there is no such device here
            args, kwargs = change(
                (args, kwargs), lambda x: torch.empty(x.shape, dtype=x.dtype, device=device)
            )
            with pytest.raises(ValueError, match=rf"tensor on cpu or cuda, got .*{device}"):
                functions()[name](*args, **kwargs)


HIDDEN, TARGETS = torch.randn(3, 8), torch.arange(3)
HEADS = {
    "logprobs": lambda weight: fastpo.linear_logprobs(HIDDEN, weight, TARGETS),
    "stats": lambda weight: fastpo.linear_token_stats(HIDDEN, weight, TARGETS),
    "nll": lambda weight: fastpo.linear_nll(HIDDEN, weight, TARGETS),
    "divergence": lambda weight: fastpo.linear_divergence(HIDDEN, weight, HIDDEN),
    "reference": lambda weight: fastpo.linear_divergence(
        HIDDEN, torch.randn(20, 8), HIDDEN, weight
    ),
}


class Params4bit(nn.Parameter):
    """As bitsandbytes has it: bytes [V * H / 2, 1], and how they were made."""

    quant_state = "nf4"


def _scattered():
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        return torch.distributed.tensor.distribute_tensor(torch.randn(20, 8), mesh)
    finally:
        torch.distributed.destroy_process_group()


def _subclass():
    from torch.testing._internal.two_tensor import TwoTensor

    return TwoTensor(torch.randn(20, 8), torch.randn(20, 8))


BAD_HEADS = {
    "linear": (lambda: nn.Linear(8, 20), r"got a Linear. Pass its .weight, and its .bias as bias"),
    "module": (lambda: nn.ReLU(), r"got a ReLU. Pass the tensor that it holds"),
    "4bit": (
        lambda: Params4bit(torch.zeros(80, 1, dtype=torch.uint8), requires_grad=False),
        r"a plain tensor, got a quantised one \(Params4bit.*Leave this layer out",
    ),
    "8bit": (
        lambda: nn.Parameter(torch.zeros(20, 8, dtype=torch.int8), requires_grad=False),
        r"got a quantised one \(Parameter, torch.int8.*dequantised",
    ),
    "bytes": (lambda: torch.zeros(20, 8, dtype=torch.uint8), r"float32.*got torch.uint8.*Cast"),
    "float8": (lambda: torch.zeros(20, 8).to(torch.float8_e4m3fn), r"float32.*got torch.float8"),
    "distributed": (_scattered, r"got a DTensor.*full_tensor\(\)"),
    "subclass": (_subclass, r"got a TwoTensor, made of other tensors.*dequantised"),
    "transposed": (lambda: torch.randn(8, 20), r"one hidden size H.*do not transpose"),
}


@pytest.mark.parametrize("kind", BAD_HEADS)
@pytest.mark.parametrize("function", HEADS)
def test_heads_that_are_no_weight(function, kind):
    make, message = BAD_HEADS[kind]
    with pytest.raises(ValueError, match=rf"fastpo\.linear_\w+: .*{message}"):
        HEADS[function](make())


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (nn.Linear(2, 2), r"expected a fastpo.LoRA, got a Linear. Pass fastpo.LoRA\("),
        (fastpo.LoRA(nn.Linear(8, 2), torch.randn(20, 2)), r"lora\.a: .*got a Linear.*\.weight"),
        (
            fastpo.LoRA(torch.randn(2, 8), torch.randn(20, 2), {"default": 2.0}),
            "lora.scaling.*peft",
        ),
    ],
)
def test_factors_that_are_none(lora, message):
    with pytest.raises(ValueError, match=message):
        fastpo.linear_logprobs(HIDDEN, torch.randn(20, 8), TARGETS, lora=lora)
    with pytest.raises(ValueError, match=message):
        fastpo.linear_divergence(HIDDEN, torch.randn(20, 8), HIDDEN, lora=lora)


@pytest.mark.parametrize(
    "call",
    [
        lambda targets: fastpo.linear_logprobs(HIDDEN, torch.randn(20, 8), targets),
        lambda targets: fastpo.linear_nll(HIDDEN, torch.randn(20, 8), targets),
        lambda targets: fastpo.logprobs(HIDDEN, targets),
    ],
)
def test_targets_with_a_dimension_too_many(call):
    with pytest.raises(
        ValueError, match=r"targets: expected shape \(3,\).*\(3, 1\). Call .squeeze\(-1\)"
    ):
        call(TARGETS[:, None])
    with pytest.raises(ValueError, match=r"got \(1, 3\). Call .squeeze\(0\)"):
        call(TARGETS[None])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": Target([0.0])}, r"target: expected a tensor, got a list.*as_tensor"),
        ({"target": [[0.0]]}, r"target: expected a tensor or a Target, got a list"),
        ({"target": Target(HIDDEN, [1.0, 1.0, 1.0])}, r"target.first_scale: .*got a list.*tensor"),
        ({"scale": [1.0, 1.0, 1.0]}, r"scale: expected a number or a tensor, got a list"),
        ({"scale": "1"}, r"scale: expected a number or a tensor, got a str"),
        ({"scale": torch.ones(3, 1)}, r"scale: expected \[3\] or one number, got \[3, 1\]"),
        ({"mask": [True]}, r"mask: expected a tensor, got a list"),
    ],
)
def test_errors_of_noise(arguments, message):
    given = {"target": HIDDEN} | arguments
    with pytest.raises(ValueError, match=rf"fastpo\.diffusion\.noise_errors: {message}"):
        fastpo.noise_errors(HIDDEN, **given)
