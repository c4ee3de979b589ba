"""The ops under torch.compile, opcheck, vmap-free tracing and export: one node, right shapes."""

import ast
from pathlib import Path

import pytest
import torch

import fastpo
from fastpo.ops.linear_divergence import linear_divergence, linear_divergence_backward
from fastpo.ops.linear_nll import linear_nll
from fastpo.ops.linear_stats import linear_stats, linear_stats_backward
from fastpo.ops.logits_divergence import logits_divergence, logits_divergence_backward
from fastpo.ops.logits_logprobs import logits_grad, logits_grad_, logits_logprobs
from fastpo.ops.scale_rows import scale_rows


def sample(trained, N=6, H=5, V=40):
    hidden = torch.randn(N, H, requires_grad=True)
    weight = torch.randn(V, H, requires_grad=trained)
    targets = torch.randint(V, (N,))
    targets[1] = -100
    return hidden, weight, targets


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("saved_columns", [0, 12])
def test_linear_stats_opcheck(trained, saved_columns):
    hidden, weight, targets = sample(trained)
    bias = torch.randn(40, requires_grad=trained)
    a, b = torch.randn(3, 5, requires_grad=True), torch.randn(40, 3, requires_grad=True)
    scalars = (1.0, 1.2, 3.0, 0.9, -100, 4096)
    for lora in ((None, None), (a, b)) if trained else ((None, None),):
        arguments = (hidden, weight, targets, bias, *lora, *scalars)
        torch.library.opcheck(linear_stats, (*arguments, 15, not trained, saved_columns))
        stats = linear_stats(*(t.detach() if isinstance(t, torch.Tensor) else t for t in arguments),
                             15, not trained, saved_columns)  # fmt: skip
        grads = [torch.randn(6), None, torch.randn(6)]
        needs = [True, trained, trained, lora[0] is not None, lora[0] is not None]
        with torch.no_grad():
            rest = (*stats[:4], stats[8], *grads, needs)
            torch.library.opcheck(linear_stats_backward, (*arguments, *rest))


def test_other_ops_opcheck():
    hidden, weight, targets = sample(True)
    numbers = (1.0, 0.0, 1.0, -100)
    factors = torch.rand(6)
    arguments = (hidden, weight, targets, None, factors, *numbers, 4, True, True, False)
    torch.library.opcheck(linear_nll, arguments)
    torch.library.opcheck(scale_rows, (torch.randn(4, 5), torch.randn(4), torch.bfloat16))
    logits = torch.randn(2, 3, 9, requires_grad=True)
    targets = torch.randint(9, (2, 3))
    torch.library.opcheck(logits_logprobs, (logits, targets, *numbers, False))
    rows = (targets, -torch.rand(2, 3), torch.rand(2, 3), torch.zeros(2, 3), torch.randn(2, 3))
    torch.library.opcheck(logits_grad, (logits.detach(), *rows, *numbers))
    torch.library.opcheck(logits_grad_, (logits.detach(), *rows, *numbers))


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("rows_to_save", [0, 3, 6])
@pytest.mark.parametrize("masked", [False, True])
def test_linear_divergence_opcheck(trained, rows_to_save, masked):
    hidden, weight, targets = sample(trained)
    models = [hidden, weight, torch.randn(40, requires_grad=trained), None, None]
    if trained:
        models[3:] = [torch.randn(3, 5, requires_grad=True), torch.randn(40, 3, requires_grad=True)]
    models += [torch.randn(6, 4), torch.randn(40, 4), torch.randn(40)]
    mask = targets != -100 if masked else None
    numbers = (0.5, 1.2, 3.0, 0.9, "js", 0.5, 4096)
    plan = ([not trained, False], rows_to_save if trained else 0)
    torch.library.opcheck(linear_divergence, (*models, mask, *numbers, *plan))
    needs = [t is not None and t.requires_grad for t in models]
    models = [None if t is None else t.detach() for t in models]
    _, rows, *_, saved_logits = linear_divergence(*models, mask, *numbers, *plan)
    rest = (rows, saved_logits, torch.randn(6), needs)
    torch.library.opcheck(linear_divergence_backward, (*models, mask, *numbers, *rest))


def test_logits_divergence_opcheck():
    logits, ref_logits = (torch.randn(2, 3, 9, requires_grad=True) for _ in range(2))
    rest = (torch.rand(2, 3) < 0.5, 1.0, 0.0, 1.0, "alpha", 0.5)
    torch.library.opcheck(logits_divergence, (logits, ref_logits, *rest))
    inputs = (logits.detach(), ref_logits.detach(), *rest)
    _, rows = logits_divergence(*inputs)
    for needs in ([True, False], [True, True]):
        given = (*inputs, rows, torch.randn(2, 3), needs)
        torch.library.opcheck(logits_divergence_backward, given)


