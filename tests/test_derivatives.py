"""What holds for every op and every public function of tensors that has a gradient.

The gradient is the only derivative, unless an op says otherwise: a second one and forward mode are
errors, never wrong numbers. What is returned may be written into.
"""

from __future__ import annotations

import re

import pytest
import torch
from documented import Ops, calls, change, functions, tensors
from torch import Tensor
from torch.autograd import forward_ad

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
            if "constant" not in str(error):
                raise
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


def _is_float(value) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


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


def _all_ops():
    names = {name.partition(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    return {name for name in names if name.startswith("fastpo::")}


@pytest.fixture(scope="module")
def recorded_ops():
    """Every op with arguments from the examples, and from calls that those leave out."""
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(4, 3), torch.randn(7, 3), torch.arange(4)
    trained = weight.clone().requires_grad_()
    outputs = ("logprobs", "lse", "entropy")
    logits = torch.randn(4, 7, requires_grad=True)
    with Ops() as recorder:
        for name in functions():
            for sample in _samples(name) if name != "fastpo.diffusion.accumulate" else ():
                sample.gradients() if sample.wanted else sample.call(sample.inputs([]))
        stats = fastpo.linear_token_stats(hidden, trained, targets, outputs=outputs)
        (stats.logprobs + stats.lse + stats.entropy).sum().backward()
        fastpo.linear_nll(hidden, trained, targets).backward()
        fastpo.linear_divergence(hidden, trained, hidden + 1).sum().backward()
        fastpo.logprobs(logits * 1, targets, inplace_backward=True).sum().backward()
    assert set(recorder.calls) | {"fastpo::first_derivative"} == _all_ops(), "an op without a call"
    return recorder.calls


@pytest.mark.parametrize("name", sorted(_all_ops() - {"fastpo::first_derivative"}))
def test_op_is_differentiated_once_or_exactly(name, recorded_ops):
    op, arguments = recorded_ops[name]
    given = [x.detach().double() if _is_float(x) else x for x in arguments]
    given = [torch.float64 if x is torch.float32 else x for x in given]
    floats = [i for i, x in enumerate(given) if _is_float(x) and x.numel()]
    for i in floats:
        with forward_ad.dual_level():
            dual = [*given]
            dual[i] = forward_ad.make_dual(given[i], torch.ones_like(given[i]))
            with pytest.raises(RuntimeError, match=REFUSAL):
                op(*dual)

    def call(*inputs):
        placed = [*given]
        for i, x in zip(floats, inputs, strict=True):
            placed[i] = x
        outputs = op(*placed)
        outputs = outputs if isinstance(outputs, (tuple, list)) else (outputs,)
        return tuple(x for x in outputs if x is not None and x.requires_grad and x.numel())

    inputs = [given[i].clone().requires_grad_() for i in floats]
    if op._schema.is_mutable:
        with pytest.raises(RuntimeError, match="an op with a derivative"):
            call(*inputs)
        return
    outputs = call(*inputs)
    try:
        total = sum((x * _weights(x)).sum() for x in outputs)
        torch.autograd.grad(total, inputs, create_graph=True, allow_unused=True)
    except RuntimeError as error:
        assert re.search(r"fastpo\..*(Second derivatives|expected an op with)", str(error))  # noqa: PT017
    else:
        assert torch.autograd.gradcheck(call, inputs)
        assert torch.autograd.gradgradcheck(call, inputs)


def test_every_public_function_has_an_example():
    assert len(functions()) > 200
    assert [name for name in functions() if not calls(name)] == []


def test_forward_mode_agrees_or_is_refused(samples):
    for sample in samples:
        backward = sum(g.sum() for g in sample.gradients()[1])
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


def _mask(tensor: Tensor) -> Tensor:
    """Every second element."""
    return torch.arange(tensor.numel()).view(tensor.shape) % 2 == 0


def _write_into_constants(sample):
    """The call, with all that it returns without a gradient set to 0."""

    def call(inputs):
        found = sample.call(inputs)
        for x in found:
            if not x.requires_grad and all(x is not given for given in inputs):
                x.zero_()
        return found

    return call


def _write_into(sample, output, *, in_place):
    """The call, with zeros in one of the outputs that have a gradient."""

    def call(inputs):
        found = [x for x in sample.call(inputs) if x.requires_grad]
        written = found[output]
        if in_place:
            written[_mask(written)] = 0
        else:
            found[output] = written.masked_fill(_mask(written), 0)
        return found

    return call


def test_what_is_returned_may_be_written_into(samples):
    for sample in samples:
        outputs, expected = sample.gradients()
        pairs = [(expected, _write_into_constants(sample))]
        for i, x in enumerate(outputs):
            if not x.is_leaf:  # an input, as it came
                masked = sample.gradients(_write_into(sample, i, in_place=False))[1]
                pairs.append((masked, _write_into(sample, i, in_place=True)))
        for plain, call in pairs:
            for x, y in zip(sample.gradients(call)[1], plain, strict=True):
                assert (x is None) == (y is None)
                assert x is None or torch.equal(x, y)


def test_sums_over_sequences_have_all_derivatives():
    x = torch.randn(1, 2, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(fastpo.sequence_sums(x) ** 2, x, create_graph=True)
    (row,) = torch.autograd.grad(first[0, 0], x)
    assert row.tolist() == [[2.0, 2.0]]
    hessian = torch.autograd.functional.hessian
    assert hessian(lambda v: fastpo.sequence_means(v).pow(2).sum(), x).sum() == 2
    values, reference, weights = (
        torch.randn(6, dtype=torch.float64, requires_grad=True) for _ in range(3)
    )
    offsets, mask = torch.tensor([1, 4, 6]), torch.tensor([1, 1, 0, 1, 1, 1]).bool()

    def log_ratios(*given):
        *tensors, weights = given
        return fastpo.sequence_log_ratios(*tensors, mask, offsets, weights)

    assert torch.autograd.gradgradcheck(log_ratios, (values, reference, weights))


def _functions_of_hidden():
    weight, targets = torch.randn(9, 4), torch.arange(3)
    trained = weight.clone().requires_grad_()
    outputs = ("logprobs", "entropy")
    return {
        "frozen": lambda h: fastpo.linear_logprobs(h, weight, targets),
        "trained": lambda h: fastpo.linear_logprobs(h, trained, targets),
        "stats": lambda h: fastpo.linear_token_stats(h, weight, targets, outputs=outputs).entropy,
        "nll": lambda h: fastpo.linear_nll(h, trained, targets),
        "logits": lambda h: fastpo.logprobs(h @ weight.T, targets),
        "linear_divergence": lambda h: fastpo.linear_divergence(h, weight, weight[:3]),
        "divergence": lambda h: fastpo.divergence(h, weight[:3]),
        "policy_loss": lambda h: fastpo.policy_loss(h, weight[:3, 0]).loss,
        "noise_errors": lambda h: fastpo.noise_errors(h, weight[:3]),
    }


# vmap calls the ops once per sample, and says so.
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", _functions_of_hidden())
def test_transforms_of_torch_func(name):
    torch.manual_seed(0)
    function, hidden = _functions_of_hidden()[name], torch.randn(3, 4)

    def total(h):
        return function(h).sum()

    plain = hidden.clone().requires_grad_()
    (expected,) = torch.autograd.grad(total(plain), plain)
    torch.testing.assert_close(torch.func.grad(total)(hidden), expected)
    both = torch.stack([hidden, hidden + 1])
    values = torch.stack([function(h) for h in both])
    torch.testing.assert_close(torch.func.vmap(function)(both), values)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(total))(both)[0], expected)
    with pytest.raises(RuntimeError, match="forward mode"):
        torch.func.jvp(function, (hidden,), (hidden,))
    with pytest.raises(RuntimeError, match="Second derivatives"):
        torch.func.grad(lambda h: torch.func.grad(total)(h).square().sum())(hidden)
    # The inner gradient is of the transform, the outer one of plain autograd.
    with pytest.raises(RuntimeError, match="Second derivatives"):
        torch.func.grad(total)(plain).square().sum().backward()
    with pytest.raises(RuntimeError, match="Second derivatives"):
        torch.autograd.grad(total(plain), plain, create_graph=True)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputed_activations(use_reentrant):
    weight, targets = torch.randn(9, 4), torch.arange(3)
    hidden = torch.randn(3, 4, requires_grad=True)

    def function(h):
        return fastpo.linear_logprobs(h * 2, weight, targets)

    plain = torch.autograd.grad(function(hidden).sum(), hidden)[0]
    checkpointed = torch.utils.checkpoint.checkpoint(function, hidden, use_reentrant=use_reentrant)
    checkpointed.sum().backward()
    torch.testing.assert_close(hidden.grad, plain)
