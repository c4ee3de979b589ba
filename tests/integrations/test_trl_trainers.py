"""TRL's trainers over several steps, with and without fastpo: the same losses.

Both run the same model in float32 from the same seed, so their losses differ by rounding alone. A
log-prob of about ln V = 4.2 carries an error of a few float32 ulps, 4 * 2^-24 * 4.2 = 1e-6, and so
does a DPO loss near 0.7 that sums the log-probs of ten tokens times beta = 0.1. An optimizer step
adds an error of the same size to the weights, times the learning rate, which is far below that. The
loss of GRPO is near zero, hence an absolute bound of the same size. Losses were seen to differ by
2e-7 at most.
"""

import pytest
import torch

import fastpo.integrations.trl as seam

BOUND = 2e-6

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:::(torch|trl|transformers|peft|accelerate|datasets|triton).*"
    ),
    pytest.mark.slow,
]


def arguments(folder, **options):
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "bf16": False,
        "seed": 0,
        "disable_tqdm": True,
        **options,
    }


def losses(trainer):
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(history) == 4
    return history


def assert_same(got, want, keys):
    for step, (entry, expected) in enumerate(zip(got, want, strict=True)):
        for key in keys:
            scale = max(1.0, abs(expected[key]))
            assert abs(entry[key] - expected[key]) <= BOUND * scale, (step, key, entry, expected)


def run_both(make_trainer):
    """Histories with TRL's own function and with fastpo's, whose calls are counted."""
    want = losses(make_trainer())
    calls = []
    with pytest.MonkeyPatch.context() as patch, seam.enabled():
        original = seam.linear_token_stats
        patch.setattr(
            seam, "linear_token_stats", lambda *a, **k: calls.append(1) or original(*a, **k)
        )
        got = losses(make_trainer())
    assert len(calls) >= 4
    return got, want


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_dpo(tmp_path, tiny_model, tiny_tokenizer, lora):
    trl = pytest.importorskip("trl", exc_type=ImportError)
    peft = pytest.importorskip("peft", exc_type=ImportError)
    datasets = pytest.importorskip("datasets", exc_type=ImportError)
    rows = {
        "prompt": [f"w{i} w{i + 1} w{i + 2}" for i in range(8)],
        "chosen": [f" w{i + 3} w{i + 4} w{2 * i} w{i}" for i in range(8)],
        "rejected": [f" w{i + 9} w{3 * i}" for i in range(8)],
    }

    def make():
        config = trl.DPOConfig(
            **arguments(tmp_path, per_device_train_batch_size=2, loss_type="sigmoid", beta=0.1)
        )
        adapter = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        torch.manual_seed(0)
        return trl.DPOTrainer(
            model=tiny_model(),
            ref_model=None if lora else tiny_model(),
            args=config,
            train_dataset=datasets.Dataset.from_dict(rows),
            processing_class=tiny_tokenizer,
            peft_config=adapter if lora else None,
        )

    got, want = run_both(make)
    keys = [key for key in want[0] if key.startswith(("loss", "rewards", "logps", "entropy"))]
    assert len(keys) > 3
    assert_same(got, want, keys)
    assert want[0]["loss"] != want[-1]["loss"]


def test_grpo(tmp_path, tiny_model, tiny_tokenizer):
    trl = pytest.importorskip("trl", exc_type=ImportError)
    datasets = pytest.importorskip("datasets", exc_type=ImportError)
    rows = {"prompt": [f"w{i} w{i + 1} w{i + 2}" for i in range(8)]}

    def share_of_low_words(completions, **_):
        return [sum(int(w[1:]) < 20 for w in c.split() if w[1:].isdigit()) / 8 for c in completions]

    def make():
        config = trl.GRPOConfig(
            **arguments(
                tmp_path,
                per_device_train_batch_size=4,
                num_generations=4,
                max_completion_length=8,
                beta=0.0,
                temperature=0.9,
            )
        )
        torch.manual_seed(0)
        return trl.GRPOTrainer(
            model=tiny_model(),
            args=config,
            reward_funcs=share_of_low_words,
            train_dataset=datasets.Dataset.from_dict(rows),
            processing_class=tiny_tokenizer,
        )

    got, want = run_both(make)
    assert_same(got, want, ["loss", "grad_norm", "reward", "entropy"])
    assert any(entry["grad_norm"] > 0 for entry in want)