def functions():
    def logprobs(hidden, weight, targets):
        return fastpo.linear_logprobs(hidden, weight, targets, softcap=3.0).sum()

    def stats(hidden, weight, targets):
        out = fastpo.linear_token_stats(hidden, weight, targets, outputs=("logprobs", "entropy"))
        return (out.logprobs * 2 + out.entropy).sum()

    def nll(hidden, weight, targets):
        return fastpo.linear_nll(hidden, weight, targets)

    def logits(hidden, weight, targets):
        return fastpo.logprobs(hidden @ weight.t(), targets, inplace_backward=True).sum()

    def divergence(hidden, weight, targets):
        ref_hidden, mask = hidden.detach() + 1, targets != -100
        return fastpo.linear_divergence(hidden, weight, ref_hidden, kind="js", mask=mask).sum()

    def logits_divergence(hidden, weight, targets):
        return fastpo.divergence(hidden @ weight.t(), weight[: len(hidden)] @ weight.t()).sum()

    return logprobs, stats, nll, logits, divergence, logits_divergence


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("function", functions(), ids=lambda f: f.__name__)
def test_fullgraph(function, trained):
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for call in (function, compiled):
        torch.manual_seed(3)
        hidden, weight, targets = sample(trained)
        loss = call(hidden, weight, targets)
        loss.backward()
        results.append((loss, hidden.grad, weight.grad))
    for eager, traced in zip(*results, strict=True):
        assert (eager is None) == (traced is None)
        assert eager is None or torch.allclose(eager, traced, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("function", functions(), ids=lambda f: f.__name__)
def test_meta_tensors(function, trained):
    hidden, weight, targets = (t.detach().to("meta") for t in sample(trained))
    hidden.requires_grad_()
    weight.requires_grad_(trained)
    loss = function(hidden, weight, targets)
    assert loss.is_meta
    assert loss.shape == ()
    loss.backward()
    assert hidden.grad.is_meta
    assert (weight.grad is not None) == trained


def test_one_node_in_the_graph():
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    def function(hidden, weight, targets):
        return fastpo.linear_logprobs(hidden, weight, targets)

    torch.compile(function, fullgraph=True, backend=keep)(*sample(False))
    calls = [n for n in graphs[0].graph.nodes if "fastpo" in str(n.target)]
    assert len(graphs) == 1
    assert len(calls) == 1


def test_dynamic_shapes():
    function = torch.compile(
        lambda h, w, t: fastpo.linear_logprobs(h, w, t), fullgraph=True, backend="aot_eager",
        dynamic=True,
    )  # fmt: skip
    for N in (3, 8, 17):
        arguments = sample(False, N=N)
        assert torch.allclose(function(*arguments), fastpo.linear_logprobs(*arguments))


def test_dynamic_shapes_of_a_divergence():
    function = torch.compile(
        lambda h, w, t: fastpo.linear_divergence(h, w, 2 * h, mask=t != -100), fullgraph=True,
        backend="aot_eager", dynamic=True,
    )  # fmt: skip
    for N in (3, 8, 17):
        hidden, weight, targets = sample(True, N=N)
        values = function(hidden, weight, targets)
        expected = fastpo.linear_divergence(hidden, weight, 2 * hidden, mask=targets != -100)
        assert torch.allclose(values, expected)
        grads = [torch.autograd.grad(x.sum(), (hidden, weight)) for x in (values, expected)]
        assert all(torch.allclose(x, y, atol=1e-6) for x, y in zip(*grads, strict=True))


def test_export():
    class Scorer(torch.nn.Module):
        def forward(self, hidden, weight, targets):
            return fastpo.linear_logprobs(hidden, weight, targets)

    arguments = tuple(t.detach() for t in sample(False))
    program = torch.export.export(Scorer(), arguments)
    assert torch.equal(program.module()(*arguments), Scorer()(*arguments))


TRACED = ("losses", "advantages", "surrogates", "weights", "metrics", "diffusion")


@pytest.mark.parametrize("part", TRACED)
def test_nothing_that_stops_dynamo_before_torch_2_13(part):
    """``_replace`` and ``_asdict`` of NamedTuples, and ``isinstance`` of a union."""
    for path in (Path(fastpo.__file__).parent / part).rglob("*.py"):
        if "data" in path.parts or path.name == "accumulate.py":  # never traced
            continue
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call):
                name = getattr(call.func, "attr", getattr(call.func, "id", ""))
                assert name not in ("_replace", "_asdict"), f"{path}:{call.lineno}"
                union = name == "isinstance" and isinstance(call.args[1], ast.BinOp)
                assert not union, f"{path}:{call.lineno}"
