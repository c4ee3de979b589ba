"""What holds for every op and every public function of tensors that has a gradient.

The gradient is the only derivative, unless an op says otherwise: a second one and forward mode are
errors, never wrong numbers. What is returned may be written into.
"""

from __future__ import annotations

import pytest
import torch
from documented import calls, change, functions, tensors
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import fastpo

REFUSAL = r"fastpo\..*(Second derivatives|forward mode)"


class Sample:
    """One call of a function: its tensors, those that may have a gradient, and how to call it."""

    def __init__(self, function, args, kwargs):
        self.function, self.nest = function, (args, kwargs)
        self.given = [
            x.detach().double() if x.is_floating_point() else x for x in tensors(self.nest)
        ]
        floats = [i for i, x in enumerate(self.given) if x.is_floating_point()]
        # Some inputs are refused with a gradient, as none flows there.
        self.wanted = floats if self._gives(floats) else [i for i in floats if self._gives([i])]
        self.wanted = [i for i in self.wanted if self._gradients([i], self.call)[1][0] is not None]

    def inputs(self, wanted):
        return [x.clone().requires_grad_(i in wanted) for i, x in enumerate(self.given)]

    def call(self, inputs):
        torch.manual_seed(0)
        placed = iter(inputs)
        args, kwargs = change(self.nest, lambda _: next(placed))
        return tensors(self.function(*args, **kwargs))

    def _gives(self, wanted):
        try:
            return any(x.requires_grad for x in self.call(self.inputs(wanted)))
        except ValueError as error:
            assert "constant" in str(error)
            return False

    def _gradients(self, wanted, call, **options):
        """Outputs, and gradients of their weighted sum."""
        inputs = self.inputs(wanted)
        outputs = [x for x in call(inputs) if x.requires_grad]
        if not outputs:
            return [], [None] * len(wanted)
        total = sum((x * _weights(x)).sum() for x in outputs)
        asked = [inputs[i] for i in wanted]
        return outputs, torch.autograd.grad(total, asked, allow_unused=True, **options)

    def gradients(self, call=None, **options):
        return self._gradients(self.wanted, call or self.call, **options)


def _weights(output: Tensor) -> Tensor:
    """Different ones for every element, without random numbers."""
    return torch.linspace(0.5, 1.5, output.numel(), dtype=output.dtype).view(output.shape)


def _samples(name):
    return [Sample(functions()[name], *call) for call in calls(name)[:2]]


@pytest.fixture(params=list(functions()))
def samples(request):
    """Calls of one function whose result has a gradient."""
    if request.param == "fastpo.diffusion.accumulate":
        return []  # runs its own backward
    return [sample for sample in _samples(request.param) if sample.wanted]


def test_every_public_function_has_an_example():
    assert len(functions()) > 200
    assert [name for name in functions() if not calls(name)] == []


def test_forward_mode_agrees_or_is_refused(samples):
    for sample in samples:
        outputs, gradients = sample.gradients()
        backward = sum(g.sum() for g in gradients)
        with forward_ad.dual_level():
            inputs = sample.inputs([])
            for i in sample.wanted:
                inputs[i] = forward_ad.make_dual(inputs[i], torch.ones_like(inputs[i]))
            try:
                found = sample.call(inputs)
            except RuntimeError as error:
                assert "forward mode" in str(error), error  # noqa: PT017
                continue
            tangents = [forward_ad.unpack_dual(x).tangent for x in found]
        forward = sum((t * _weights(t)).sum() for t in tangents if t is not None)
        torch.testing.assert_close(forward, backward)


def _write(tensor: Tensor) -> None:
    """Zeros into every second element."""
    mask = torch.arange(tensor.numel()).view(tensor.shape) % 2 == 0
    tensor[mask] = 0


def test_what_is_returned_may_be_written_into(samples):
    for sample in samples:
        outputs, plain = sample.gradients()
        for written in [i for i, x in enumerate(outputs) if not x.is_leaf]:

            def in_place(inputs, written=written):
                found = [x for x in sample.call(inputs) if x.requires_grad]
                _write(found[written])
                return found

            def out_of_place(inputs, written=written):
                found = [x for x in sample.call(inputs) if x.requires_grad]
                mask = torch.arange(found[written].numel()).view(found[written].shape) % 2 == 0
                found[written] = found[written].masked_fill(mask, 0)
                return found

            _, expected = sample.gradients(out_of_place)
            _, got = sample.gradients(in_place)
            for x, y in zip(got, expected, strict=True):
                assert (x is None) == (y is None)
                assert x is None or torch.equal(x, y)

        def others(inputs):
            found = sample.call(inputs)
            for x in found:
                if not x.requires_grad and all(x is not given for given in inputs):
                    x.zero_()
            return found

        _, got = sample.gradients(others)
        assert all(torch.equal(x, y) for x, y in zip(got, plain, strict=True))
