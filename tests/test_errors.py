"""Bad input: a clear error before anything runs, saying what, expected, got and the remedy."""

import pytest
import torch

import fastpo


def call(**changes):
    arguments = {
        "hidden": torch.randn(2, 3, 8),
        "weight": torch.randn(20, 8),
        "targets": torch.randint(20, (2, 3)),
    }
    return fastpo.linear_logprobs(**(arguments | changes))


TARGETS = torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"targets": TARGETS + 20}, [r"\[0, 20\)", "got 20 at index", "ignore_index"]),
        ({"targets": TARGETS - 1}, [r"got -1 at index"]),
        ({"targets": TARGETS.float()}, ["targets", "int64", "float32", "long"]),
        ({"targets": TARGETS[:1]}, ["targets", r"\(2, 3\)", r"got \(1, 3\)"]),
        ({"hidden": torch.randn(2, 3, 9)}, ["one hidden size", "9 in hidden and 8 in weight"]),
        ({"hidden": torch.randn(2, 3, 8).bfloat16()}, ["one dtype", "bfloat16 and torch.float32"]),
        ({"hidden": torch.ones(2, 3, 8, dtype=torch.int64)}, ["hidden", "float32", "int64"]),
        ({"hidden": torch.randn(8)}, ["hidden", r"\[\.\.\., H\]"]),
        ({"weight": torch.randn(0, 8)}, ["V > 0"]),
        ({"weight": torch.randn(8, 20).t()[:, :3]}, ["one hidden size", "transpose"]),
        ({"bias": torch.randn(19)}, ["bias", r"\(20,\)", r"\(19,\)"]),
        ({"temperature": 0.0}, ["temperature", "positive", "0.0"]),
        ({"temperature": float("nan")}, ["temperature", "nan"]),
        ({"softcap": -1.0}, ["softcap", "positive"]),
        ({"workspace_bytes": 0}, ["workspace_bytes", "positive"]),
        ({"lora": fastpo.LoRA(torch.randn(4, 9), torch.randn(20, 4))}, ["lora.a", r"\[r, 8\]"]),
        ({"lora": fastpo.LoRA(torch.randn(4, 8), torch.randn(20, 5))}, ["lora.b", r"\(20, 4\)"]),
        ({"weight": torch.randn(20, 8, device="meta")}, ["one device", "meta", r"\.to\(device\)"]),
    ],
)
def test_linear_logprobs(changes, words):
    with pytest.raises(ValueError, match=r"fastpo\.linear_logprobs") as raised:
        call(**changes)
    for word in words:
        raised.match(word)


def test_a_padded_vocabulary_is_not_an_error():
    call(weight=torch.randn(64, 8), targets=TARGETS + 63)


def test_names_of_outputs():
    arguments = (torch.randn(3, 8), torch.randn(20, 8), torch.arange(3))
    with pytest.raises(ValueError, match=r"names among.*entropy.*got 'entropie'"):
        fastpo.linear_token_stats(*arguments, outputs=("entropie",))
    with pytest.raises(ValueError, match=r"differentiable.*got 'entropy'"):
        fastpo.linear_token_stats(*arguments, outputs=("logprobs",), differentiable=("entropy",))


def test_nll():
    arguments = (torch.randn(3, 8), torch.randn(20, 8), torch.arange(3))
    with pytest.raises(ValueError, match=r"'mean' or 'sum'.*got 'none'"):
        fastpo.linear_nll(*arguments, reduction="none")
    with pytest.raises(ValueError, match=r"weights.*\(3,\).*got \(2,\)"):
        fastpo.linear_nll(*arguments, weights=torch.ones(2))


def test_logprobs():
    with pytest.raises(ValueError, match=r"fastpo\.logprobs: targets.*\(3,\).*got \(2,\)"):
        fastpo.logprobs(torch.randn(3, 8), torch.arange(2))
    with pytest.raises(ValueError, match=r"\[0, 8\), got 8 at index \[1\]"):
        fastpo.logprobs(torch.randn(2, 8), torch.tensor([7, 8]))
    with pytest.raises(ValueError, match="V > 0"):
        fastpo.logprobs(torch.randn(2, 0), torch.arange(2))
