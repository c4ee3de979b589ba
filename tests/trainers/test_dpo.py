import copy
import math

import pytest
import torch
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config

from fastpo.data.records import PAIR_FIELDS, load_rows
from fastpo.data.tokens import PairCollator, tokenize_rows
from fastpo.trainers import config as configs
from fastpo.trainers import run
from fastpo.trainers.base import NonFiniteLossError
from fastpo.trainers.dpo import DPOTrainer, loss_arguments
from fastpo.trainers.head import add_logprob_head


def load(options):
    return run.load_model(configs.build(configs.DPOConfig, options))


def batch(options, count=4):
    tokenizer = run.load_tokenizer(options["model"])
    rows, _ = tokenize_rows(load_rows(options["data"], PAIR_FIELDS), PAIR_FIELDS, tokenizer, 64)
    return PairCollator(tokenizer.pad_token_id)([rows[i] for i in range(count)])


def trainer(options, model, **kwargs):
    args = run.training_arguments(configs.build(configs.DPOConfig, options))
    collator = PairCollator(0)
    return DPOTrainer(model, args, data_collator=collator, **kwargs)


def plain_sums(model, inputs):
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    labels = inputs["labels"][:, 1:]
    logps = logits[:, :-1].log_softmax(-1)
    picked = logps.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    return (picked * (labels >= 0)).sum(1).chunk(2)


def plain_dpo(model, ref, inputs, beta=0.1):
    chosen, rejected = plain_sums(model, inputs)
    with torch.no_grad():
        ref_chosen, ref_rejected = plain_sums(ref, inputs)
    return -logsigmoid(beta * ((chosen - ref_chosen) - (rejected - ref_rejected))).mean()


def test_steps_equal_plain_torch(options):
    """Losses and weights of five AdamW steps against logits, log_softmax and gather."""
    inputs = batch(options)
    model = load(options)
    plain, ref = copy.deepcopy(model), copy.deepcopy(model)
    subject = trainer(options, model)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3) for m in (model, plain)]
    for _ in range(5):
        got = subject.compute_loss(model, inputs)
        want = plain_dpo(plain, ref, inputs)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        for loss, optimizer in zip((got, want), optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert got < math.log(2)
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-4, msg=name)


def test_only_completion_tokens_count(options):
    """Labels cover the completion and its end, neither prompt nor padding."""
    inputs = batch(options)
    tokenizer = run.load_tokenizer(options["model"])
    for ids, labels, attention in zip(
        inputs["input_ids"], inputs["labels"], inputs["attention_mask"], strict=True
    ):
        kept = labels != -100
        assert torch.equal(labels[kept], ids[kept])
        assert labels[kept][-1] == tokenizer.eos_token_id
        assert not (kept & (attention == 0)).any()
        assert not kept[: int(kept.int().argmax())].any()
    model = load(options)
    names = ("input_ids", "attention_mask", "labels")
    logps = model(**{n: inputs[n] for n in names}, statistic="logprobs")
    assert (logps[:, :-1][inputs["labels"][:, 1:] == -100] == 0).all()


@pytest.mark.parametrize("loss", ["dpo", "ipo", "hinge", "simpo", "orpo"])
def test_every_loss_trains(options, loss):
    inputs = batch(options)
    model = load(options)
    subject = trainer(options, model, loss=loss, loss_options={"beta": 0.5})
    loss = subject.compute_loss(model, inputs)
    loss.backward()
    assert loss.isfinite()
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0


# peft warns of an adapter on a tied head; here it is the case under test.
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("targets", ["all-linear", "q_proj,lm_head"])
def test_adapter_reference_is_the_base_model(options, targets):
    """With a trained LoRA, also on the head, the reference is the model that was loaded."""
    pytest.importorskip("peft")
    base = load(options)
    model = load(options | {"lora_r": 2, "lora_targets": targets})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.05)
    inputs = batch(options)
    subject = trainer(options, model)
    assert subject.reference == "adapter"
    got = subject.compute_loss(model, inputs)
    torch.testing.assert_close(got, plain_dpo(model, base, inputs), rtol=1e-5, atol=1e-6)
    got.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name), name


def test_cached_reference_equals_live(options, tmp_path):
    cached = run.train_dpo(
        configs.build(configs.DPOConfig, options, {"reference": "cached", "save_steps": 100})
    )
    other = {"output": str(tmp_path / "live"), "reference": "copy", "save_steps": 100}
    live = run.train_dpo(configs.build(configs.DPOConfig, options, other))
    for name in ("eval_loss", "eval_rewards/margins", "eval_logps/margins"):
        assert cached["after"][name] == pytest.approx(live["after"][name], rel=1e-4, abs=1e-5)


def test_non_finite_loss_stops_with_step_and_rows(options):
    model = load(options)
    subject = trainer(
        options,
        model,
        train_dataset=tokenize_rows(
            load_rows(options["data"], PAIR_FIELDS),
            PAIR_FIELDS,
            run.load_tokenizer(options["model"]),
            64,
        )[0],
    )
    with torch.no_grad():
        model.get_input_embeddings().weight[:] = float("nan")
    with pytest.raises(NonFiniteLossError, match=r"step 1: the loss is nan, on rows \[\d+, "):
        subject.train()


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            final_logit_softcapping=2.0,
        ),
        CohereConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            logit_scale=0.25,
        ),
    ],
    ids=["softcap", "logit_scale"],
)
def test_head_transforms_of_models(config):
    """add_logprob_head compares with the model's own logits, so reaching the end is the test."""
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    assert add_logprob_head(model).has_logprob_head


def test_unknown_head_is_refused(model_folder):
    class Odd(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x).sin()

    model = AutoModelForCausalLM.from_pretrained(model_folder)
    model.lm_head.__class__ = Odd
    model.lm_head.weight.data.mul_(20)
    with pytest.raises(ValueError, match="log-probs of the fused head differ"):
        add_logprob_head(model)


def test_wrong_options_are_named(options):
    with pytest.raises(ValueError, match="gamma: the loss dpo has no such option"):
        loss_arguments("dpo", gamma=1.0)
    with pytest.raises(ValueError, match="needs a LoRA"):
        trainer(options, load(options), reference="adapter")
