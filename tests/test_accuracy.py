"""Errors against float64 that people would notice: bf16 inputs, confident tokens, long sums."""

import pytest
import torch

import fastpo


def truth(hidden, weight, targets, upstream=1.0):
    hidden = hidden.double().requires_grad_()
    logprobs = (hidden @ weight.double().t()).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    (upstream * logprobs).sum().backward()
    return logprobs.detach(), hidden.grad


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_bf16_logprobs(device, scale):
    N, H, V = 1024, 256, 8192
    hidden = torch.randn(N, H, device=device).bfloat16()
    weight = (torch.randn(V, H, device=device) * 3 * scale / H**0.5).bfloat16()
    targets = torch.randint(V, (N,), device=device)
    out = fastpo.linear_logprobs(hidden, weight, targets)
    wanted, _ = truth(hidden, weight, targets)
    error = out.double() - wanted
    assert out.dtype == torch.float32
    assert error.square().mean().sqrt() < 1e-4
    assert error.sum().abs() < 1e-3  # nats, over a sequence of 1024 tokens
    assert (out <= 0).all()


@pytest.mark.parametrize("p", [0.5, 0.9, 0.99, 0.999, 0.9999])
@pytest.mark.parametrize("trained", [False, True])
def test_bf16_hidden_gradient_of_confident_tokens(device, p, trained):
    N, H, V = 64, 256, 4096
    weight = (torch.randn(V, H, device=device) / H**0.5).bfloat16()
    targets = torch.randint(V, (N,), device=device)
    hidden = torch.randn(N, H, device=device).bfloat16()
    direction = weight[targets].double()
    direction = direction / direction.norm(dim=1, keepdim=True)
    low, high = (
        torch.zeros(N, 1, device=device).double(),
        torch.full((N, 1), 200.0, device=device).double(),
    )
    for _ in range(40):  # how far along its word's row each token has this probability
        middle = (low + high) / 2
        moved = (hidden.double() + middle * direction).bfloat16()
        enough = truth(moved, weight, targets)[0][:, None].exp() > p
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    moved = (hidden.double() + high * direction).bfloat16().requires_grad_()
    weight.requires_grad_(trained)
    # Any upstream gradient: the product with it must not round a second time.
    upstream = torch.randn(N, device=device)
    fastpo.linear_logprobs(moved, weight, targets).backward(upstream)
    _, wanted = truth(moved.detach(), weight.detach(), targets, upstream)
    error = (moved.grad.double() - wanted).norm(dim=1) / wanted.norm(dim=1)
    assert error.median() < 2e-3, error
