"""``divergence`` and ``divergence_grad`` of every backend against the reference in float64."""

from __future__ import annotations

import math

import pytest
import torch
from tolerance import assert_close_to_truth

from fastpo import backends, reference
from fastpo.tiles import Tile, accumulation_dtype

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
KINDS = [
    ("forward_kl", 0.0),
    ("reverse_kl", 0.0),
    ("js", 0.5),
    ("js", 0.2),
    ("chi2", 0.0),
    ("alpha", 0.5),
    ("alpha", 2.0),
    ("alpha", -1.0),
    ("alpha", 3.0),
]
# Those that stay finite however far the two are apart.
BOUNDED = [("js", 0.5), ("js", 0.2), ("alpha", 0.5)]
TRANSFORMS = {
    "plain": ({}, {}),
    "scaled": ({"scale": -0.7, "temperature": 0.8}, {"scale": -0.9, "temperature": 1.1}),
    "capped": ({"scale": 1.5, "softcap": 4.0, "temperature": 0.8}, {"scale": 0.9, "softcap": 5.0}),
    "one capped": ({}, {"softcap": 5.0}),
}
every_kind = pytest.mark.parametrize(
    ("kind", "alpha"), KINDS, ids=[f"{kind}-{alpha:g}" for kind, alpha in KINDS]
)


def unaligned(x):
    """A copy with an odd row stride, so that rows start at every alignment."""
    n, V = x.shape
    wide = torch.full((n, V + 3), torch.nan, dtype=x.dtype, device=x.device)
    wide[:, 1 : V + 1] = x
    return wide[:, 1 : V + 1]


def make_logits(n, V, device, dtype=torch.float32, apart=1.0):
    """Logits of a policy and of a reference."""
    ref = 3 * torch.randn(n, V, dtype=torch.float64)
    policy = ref + apart * torch.randn(n, V, dtype=torch.float64)
    return (unaligned(x.to(dtype).to(device)) for x in (policy, ref))


def make_tiles(n, V, dtype, device, transform="plain"):
    """Two tiles; each has a bias of its own unless they are plain."""
    tiles = []
    for logits, options in zip(
        make_logits(n, V, device, dtype), TRANSFORMS[transform], strict=True
    ):
        acc = accumulation_dtype(dtype)
        bias = 0.3 * torch.randn(V, dtype=acc, device=device) if options else None
        tiles.append(Tile(logits, None, 0, bias, **options))
    return tiles


def widened(tile):
    bias = None if tile.bias_v is None else tile.bias_v.double()
    return tile._replace(logits_nv=tile.logits_nv.double(), bias_v=bias)


def run(kernels, policy, ref, kind, alpha, grads=None, into=None):
    """Divergences [n], and both gradients with ``into`` as their type."""
    n, device = policy.logits_nv.shape[0], policy.logits_nv.device
    acc = accumulation_dtype(policy.logits_nv.dtype)
    rows = torch.full((6, n + 2), torch.nan, dtype=acc, device=device)[:, :n]
    divergences = torch.full((n,), torch.nan, dtype=acc, device=device)
    kernels.divergence(policy, ref, rows, divergences, kind=kind, alpha=alpha)
    grads = torch.ones(n, device=device) if grads is None else grads
    into = policy.logits_nv.dtype if into is None else into
    outputs = [
        unaligned(torch.full_like(tile.logits_nv, torch.nan, dtype=into)) for tile in (policy, ref)
    ]
    kernels.divergence_grad(
        policy, ref, rows, grads.to(acc), outputs[0], outputs[1], kind=kind, alpha=alpha
    )
    return divergences, *outputs


def plain_torch(policy, ref, kind, alpha, grads, into):
    """The textbook formula, and autograd."""
    leaves, log_probs = [], []
    for tile in (policy, ref):
        acc = accumulation_dtype(tile.logits_nv.dtype)
        leaf = tile.logits_nv.to(acc, copy=True).requires_grad_()
        z = (leaf if tile.bias_v is None else leaf + tile.bias_v) * tile.scale
        z = z if tile.softcap == 0 else tile.softcap * torch.tanh(z / tile.softcap)
        leaves.append(leaf)
        log_probs.append(torch.log_softmax(z / tile.temperature, 1))
    log_p, log_q = log_probs
    p, q = log_p.exp(), log_q.exp()
    if kind == "forward_kl":
        terms = q * (log_q - log_p)
    elif kind == "reverse_kl":
        terms = p * (log_p - log_q)
    elif kind == "js":
        log_m = (alpha * p + (1 - alpha) * q).log()
        terms = alpha * p * (log_p - log_m) + (1 - alpha) * q * (log_q - log_m)
    elif kind == "chi2":
        terms = (p - q) ** 2 / q
    else:
        a = alpha
        terms = ((a * log_p + (1 - a) * log_q).exp() - a * p - (1 - a) * q) / (a * (a - 1))
    divergences = terms.sum(1)
    of_leaves = torch.autograd.grad(divergences, leaves, grads.to(divergences.dtype))
    return divergences.detach(), *(grad.to(into) for grad in of_leaves)


