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


def divergence(**changes):
    arguments = {"hidden": torch.randn(2, 3, 8), "weight": torch.randn(20, 8)}
    arguments |= {"ref_hidden": torch.randn(2, 3, 6), "ref_weight": torch.randn(20, 6)}
    return fastpo.linear_divergence(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "kl"}, ["kind", "'forward_kl', 'reverse_kl'", "got 'kl'"]),
        ({"alpha": 0.5}, ["alpha", "None with kind='forward_kl'", "got 0.5", "'js' and 'alpha'"]),
        ({"kind": "js", "alpha": 1.0}, ["alpha", r"\(0, 1\)", "got 1.0", "'forward_kl'"]),
        ({"kind": "js", "alpha": float("nan")}, ["alpha", "got nan"]),
        ({"kind": "alpha"}, ["alpha", "finite number", "got None", "0 is kind='forward_kl'"]),
        ({"kind": "alpha", "alpha": 1}, ["got 1", "1 is kind='reverse_kl'"]),
        ({"kind": "alpha", "alpha": float("inf")}, ["finite number", "got inf"]),
        (
            {"ref_weight": torch.randn(32, 6)},
            ["vocabulary", "20 rows", "32 in", r"ref_weight\[:V\]"],
        ),
        ({"ref_weight": torch.randn(20, 5)}, ["ref_hidden, ref_weight", "6 in hidden and 5"]),
        ({"ref_weight": None}, ["ref_hidden, ref_weight", "6 in hidden and 8 in weight"]),
        ({"ref_hidden": torch.randn(2, 4, 6)}, ["ref_hidden", r"\(2, 4, 6\)", "same tokens"]),
        ({"ref_hidden": torch.randn(6)}, ["ref_hidden", r"\(6,\)", "same tokens"]),
        ({"ref_hidden": torch.randn(2, 3, 6).bfloat16()}, ["ref_hidden, ref_weight", "one dtype"]),
        (
            {
                "ref_hidden": torch.randn(2, 3, 6).double(),
                "ref_weight": torch.randn(20, 6).double(),
            },
            ["hidden, ref_hidden", "float64 on both sides", "Cast the reference"],
        ),
        (
            {
                "ref_hidden": torch.randn(2, 3, 6).bfloat16(),
                "ref_weight": torch.randn(20, 6).bfloat16().requires_grad_(),
                "weight": torch.randn(20, 8, requires_grad=True),
            },
            ["hidden, ref_hidden", "one dtype where both", "bfloat16", "detach the reference"],
        ),
        ({"ref_bias": torch.randn(19)}, ["ref_bias", r"\(20,\)", r"\(19,\)"]),
        (
            {"ref_weight": None, "ref_hidden": torch.randn(2, 3, 8), "ref_bias": torch.randn(20)},
            ["ref_bias", "None without a ref_weight", r"weight\.detach"],
        ),
        ({"mask": torch.ones(2, 3)}, ["mask", "bool", "float32", r"mask\.bool"]),
        ({"mask": torch.ones(3, 2, dtype=torch.bool)}, ["mask", r"\(2, 3\)", r"got \(3, 2\)"]),
        ({"temperature": 0.0}, ["temperature", "positive"]),
        ({"workspace_bytes": 0}, ["workspace_bytes", "positive"]),
        ({"hidden": torch.randn(2, 3, 9)}, ["one hidden size", "9 in hidden and 8 in weight"]),
        ({"ref_weight": torch.randn(20, 6, device="meta")}, ["one device", "ref_weight on meta"]),
    ],
)
def test_linear_divergence(changes, words):
    with pytest.raises(ValueError, match=r"fastpo\.linear_divergence") as raised:
        divergence(**changes)
    for word in words:
        raised.match(word)


def test_divergence():
    logits = torch.randn(3, 8)
    with pytest.raises(ValueError, match=r"fastpo\.divergence: ref_logits.*\(3, 8\).*\(3, 9\)"):
        fastpo.divergence(logits, torch.randn(3, 9))
    with pytest.raises(ValueError, match=r"one dtype, got torch.float32 and torch.bfloat16"):
        fastpo.divergence(logits, logits.bfloat16())
    with pytest.raises(ValueError, match=r"mask.*bool.*float32"):
        fastpo.divergence(logits, logits, mask=torch.ones(3))
    with pytest.raises(ValueError, match="V > 0"):
        fastpo.divergence(logits[:, :0], logits[:, :0])
