"""Scorers, settings and checks of the recipes' tests."""

import torch
from safetensors.torch import load_file

QUIET = {"use_cpu": True, "disable_tqdm": True}
SGD = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0}


def vowels(prompts, responses):
    """Rewards [B, K]: vowels in each response."""
    return torch.tensor([[sum(c in "aeiou" for c in r) for r in group] for group in responses]) / 1


def preferences(prompts, responses):
    scores = vowels(prompts, responses)
    return torch.sigmoid(scores[:, :, None] - scores[:, None, :])


class Recorder:
    """A scorer that notes what it is asked."""

    def __init__(self, fail_at=None):
        self.calls, self.fail_at = [], fail_at

    def __call__(self, prompts, responses):
        if len(self.calls) == self.fail_at:
            raise ConnectionError("the judge is away")
        self.calls.append(responses)
        return vowels(prompts, responses)


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name in want:
        assert torch.equal(got[name], want[name]), name