def compare(kernels, policy, ref, kind, alpha, grads, into=None):
    into = policy.logits_nv.dtype if into is None else into
    out = run(kernels, policy, ref, kind, alpha, grads, into)
    truth = run(reference, widened(policy), widened(ref), kind, alpha, grads.double())
    base = plain_torch(policy, ref, kind, alpha, grads, into)
    for name, *values in zip(("divergence", "policy", "ref"), out, truth, base, strict=True):
        assert_close_to_truth(*values, what=f"{name}, {policy.logits_nv.shape[1]} columns")
    assert (out[0] >= 0).all()


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_kind
def test_values_and_gradients(backend, kind, alpha, dtype, transform):
    # One column; odd; a vector and one; several rounds of a block with a ragged end.
    n = 3 if backend.is_sim else 16
    for V in (1, 31, 257) if backend.is_sim else (1, 7, 31, 257, 5003):
        tiles = make_tiles(n, V, dtype, backend.device, transform)
        grads = torch.randn(n, device=backend.device)
        compare(backends.kernels(backend.device), *tiles, kind, alpha, grads)


@pytest.mark.parametrize("V", [1009, 2051])
def test_several_rounds_of_a_block(backend, V):
    tiles = make_tiles(4, V, torch.float32, backend.device)
    grads = torch.randn(4, device=backend.device)
    for kind, alpha in KINDS:
        compare(backends.kernels(backend.device), *tiles, kind, alpha, grads)


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("transform", ["plain", "capped"])
@every_kind
def test_gradients_rounded_to_a_half_type(backend, kind, alpha, transform, out_dtype):
    tiles = make_tiles(3, 203, torch.float32, backend.device, transform)
    grads = torch.randn(3, device=backend.device)
    compare(backends.kernels(backend.device), *tiles, kind, alpha, grads, out_dtype)


@every_kind
def test_equal_distributions_are_exactly_zero_apart(backend, kind, alpha):
    for dtype in DTYPES:
        policy, _ = make_tiles(3, 301, dtype, backend.device, "capped")
        # Another alignment must not mean another order of summation.
        ref = policy._replace(logits_nv=policy.logits_nv.clone())
        kernels = backends.kernels(backend.device)
        for value in run(kernels, policy, ref, kind, alpha):
            assert (value == 0).all()


@every_kind
def test_nearly_equal_distributions_keep_their_digits(backend, kind, alpha):
    policy, ref = (Tile(x, None) for x in make_logits(4, 300, backend.device, apart=1e-3))
    kernels = backends.kernels(backend.device)
    got, *_ = run(kernels, policy, ref, kind, alpha)
    truth, *_ = run(reference, widened(policy), widened(ref), kind, alpha)
    # D is about a sum of q t^2, where t = log(p / q) is off by a few ulps of the log-probs.
    largest = max(-torch.log_softmax(x.logits_nv.double(), 1).min() for x in (policy, ref))
    off = 4 * torch.finfo(torch.float32).eps * largest
    assert ((got - truth).abs() <= 2 * truth.sqrt() * off).all()


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_logits_far_apart(backend, kind):
    logits = [unaligned(1e4 * torch.randn(4, 300)).to(backend.device) for _ in range(2)]
    tiles = [Tile(x, None) for x in logits]
    grads = torch.randn(4, device=backend.device)
    compare(backends.kernels(backend.device), *tiles, kind, 0.0, grads)


def test_logits_far_apart_where_the_divergence_is_bounded_or_overflows(backend):
    logits = [unaligned(1e4 * torch.randn(4, 300)).to(backend.device) for _ in range(2)]
    tiles = [Tile(x, None) for x in logits]
    grads = torch.randn(4, device=backend.device)
    kernels = backends.kernels(backend.device)
    for kind, alpha in KINDS:
        if (kind, alpha) in BOUNDED:
            compare(kernels, *tiles, kind, alpha, grads)
        else:
            assert (run(kernels, *tiles, kind, alpha)[0] >= 0).all()


@every_kind
def test_words_that_have_no_probability(backend, kind, alpha):
    policy, ref = make_logits(3, 70, backend.device)
    policy[0, 5:20] = -math.inf  # of the policy alone
    ref[1, 30:33] = -math.inf  # of the reference alone
    for logits in (policy, ref):
        logits[2, 40:] = -math.inf  # of both
    tiles = Tile(policy, None), Tile(ref, None)
    got = run(backends.kernels(backend.device), *tiles, kind, alpha)
    truth = run(reference, *map(widened, tiles), kind, alpha)
    infinite = truth[0].isinf()
    assert torch.equal(got[0].isinf(), infinite)
    assert infinite.tolist() == [
        kind == "forward_kl" or (kind == "alpha" and alpha < 0),
        kind in ("reverse_kl", "chi2") or (kind == "alpha" and alpha > 1),
        False,
    ]
    rows = ~infinite
    # Row 2 without the words: nothing but the order of summation may differ.
    base = run(reference, *tiles, kind, alpha)
    for value, wanted, plain in zip(got, truth, base, strict=True):
        assert_close_to_truth(value[rows], wanted[rows], plain[rows])
    assert (got[1][2, 40:] == 0).all()
    assert (got[2][2, 40:] == 0).all()


