"""``linear_nll``: three passes when the weight is trained, and the same numbers as plain torch."""

import pytest
import torch
import torch.nn.functional as F
from test_linear import leaves, problem
from tolerance import assert_close_to_truth

import fastpo


def plain_nll(hidden, weight, bias, targets, reduction, weights):
    z = F.linear(hidden, weight, bias)
    log_p = z.log_softmax(-1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    factors = (targets != -100).to(log_p.dtype)
    if weights is not None:
        factors = factors * weights.to(log_p.dtype)
    loss = -(factors * log_p).sum()
    return loss / factors.sum() if reduction == "mean" else loss


# Everything in one tile; several tiles; more vocabulary than a tile of enough rows holds.
@pytest.mark.parametrize("workspace_bytes", [1 << 20, 157 * 8 * 7, 64])
@pytest.mark.parametrize("frozen", [("weight", "bias"), ("bias",), ()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_loss_and_gradients(device, monkeypatch, dtype, frozen, workspace_bytes):
    monkeypatch.setattr("fastpo.nll._FEWEST_ROWS", 4)
    tensors, targets = problem(dtype, device)
    weights = torch.rand(targets.shape, device=device)
    for reduction in ("mean", "sum"):
        for given in (None, weights):
            results = []
            for kind in (torch.float64, dtype):
                inputs = leaves(tensors, kind, frozen)
                loss = plain_nll(**inputs, targets=targets, reduction=reduction, weights=given)
                (3 * loss).backward()
                results.append((loss, inputs))
            inputs = leaves(tensors, dtype, frozen)
            out = fastpo.linear_nll(
                **inputs, targets=targets, reduction=reduction, weights=given,
                workspace_bytes=workspace_bytes,
            )  # fmt: skip
            (3 * out).backward()
            (truth, truth_inputs), (base, base_inputs) = results
            assert_close_to_truth(out, truth, base, what="loss")
            for name in inputs:
                if name not in frozen:
                    grads = (d[name].grad for d in (inputs, truth_inputs, base_inputs))
                    assert_close_to_truth(*grads, what=f"d {name}")


def test_a_second_backward_is_an_error_not_a_wrong_gradient(device):
    tensors, targets = problem(torch.float32, device)
    loss = fastpo.linear_nll(**leaves(tensors, torch.float32), targets=targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("frozen", [("weight", "bias"), (), ("hidden", "weight", "bias")], ids=str)
def test_the_weights_of_tokens_get_their_gradient(device, frozen, reduction):
    tensors, targets = problem(torch.float32, device)
    tensors["weights"] = torch.rand(targets.shape, device=device)
    results = []
    for kind, nll in ((torch.float64, plain_nll), (torch.float32, plain_nll), (None, None)):
        inputs = leaves(tensors, kind or torch.float32, frozen)
        (nll or fastpo.linear_nll)(**inputs, targets=targets, reduction=reduction).backward()
        results.append(inputs)
    for name in set(results[0]) - set(frozen):
        truth, base, out = (inputs[name].grad for inputs in results)
        assert_close_to_truth(out, truth, base, what=f"d {name}")


@pytest.mark.parametrize("trained", [False, True])
def test_every_token_ignored(device, trained):
    hidden = torch.randn(5, 8, device=device, requires_grad=True)
    weight = torch.randn(30, 8, device=device, requires_grad=trained)
    targets = torch.full((5,), -100, device=device)
    loss = fastpo.linear_nll(hidden, weight, targets)
    loss.backward()
    assert loss == 0
    assert (hidden.grad == 0).all()


def test_matches_cross_entropy(device):
    tensors, targets = problem(torch.float32, device)
    loss = fastpo.linear_nll(**tensors, targets=targets)
    logits = F.linear(*(tensors[k] for k in ("hidden", "weight", "bias")))
    expected = F.cross_entropy(logits.flatten(0, -2), targets.flatten())
    assert torch.allclose(loss, expected, rtol=1e-6)
