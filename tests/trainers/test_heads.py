"""The fused head is what the model's own output layer computes, or refused by its type."""

import dataclasses
import re

import pytest
import torch
from torch.nn.utils import parametrizations
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fastpo.trainers import config as configs
from fastpo.trainers import run
from fastpo.trainers.base import ConfigError
from fastpo.trainers.head import add_logprob_head
from fastpo.trainers.output_layer import HeadError
from fastpo.trainers.sft import SFTTrainer

peft = pytest.importorskip("peft")
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

IDS = torch.arange(1, 15).view(2, 7)
# What these configurations need beside their defaults; AdaLoRA's ranks change over the steps.
NEEDED = {"ADALORA": {"total_step": 10}}


def llama(hidden=256, vocab=512, tied=False):
    """Wide enough for the block sizes that peft's configurations have by default."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=hidden,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        use_cache=False,
    )
    return add_logprob_head(LlamaForCausalLM(config))


def perturbed(model):
    """The adapter somewhere else than where it does nothing."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def own_logprobs(model, ids=IDS):
    logprobs = model(input_ids=ids).logits.float().log_softmax(-1)[:, :-1]
    return logprobs.gather(-1, ids[:, 1:, None]).squeeze(-1)


def require_exact(model):
    """Log-probs and all gradients are those through the model's own logits."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    got = model(input_ids=IDS, labels=IDS, statistic="logprobs")[:, :-1]
    want = own_logprobs(model)
    torch.testing.assert_close(got, want)
    assert got.requires_grad == want.requires_grad
    if not want.requires_grad:  # The adapter is off or merged.
        return
    upstream = torch.linspace(-1, 1, want.numel()).view_as(want)
    grads = [
        torch.autograd.grad((values * upstream).sum(), trained.values(), allow_unused=True)
        for values in (got, want)
    ]
    for name, a, b in zip(trained, *grads, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


def require_exact_or_refused(model):
    """Whether it is served; where it is not, the type of the output layer is named."""
    base = model.get_base_model()
    layer = type(base.get_output_embeddings())
    try:
        add_logprob_head(base)
    except HeadError as error:
        refusal = str(error)
    else:
        require_exact(model)
        return True
    assert f"{layer.__module__}.{layer.__qualname__}" in refusal
    return False


def with_adapter(model, config_class, targets, **options):
    return peft.get_peft_model(
        model, config_class(task_type="CAUSAL_LM", target_modules=targets, **options)
    )


def layer_configurations():
    """Every configuration of peft that targets modules by name, and can a Linear."""
    for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        if "target_modules" in {field.name for field in dataclasses.fields(config)}:
            yield kind.value, config


@pytest.mark.parametrize(("kind", "config"), layer_configurations())
def test_every_adapter_on_the_head_is_exact_or_refused(kind, config):
    try:
        model = with_adapter(llama(), config, ["lm_head"], **NEEDED.get(kind, {}))
    except (ValueError, TypeError) as error:
        pytest.skip(f"peft itself does not put it there: {error}")
    assert require_exact_or_refused(perturbed(model)) == (kind == "LORA")


def test_peft_puts_many_adapters_on_the_head():
    """The walk above is over something."""
    assert len(list(layer_configurations())) > 20


LORA = {
    "plain": (True, {}),
    "rank pattern": (True, {"rank_pattern": {"lm_head": 3}, "alpha_pattern": {"lm_head": 7}}),
    "rslora": (True, {"use_rslora": True}),
    "pissa": (True, {"init_lora_weights": "pissa"}),
    "olora": (True, {"init_lora_weights": "olora"}),
    "orthogonal": (True, {"init_lora_weights": "orthogonal"}),
    "dora": (False, {"use_dora": True}),
    "bias": (False, {"lora_bias": True}),
    "dropout": (False, {"lora_dropout": 0.1}),
    "alora": (False, {"alora_invocation_tokens": [5]}),
}


@pytest.mark.parametrize("name", LORA)
def test_every_kind_of_lora_on_the_head_is_exact_or_refused(name):
    is_served, options = LORA[name]
    torch.manual_seed(0)
    model = llama(32, 64)
    model.lm_head.bias = torch.nn.Parameter(torch.randn(64)) if name == "bias" else None
    model = with_adapter(model, peft.LoraConfig, ["lm_head"], **options)
    assert require_exact_or_refused(perturbed(model)) == is_served


def test_further_ways_to_change_the_head():
    """Copies by modules_to_save, trained tokens, several adapters, merged and switched off ones."""
    model = with_adapter(llama(32, 64), peft.LoraConfig, ["q_proj"], modules_to_save=["lm_head"])
    assert require_exact_or_refused(perturbed(model))
    with model.disable_adapter():
        assert require_exact_or_refused(model)
    model = with_adapter(
        llama(32, 64, tied=True), peft.LoraConfig, ["q_proj"], trainable_token_indices=[3, 4]
    )
    assert not require_exact_or_refused(perturbed(model))
    model = with_adapter(llama(32, 64), peft.LoraConfig, ["lm_head"])
    model.add_adapter("other", peft.LoraConfig(target_modules=["lm_head"]))
    model.base_model.set_adapter(["default", "other"])
    assert not require_exact_or_refused(perturbed(model))
    model = perturbed(with_adapter(llama(32, 64), peft.LoraConfig, ["lm_head"]))
    with model.disable_adapter():
        assert require_exact_or_refused(model)
    model.merge_adapter()
    assert require_exact_or_refused(model)
    model.disable_adapter_layers()
    assert not require_exact_or_refused(model)


@pytest.mark.parametrize("tying", [False, True])
def test_an_adapter_on_a_tied_embedding(tying):
    """The logits depend on the embedding's adapter exactly as far as peft ties it to the head."""
    model = with_adapter(
        llama(32, 64, tied=True), peft.LoraConfig, ["embed_tokens"], ensure_weight_tying=tying
    )
    require_exact_or_refused(perturbed(model))


