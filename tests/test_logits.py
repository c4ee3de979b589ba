"""``fastpo.logprobs`` on logits that exist already."""

import pytest
import torch
from tolerance import assert_close_to_truth

import fastpo


def plain(logits, targets, temperature=1.0, logit_scale=1.0, softcap=None):
    z = logits * logit_scale
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature
    found = z.log_softmax(-1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(targets == -100, 0.0, found)


def gradients(function, logits, targets, upstream, dtype, **options):
    logits = logits.to(dtype).detach().requires_grad_()
    source = logits * 1 if options.get("inplace_backward") else logits
    out = function(source[:, :-1], targets, **options)
    out.backward(upstream.to(out.dtype))
    return out, logits.grad


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "logit_scale": 1.3, "softcap": 5.0}])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
@pytest.mark.parametrize("V", [1, 7, 321])
def test_values_and_gradients(backend, V, dtype, options):
    logits = (torch.randn(2, 4, V, dtype=torch.float64) * 4).to(dtype).to(backend.device)
    targets = torch.randint(V, (2, 3), device=backend.device)
    targets[0, 1] = -100
    upstream = torch.randn(2, 3, device=backend.device).double()
    arguments = (logits, targets, upstream)
    truth, truth_grad = gradients(plain, *arguments, torch.float64, **options)
    base, base_grad = gradients(plain, *arguments, dtype, **options)
    for in_place in (False, True):
        out, grad = gradients(
            fastpo.logprobs, *arguments, dtype, **options, inplace_backward=in_place
        )
        assert_close_to_truth(out, truth, base, what="logprobs")
        assert_close_to_truth(grad, truth_grad, base_grad, what="d logits")
        assert (grad[:, -1] == 0).all()
        assert (out <= 0).all()


def test_large_common_offset_costs_no_digits(device):
    """exp(z - max) and the margin are formed by differences of logits, not of rounded sums."""
    logits = (torch.randn(4, 500) + 5000).to(device).requires_grad_()
    targets = torch.randint(500, (4,), device=device)
    out = fastpo.logprobs(logits, targets)
    out.sum().backward()
    wide = logits.detach().double().requires_grad_()
    truth = plain(wide, targets)
    truth.sum().backward()
    base = logits.detach().requires_grad_()
    plain(base, targets).sum().backward()
    assert_close_to_truth(out, truth, plain(logits, targets))
    assert_close_to_truth(logits.grad, wide.grad, base.grad)


def test_gradient_lands_in_the_logits(device):
    logits = torch.randn(3, 5, 40, device=device, requires_grad=True)
    scores = logits * 1
    address = scores.data_ptr()
    out = fastpo.logprobs(scores, torch.randint(40, (3, 5), device=device), inplace_backward=True)
    (grad,) = torch.autograd.grad(out.sum(), scores)
    assert grad.data_ptr() == address


def test_in_place_gradient_refuses_a_second_user(device):
    logits = torch.randn(3, 40, device=device, requires_grad=True)
    scores = logits * 1
    out = fastpo.logprobs(scores, torch.arange(3, device=device), inplace_backward=True)
    (out.sum() + out.sum()).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_slices_and_any_leading_shape(device):
    wide = torch.randn(2, 3, 4, 60, device=device)
    targets = torch.randint(50, (2, 3, 4), device=device)
    expected = plain(wide[..., :50], targets)
    assert torch.allclose(fastpo.logprobs(wide[..., :50], targets), expected, atol=1e-5)
    transposed = wide[..., :50].transpose(0, 3).contiguous().transpose(0, 3)
    assert torch.allclose(fastpo.logprobs(transposed, targets), expected, atol=1e-5)
    flat = fastpo.logprobs(wide[0, 0, :, :50], targets[0, 0])
    assert torch.allclose(flat, expected[0, 0], atol=1e-5)


def test_offsets_beyond_32_bits(device):
    """Row 3 of a strided view starts 2.4e9 elements into its storage; unused pages are free."""
    stride, V = 800_000_011, 9
    if device.type == "cuda":
        storage = torch.empty(3 * stride + V, dtype=torch.bfloat16, device=device)
    else:
        storage = torch.empty(3 * stride + V, dtype=torch.bfloat16)
    logits = storage.as_strided((4, V), (stride, 1))
    logits.copy_(torch.randn(4, V))
    targets = torch.arange(4, device=device)
    logits.requires_grad_()
    out = fastpo.logprobs(logits, targets)
    expected = plain(logits.detach().contiguous().float(), targets)
    assert torch.allclose(out, expected, atol=1e-5)
    fastpo.logprobs(logits.detach().requires_grad_(), targets).sum().backward()


@pytest.mark.parametrize("shape", [(0, 7), (2, 0, 7), (0, 3, 7)])
def test_no_rows(device, shape):
    logits = torch.empty(shape, device=device, requires_grad=True)
    targets = torch.empty(shape[:-1], dtype=torch.int64, device=device)
    out = fastpo.logprobs(logits, targets)
    out.sum().backward()
    assert out.shape == shape[:-1]
    assert logits.grad.shape == shape


def test_gradcheck():
    logits = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(6, (2, 3))
    targets[0, 0] = -100
    assert torch.autograd.gradcheck(lambda x: fastpo.logprobs(x, targets, softcap=2.0), logits)
