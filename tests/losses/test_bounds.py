"""What is held within bounds has one gradient at a bound, whatever the version of torch."""

import pytest
import torch
from loss_rows import collect
from method_arguments import ARGUMENTS, kind

from fastpo import diffusion, losses, methods
from fastpo.bounds import hold

# Recipes are whole runs; what they call has rows of its own.
CALLS = {
    str(entry): entry
    for row in methods.rows()
    for entry in row.entry_points
    if not entry.name.startswith("recipes.")
}
ROWS = collect()


def test_values_are_those_of_clamp():
    x = torch.tensor([-torch.inf, -2, -1, -0.5, 0, 0.5, 1, 2, torch.inf, torch.nan])
    for bounds in ((-1.0, torch.inf), (-torch.inf, 1.0), (-1.0, 1.0)):
        torch.testing.assert_close(
            hold(x, *bounds), x.clamp(*bounds), rtol=0, atol=0, equal_nan=True
        )


def test_gradient_is_one_at_the_bounds():
    x = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0, torch.nan], requires_grad=True)
    for bounds in ((-1.0, 1.0), (torch.full((6,), -1.0), torch.full((6,), 1.0))):
        (grad,) = torch.autograd.grad(hold(x, *bounds).sum(), x)
        assert grad.tolist() == [0, 1, 1, 1, 0, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mapo_where_its_two_forms_meet(dtype):
    # 1 - sigmoid(1 - phi(x)) phi'(x) at x = 0.1, phi(x) = x / (exp(x) - 1).
    chosen = torch.tensor([0.1], dtype=dtype, requires_grad=True)
    rejected = torch.zeros(1, dtype=dtype)
    diffusion.losses.mapo(chosen, rejected, beta=1.0, snr=1.0, timesteps=1).loss.backward()
    assert chosen.grad.item() == pytest.approx(1.247609304191948, rel=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_rloo_at_its_bounds(advantage):
    # The clipped branch equals the other one there: the gradient is that of r A.
    advantages = torch.full((2,), advantage, dtype=torch.float64)
    policy = torch.tensor([0.5, 2.0], dtype=torch.float64).log().requires_grad_()
    ratios = policy.detach().exp()
    low, high = 1 - ratios[0].item(), ratios[1].item() - 1
    out = losses.rloo(
        policy, torch.zeros(2), advantages, clip_low=low, clip_high=high, reduction="sum"
    )
    (grad,) = torch.autograd.grad(out.loss, policy)
    torch.testing.assert_close(grad, -ratios * advantage)


def names_of_nodes(result) -> set[str]:
    """What autograd has recorded between a result, however nested, and the inputs."""
    if isinstance(result, dict | list | tuple):
        parts = result.values() if isinstance(result, dict) else result
        return set().union(*map(names_of_nodes, parts))
    found, waiting = set(), [getattr(result, "grad_fn", None)]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [above for above, _ in node.next_functions]
    return {node.name() for node in found}


def takes_a_gradient_of_clamp(result) -> bool:
    return any(name.startswith(("Clamp", "Hardtanh")) for name in names_of_nodes(result))


def test_the_walk_finds_a_clamp():
    x = torch.ones(3, requires_grad=True)
    assert takes_a_gradient_of_clamp({"a": (x, [2 * x.clamp(max=1)])})


@pytest.mark.parametrize("name", CALLS)
def test_no_method_takes_a_gradient_of_clamp(name):
    entry = CALLS[name]
    given = [*zip(entry.arguments, entry.arguments, strict=True), *entry.named.items()]
    inputs = [ARGUMENTS[kind(entry.name, *names)]() for names in given]
    for i, given in enumerate(inputs):
        if not (isinstance(given, torch.Tensor) and given.is_floating_point()):
            continue
        arguments = [*inputs[:i], given.detach().clone().requires_grad_(), *inputs[i + 1 :]]
        named = dict(zip(entry.named, arguments[len(entry.arguments) :], strict=True))
        try:
            result = entry.load()(*arguments[: len(entry.arguments)], **named, **entry.options)
        except ValueError as error:
            assert "expected a constant" in str(error)  # noqa: PT017 (others say which they take)
            continue
        assert not takes_a_gradient_of_clamp(result)


@pytest.mark.parametrize("name", ROWS)
def test_no_loss_takes_a_gradient_of_clamp(name):
    sums = [(-1 - 20 * torch.rand(3)).requires_grad_() for _ in range(4)]
    assert not takes_a_gradient_of_clamp(ROWS[name].call(*sums, *[torch.full((3,), 5)] * 2))