def test_what_hangs_around_the_head_is_refused():
    model = llama(32, 64)
    model.lm_head.register_forward_hook(lambda layer, args, out: out * 2)
    with pytest.raises(HeadError, match="with a replaced forward or with hooks"):
        model(input_ids=IDS, labels=IDS, statistic="logprobs")
    model = llama(32, 64)
    model.lm_head.forward = lambda x: x
    with pytest.raises(HeadError, match="with a replaced forward or with hooks"):
        model(input_ids=IDS, labels=IDS, statistic="logprobs")
    model = llama(32, 64)
    parametrizations.weight_norm(model.lm_head)
    require_exact(model.eval())


class Quantised(torch.nn.Linear):
    """Stands for bitsandbytes' layers: a Linear by inheritance, with a forward of its own."""

    def forward(self, x):
        return super().forward(x)


def test_other_layers_are_refused_by_type():
    model = llama(32, 64)
    model.lm_head.__class__ = Quantised
    with pytest.raises(HeadError, match=r"test_heads\.Quantised.*Leave the lm_head out"):
        model(input_ids=IDS, labels=IDS, statistic="logprobs")
    model = llama(32, 64)
    model.lm_head.weight = torch.nn.Parameter(
        torch.zeros(64, 32, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(HeadError, match="quantised weight"):
        model(input_ids=IDS, labels=IDS, statistic="logprobs")


def test_the_trainer_refuses_before_training(model_folder, options):
    args = run.training_arguments(configs.build(configs.SFTConfig, options))
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    model = with_adapter(model, peft.LoHaConfig, ["lm_head"])
    with pytest.raises(HeadError, match=r"peft\.tuners\.loha\.layer\.Linear"):
        SFTTrainer(model, args)
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    model = with_adapter(model, peft.LoraConfig, ["q_proj"])
    model.merge_adapter()
    with pytest.raises(ConfigError, match="the adapter default is merged and would not train"):
        SFTTrainer(model, args)


def prompt_configurations():
    for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        if issubclass(config, peft.PromptLearningConfig):
            yield kind.value, config


@pytest.mark.parametrize(("kind", "config"), prompt_configurations())
def test_learned_prompts_are_refused_by_name(kind, config, options):
    try:
        model = peft.get_peft_model(
            llama(32, 64), config(task_type="CAUSAL_LM", num_virtual_tokens=2)
        )
    except (ValueError, TypeError) as error:
        pytest.skip(f"peft itself does not make it of its defaults: {error}")
    args = run.training_arguments(configs.build(configs.SFTConfig, options))
    with pytest.raises(ConfigError, match=rf"learned prompts \({config.__name__}\)"):
        SFTTrainer(model, args)


def masking(scale, value, by_bias=False):
    """A Llama whose logits are scaled, and ids from 60 on masked by a value."""

    class Masking(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * scale
            if value is not None and not by_bias:
                out.logits[..., 60:] = value
            return out

    model = llama(32, 64)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
        if by_bias:
            model.lm_head.bias = torch.nn.Parameter(torch.zeros(64))
            model.lm_head.bias[60:] = value
    model.__class__ = Masking
    return model


HUGE = (-float("inf"), torch.finfo(torch.float32).min, -1e9, -1e4, -65504.0)


@pytest.mark.parametrize("value", HUGE)
@pytest.mark.parametrize("scale", [1, 3])
def test_a_head_that_masks_ids_is_refused(value, scale):
    """By any huge number, which once widened the bound until a factor of 3 went unnoticed."""
    ids = re.escape("of 64 ids")
    with pytest.raises(HeadError, match=rf"fused head differ by up to .* {ids}.*or it masks ids"):
        add_logprob_head(masking(scale, value))


def test_a_scaled_head_is_refused_and_a_plain_one_is_not():
    with pytest.raises(HeadError, match="fused head differ"):
        add_logprob_head(masking(3, None))
    require_exact(add_logprob_head(masking(1, None)))


@pytest.mark.parametrize("value", HUGE)
def test_ids_masked_by_the_bias_are_served(value):
    """That is in the weight and bias: the factor beside it is still seen."""
    model = add_logprob_head(masking(1, value, by_bias=True))
    torch.testing.assert_close(
        model(input_ids=IDS, labels=IDS, statistic="logprobs")[:, :-1], own_logprobs(model)
    )
    with pytest.raises(HeadError, match="fused head differ"):
        add_logprob_head(masking(3, value, by_bias=True))
