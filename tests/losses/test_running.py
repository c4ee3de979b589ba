"""The running mean of rewards that BCO subtracts."""

from __future__ import annotations

import io

import pytest
import torch

from fastpo.losses import BCODelta

BATCHES = [torch.tensor([0.5, -1.0, 2.0]), torch.tensor([4.0]), torch.tensor([-1.5, 0.25])]


def test_rows_is_the_mean_of_all_seen():
    delta = BCODelta()
    for seen in range(1, 4):
        got = delta(BATCHES[seen - 1])
        torch.testing.assert_close(got, torch.cat(BATCHES[:seen]).mean())
    assert delta.count == 6


def test_batch_means_is_the_mean_of_means():
    delta = BCODelta("batch_means")
    for seen in range(1, 4):
        got = delta(BATCHES[seen - 1])
        torch.testing.assert_close(got, torch.stack([x.mean() for x in BATCHES[:seen]]).mean())
    assert delta.count == 3


@pytest.mark.parametrize("convention", ["rows", "batch_means"])
def test_evaluation_and_empty_batches_change_nothing(convention):
    delta = BCODelta(convention)
    assert delta(torch.zeros(0)) == 0
    delta(BATCHES[0])
    before = {name: value.clone() for name, value in delta.state_dict().items()}
    assert delta(torch.zeros(0)) == 0.5
    assert delta.eval()(BATCHES[1]) == 0.5
    assert all(torch.equal(delta.state_dict()[name], value) for name, value in before.items())


def test_a_new_one_gives_zero_in_evaluation():
    assert BCODelta().eval()(BATCHES[0]) == 0


def test_state_goes_through_a_checkpoint():
    delta, buffer = BCODelta(), io.BytesIO()
    delta(BATCHES[0])
    torch.save(delta.state_dict(), buffer)
    buffer.seek(0)
    again = BCODelta()
    again.load_state_dict(torch.load(buffer))
    assert torch.equal(again(BATCHES[1]), delta(BATCHES[1]))


def test_result_is_a_constant_of_its_own():
    delta = BCODelta()
    rewards = BATCHES[0].clone().requires_grad_()
    first = delta(rewards)
    assert not first.requires_grad
    delta(BATCHES[1])
    assert first == 0.5


@pytest.mark.parametrize(
    ("dtype", "result"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_dtype_of_the_result(dtype, result):
    assert BCODelta()(BATCHES[0].to(dtype)).dtype == result


def test_casting_a_model_does_not_round_the_mean():
    delta = BCODelta()
    want = delta(torch.tensor([0.1, 0.7]))
    torch.nn.Sequential(delta).bfloat16()
    torch.nn.Sequential(delta).float()
    assert delta.mean.dtype == torch.float64
    assert delta.eval()(BATCHES[0]) == want


def test_made_without_storage_and_then_given_some():
    with torch.device("meta"):
        delta = BCODelta()
    delta.to_empty(device="cpu").load_state_dict(BCODelta().state_dict())
    assert delta(BATCHES[0]) == 0.5


@pytest.mark.parametrize("convention", ["rows", "batch_means"])
def test_ranks_share_one_mean(convention):
    """Two ranks with batches of different sizes against one that sees all of them."""
    pairs = [(BATCHES[0], BATCHES[1]), (BATCHES[2], BATCHES[0])]
    messages = []
    recorder = BCODelta(convention, all_reduce=lambda sums: messages.append(sums) or sums)
    for pair in pairs:
        for batch in pair:
            recorder(batch)
    totals = [messages[0] + messages[1], messages[2] + messages[3]]
    answers = [iter(totals), iter(totals)]
    ranks = [BCODelta(convention, all_reduce=lambda _, t=turns: next(t)) for turns in answers]
    for step, pair in enumerate(pairs):
        shared = [rank(batch) for rank, batch in zip(ranks, pair, strict=True)]
        seen = [batch for earlier in pairs[: step + 1] for batch in earlier]
        if convention == "batch_means":
            seen = [batch.mean()[None] for batch in seen]
        assert torch.equal(shared[0], shared[1])
        torch.testing.assert_close(shared[0], torch.cat(seen).mean())


def test_compiles_to_one_graph():
    delta, plain = BCODelta(), BCODelta()
    compiled = torch.compile(delta, fullgraph=True, backend="aot_eager")
    for batch in BATCHES[:2]:
        torch.testing.assert_close(compiled(batch), plain(batch))
    assert delta.count == plain.count


def test_convention_name():
    with pytest.raises(ValueError, match="BCODelta: convention: expected one of rows, batch_means"):
        BCODelta("pairs")