@every_kind
def test_infinite_and_nan_logits_poison_their_row_only(backend, kind, alpha):
    for poison in (math.inf, math.nan):
        policy, ref = make_logits(4, 70, backend.device)
        policy[1, 50] = poison
        ref[2, 3] = poison
        tiles = Tile(policy, None), Tile(ref, None)
        divergences, *_ = run(backends.kernels(backend.device), *tiles, kind, alpha)
        assert divergences.isnan().tolist() == [False, True, True, False]


@every_kind
def test_an_offset_that_logits_share_does_not_matter(backend, kind, alpha):
    logits = [torch.randint(-40, 40, (3, 90)) / 8.0 for _ in range(2)]  # exact after the offset
    kernels = backends.kernels(backend.device)
    results = []
    for offsets in ((0, 0), (1e4, 0), (0, 1e4), (-1e4, 1e4)):
        tiles = [
            Tile((x + by).to(backend.device), None) for x, by in zip(logits, offsets, strict=True)
        ]
        results.append(run(kernels, *tiles, kind, alpha))
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@every_kind
def test_column_slices_equal_the_whole(backend, kind, alpha):
    tiles = make_tiles(3, 203, torch.float32, backend.device, "capped")
    kernels = backends.kernels(backend.device)
    rows = torch.empty(6, 3, device=backend.device)
    divergences, grads = torch.empty(2, 3, device=backend.device)
    kernels.divergence(*tiles, rows, divergences, kind=kind, alpha=alpha)
    grads.normal_()
    whole, parts = torch.full((2, 2, 3, 203), torch.nan, device=backend.device)
    kernels.divergence_grad(*tiles, rows, grads, *whole, kind=kind, alpha=alpha)
    for start, stop in ((0, 1), (1, 64), (64, 203)):
        columns = slice(start, stop)
        sliced = [
            t._replace(logits_nv=t.logits_nv[:, columns], bias_v=t.bias_v[columns]) for t in tiles
        ]
        into = (part[:, columns] for part in parts)
        kernels.divergence_grad(*sliced, rows, grads, *into, kind=kind, alpha=alpha)
    assert torch.equal(parts, whole)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_kind
def test_in_place_and_single_outputs_equal_out_of_place(backend, kind, alpha, dtype):
    n, acc = 3, accumulation_dtype(dtype)
    policy, ref = make_tiles(n, 131, dtype, backend.device)
    kernels = backends.kernels(backend.device)
    rows = torch.empty(6, n, dtype=acc, device=backend.device)
    divergences, grads = torch.empty(2, n, dtype=acc, device=backend.device)
    kernels.divergence(policy, ref, rows, divergences, kind=kind, alpha=alpha)
    grads.normal_()

    def write(of_policy, of_ref):
        kernels.divergence_grad(policy, ref, rows, grads, of_policy, of_ref, kind=kind, alpha=alpha)

    both, single = (
        [torch.full((n, 131), torch.nan, dtype=dtype, device=backend.device) for _ in range(2)]
        for _ in range(2)
    )
    write(*both)
    write(single[0], None)
    write(None, single[1])
    write(None, None)
    write(policy.logits_nv, ref.logits_nv)
    for expected, *others in zip(both, single, (policy.logits_nv, ref.logits_nv), strict=True):
        assert all(torch.equal(expected, other) for other in others)


def test_a_zero_upstream_gradient_gives_zeros(backend):
    for poison in (math.inf, math.nan):
        policy, ref = make_logits(3, 70, backend.device)
        policy[1, 50] = poison
        ref[1, 3] = poison
        grads = torch.tensor([1.0, 0.0, -2.0], device=backend.device)
        for kind, alpha in KINDS:
            tiles = Tile(policy, None), Tile(ref, None)
            _, *of_logits = run(backends.kernels(backend.device), *tiles, kind, alpha, grads)
            for grad in of_logits:
                assert (grad[1] == 0).all()
                assert (grad[[0, 2]] != 0).any(1).all()


def test_no_rows(backend):
    logits = torch.empty(0, 40, device=backend.device)
    tiles = Tile(logits, None), Tile(logits, None)
    for kind, alpha in KINDS:
        shapes = [x.shape for x in run(backends.kernels(backend.device), *tiles, kind, alpha)]
        assert shapes == [(0,), (0, 40), (0, 40)]


def test_two_runs_are_bitwise_equal(backend):
    tiles = make_tiles(4, 777, torch.float32, backend.device, "one capped")
    kernels = backends.kernels(backend.device)
    for kind, alpha in KINDS:
        first, second = (run(kernels, *tiles, kind, alpha) for _ in range(2))
        assert all(map(torch.equal, first, second))
