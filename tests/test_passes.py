"""Matrix passes (2 N H V FLOP over active tokens) of every plan, by torch's own FLOP counter."""

from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastpo
import fastpo.flops
from fastpo import plans

N, H, V = 64, 16, 640
PASS = 2 * N * H * V
TILE = 4 * N * 128  # bytes of the narrowest tile: nothing is left to keep logits in


@pytest.fixture
def passes(monkeypatch):
    """Passes of a call, counted on each product inside the ops; they must be what ops declare."""
    done = []
    multiply = plans.multiply

    def counted(*arguments, **options):
        with FlopCounterMode(display=False) as counter:
            multiply(*arguments, **options)
        done.append(counter.get_total_flops())

    def count(function):
        done.clear()
        with FlopCounterMode(display=False) as counter:
            function()
        assert sum(done) == counter.get_total_flops()
        return sum(done) / PASS

    monkeypatch.setattr(plans, "multiply", counted)
    return count


def inputs(trained, ignored=0, dtype=torch.float32):
    hidden = torch.randn(N, H, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, H, dtype=dtype, requires_grad=trained)
    targets = torch.randint(V, (N,))
    targets[:ignored] = -100
    return hidden, weight, targets


@pytest.mark.parametrize("ignored", [0, N // 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_a_gradient_one(passes, dtype, ignored):
    with torch.no_grad():
        count = passes(lambda: fastpo.linear_logprobs(*inputs(False, ignored, dtype)))
    assert count == 1 - ignored / N


@pytest.mark.parametrize("ignored", [0, N // 2])
@pytest.mark.parametrize(("trained", "expected"), [(False, 2), (True, 4)])
def test_with_a_gradient(passes, trained, expected, ignored):
    def step():
        logprobs = fastpo.linear_logprobs(*inputs(trained, ignored), workspace_bytes=TILE)
        logprobs.sum().backward()

    assert passes(step) == expected * (1 - ignored / N)


def test_trained_with_the_logits_kept_three_and_in_between(passes, monkeypatch):
    def step(workspace_bytes):
        logprobs = fastpo.linear_logprobs(*inputs(True), workspace_bytes=workspace_bytes)
        logprobs.sum().backward()

    logits_bytes = 4 * N * V
    monkeypatch.setattr(plans, "_COLUMNS", {"cpu": 128})
    assert passes(lambda: step(TILE)) == 4
    assert passes(lambda: step(TILE + logits_bytes // 5 * 2)) == 3.6
    assert passes(lambda: step(TILE + logits_bytes)) == 3


def test_frozen_head_is_never_multiplied_twice_for_two_losses(passes):
    def step():
        logprobs = fastpo.linear_logprobs(*inputs(False))
        (logprobs.mean() + logprobs[::2].exp().sum()).backward()

    assert passes(step) == 2


@pytest.mark.parametrize(("hint", "expected"), [(None, 4), (("logprobs", "entropy"), 3)])
def test_frozen_head_with_an_entropy_gradient(passes, hint, expected):
    def step():
        stats = fastpo.linear_token_stats(
            *inputs(False),
            outputs=("logprobs", "entropy"),
            differentiable=hint,
            workspace_bytes=TILE,
        )
        (stats.logprobs + stats.entropy).sum().backward()

    assert passes(step) == expected


def test_entropy_that_is_only_logged_costs_nothing(passes):
    def step():
        stats = fastpo.linear_token_stats(*inputs(False), outputs=("logprobs", "entropy"))
        stats.logprobs.sum().backward()

    assert passes(step) == 2


@pytest.mark.parametrize("trained", [False, True])
def test_rows_without_an_upstream_gradient_are_dropped(passes, trained):
    upstream = torch.zeros(N)
    upstream[: N // 4] = 1.0

    def step():
        fastpo.linear_logprobs(*inputs(trained), workspace_bytes=TILE).backward(upstream)

    assert passes(step) == (1 + 3 / 4 if trained else 2)


def test_lora_on_a_frozen_head(passes):
    """Three passes, and the rank's share: 1 of it forward, 1 recomputed, 2 backward."""
    r = 4

    def step():
        hidden, weight, targets = inputs(False)
        a = torch.randn(r, H, requires_grad=True)
        b = torch.randn(V, r, requires_grad=True)
        lora = fastpo.LoRA(a, b)
        logprobs = fastpo.linear_logprobs(hidden, weight, targets, lora=lora, workspace_bytes=TILE)
        logprobs.sum().backward()

    through_b, through_a = 4 * 2 * N * V * r, 4 * 2 * N * H * r
    assert passes(step) * PASS == 3 * PASS + through_b + through_a


@pytest.mark.parametrize(
    ("trained", "dtype", "workspace_bytes", "expected"),
    [
        (True, torch.float32, None, 3),
        (True, torch.bfloat16, None, 3),  # all logits fit
        (True, torch.bfloat16, 4 * V * 8, 4),  # no float32 buffer for dW: recomputed
        (False, torch.float32, None, 2),
    ],
)
def test_nll(passes, trained, dtype, workspace_bytes, expected):
    def step():
        arguments = inputs(trained, dtype=dtype)
        fastpo.linear_nll(*arguments, workspace_bytes=workspace_bytes).backward()

    assert passes(step) == expected


def divergence(wanted, *, workspace_bytes=1, upstream=None, shared=False, **options):
    """Forward and, if anything is wanted, backward; heads and hidden states of one size."""
    sizes = {"hidden": (N, H), "weight": (V, H), "ref_hidden": (N, H), "ref_weight": (V, H)}
    if shared:
        del sizes["ref_weight"]
    tensors = {k: torch.randn(size, requires_grad=k in wanted) for k, size in sizes.items()}
    values = fastpo.linear_divergence(**tensors, workspace_bytes=workspace_bytes, **options)
    if wanted:
        values.backward(torch.ones(N) if upstream is None else upstream)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("masked", [0, N // 4])
@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ((), 2),
        (("hidden",), 3),
        (("ref_hidden",), 3),
        (("hidden", "ref_hidden"), 4),
        (("weight",), 5),
        (("hidden", "weight"), 6),
        (("hidden", "weight", "ref_hidden", "ref_weight"), 8),
    ],
)
def test_divergence(passes, wanted, expected, masked, shared):
    mask = torch.ones(N, dtype=torch.bool)
    mask[:masked] = False
    if shared and "ref_weight" in wanted:
        wanted, expected = wanted[:-1], expected - 1
    count = passes(lambda: divergence(wanted, mask=mask, shared=shared))
    assert count == expected * (1 - masked / N)


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [(("hidden", "weight"), 4), (("hidden", "weight", "ref_hidden", "ref_weight"), 6)],
)
def test_divergence_with_the_logits_kept(passes, monkeypatch, wanted, expected):
    monkeypatch.setattr(plans, "_COLUMNS", {"cpu": 128})
    row, tile = 2 * 4 * V, 2 * TILE
    enough = N * row + tile
    assert passes(lambda: divergence(wanted, workspace_bytes=enough)) == expected
    # Else rows are kept by 16.
    some = 16 * row + tile
    for workspace_bytes, share in ((enough - 1, 1 / 4), (some, 3 / 4), (some - 1, 1)):
        count = passes(partial(divergence, wanted, workspace_bytes=workspace_bytes))
        assert count == expected + 2 * share


def test_divergence_with_the_logits_of_some_tokens_kept(passes, monkeypatch):
    """Of those tokens that are neither masked nor without a gradient, the first."""
    monkeypatch.setattr(plans, "_COLUMNS", {"cpu": 128})
    mask, upstream = torch.ones(N, dtype=torch.bool), torch.ones(N)
    mask[8:16] = False  # rows 0-7 and 16-39 are kept: 32 of 56
    upstream[32:48] = 0  # with a gradient: 24 that are kept and 16 others
    options = {"mask": mask, "upstream": upstream, "workspace_bytes": 2 * (32 * 4 * V + TILE)}
    count = passes(lambda: divergence(("hidden", "weight"), **options))
    assert count == (2 * 56 + 2 * 40 + 2 * 16) / N


@pytest.mark.parametrize(("wanted", "expected"), [(("hidden",), 3), (("hidden", "weight"), 3)])
def test_divergence_rows_without_an_upstream_gradient(passes, wanted, expected):
    """With frozen heads the gradient is there before it is known which rows are asked for."""
    upstream = torch.zeros(N)
    upstream[: N // 4] = 1.0
    assert passes(lambda: divergence(wanted, upstream=upstream)) == expected


def test_divergence_with_a_lora(passes):
    """Five passes; of the rank's, through B and through A: 2 forward, 2 again and 4 backward."""
    r = 4
    through_b, through_a = 4 * 2 * N * V * r, 4 * 2 * N * H * r

    def step():
        a = torch.randn(r, H, requires_grad=True)
        b = torch.randn(V, r, requires_grad=True)
        divergence(("hidden",), lora=fastpo.LoRA(a, b), shared=True)

    assert passes(step) * PASS == 5 * PASS + through_b + through_a
