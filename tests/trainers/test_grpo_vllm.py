"""The sampler by vLLM against a stub of the calls it makes."""

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_grpo import ONLINE, grpo
from tiny_rows import make_pairs, write_jsonl

from fastpo.trainers.config import ConfigError
from fastpo.trainers.grpo_vllm import VLLMSampler
from fastpo.trainers.sampling import generate


class Engine:
    """Answers with samples of a model of its own, whose log-probs it misstates by 0.1."""

    made = None

    def __init__(self, model, **options):
        from fastpo.trainers import run

        Engine.made = self
        self.options, self.loads, self.resets, self.params = options, [], 0, []
        config = SimpleNamespace(
            model=model, dtype="float32", lora_r=0, max_length=options["max_model_len"]
        )
        self.own, self.tokenizer = run.load_model(config), run.load_tokenizer(model)
        worker = SimpleNamespace(model_runner=SimpleNamespace(model=self))
        self.llm_engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=worker))

    def load_weights(self, pairs):
        state = {name: tensor.clone() for name, tensor in pairs}
        self.loads.append(state)
        self.own.load_state_dict(state)

    def reset_prefix_cache(self):
        self.resets += 1

    def generate(self, prompts, params, use_tqdm):
        self.params.append(params)
        ids = [prompt["prompt_token_ids"] for prompt in prompts]
        found = generate(
            self.own, self.tokenizer, ids, params["n"], params["seed"],
            max_new_tokens=params["max_tokens"], do_sample=True,
        )  # fmt: skip
        return [
            SimpleNamespace(outputs=[self._output(p, tokens) for tokens in group])
            for p, group in zip(ids, found, strict=True)
        ]

    @torch.no_grad()
    def _output(self, prompt, tokens):
        logprobs = self.own(torch.tensor([prompt + tokens])).logits.log_softmax(-1)[0]
        values = [logprobs[len(prompt) - 1 + i, token] - 0.1 for i, token in enumerate(tokens)]
        steps = [
            {token: SimpleNamespace(logprob=value.item())}
            for token, value in zip(tokens, values, strict=True)
        ]
        return SimpleNamespace(token_ids=tuple(tokens), logprobs=steps)


@pytest.fixture
def vllm(monkeypatch):
    stub = SimpleNamespace(LLM=Engine, SamplingParams=lambda **options: options)
    monkeypatch.setitem(sys.modules, "vllm", stub)
    # The sampler sets it.
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")


@pytest.fixture
def online(options, tmp_path):
    data = write_jsonl(tmp_path / "p.jsonl", [{"prompt": p["prompt"]} for p in make_pairs(8)])
    return options | ONLINE | {"data": data, "eval_share": 0.0, "batch_size": 2, "top_p": 0.9}


def test_weights_are_loaded_and_log_probs_corrected(online, vllm, monkeypatch):
    from fastpo.trainers import grpo as trainers

    seen = []
    plain = trainers.surrogates.policy_loss

    def policy_loss(*args, **options):
        out = plain(*args, **options)
        seen.append((out, options))
        return out

    monkeypatch.setattr(trainers.surrogates, "policy_loss", policy_loss)
    grpo(online, {"sampler": "vllm", "max_steps": 2, "learning_rate": 1e-2})
    engine = Engine.made
    assert engine.options["logprobs_mode"] == "processed_logprobs"
    # Before every call of the sampler: two prompts a step, one a call.
    assert len(engine.loads) == engine.resets == 4
    name = "model.norm.weight"
    assert torch.equal(engine.loads[0][name], engine.loads[1][name])
    assert not torch.equal(engine.loads[1][name], engine.loads[2][name])
    params = engine.params[0]
    assert (params["n"], params["max_tokens"], params["top_p"]) == (3, 6, 0.9)
    for out, options in seen[1:]:  # The first one tries the options.
        assert options["correction"] == "truncate"
        gap = out.metrics["sampling/sampling_logp_difference/mean"]
        assert gap == pytest.approx(0.1, abs=1e-3)
        assert out.metrics["weights/mean"] == pytest.approx(math.exp(0.1), abs=1e-3)


def test_a_batch_without_groups_has_log_probs_of_the_sampler(online, vllm):
    changes = {"sampler": "vllm", "reward": "grpo_parts:of_column", "filter_groups": True}
    rows = [{"prompt": pair["prompt"], "bonus": 1.0} for pair in make_pairs(4)]
    data = write_jsonl(Path(online["data"]).parent / "equal.jsonl", rows)
    assert grpo(online, changes, {"data": data, "max_steps": 1})["steps"] == 1


def test_what_it_does_not_serve_is_named(online, vllm, monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match="does not take the weights of a LoRA"):
        grpo(online, {"sampler": "vllm", "lora_r": 2, "max_steps": 1})
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="serves one process only"):
        VLLMSampler("model", max_length=8, max_new_tokens=4)
