"""The reference is the model as it was when training began, whatever of it trains."""

import copy
import dataclasses
import math

import pytest
import torch
from test_heads import LORA, NEEDED, llama, perturbed, with_adapter
from transformers import AutoModelForCausalLM

from fastpo import losses
from fastpo.diffusion._adapters import adapters_switched, kept_adapters, outside_adapters
from fastpo.diffusion.references import AdapterOff
from fastpo.trainers import config as configs
from fastpo.trainers import run
from fastpo.trainers.config import ConfigError
from fastpo.trainers.dpo import DPOTrainer
from fastpo.trainers.grpo import GRPOTrainer
from fastpo.trainers.head import shift_labels

peft = pytest.importorskip("peft")
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

IDS = torch.arange(1, 25).view(4, 6)
BATCH = {
    "input_ids": IDS,
    "attention_mask": torch.ones_like(IDS),
    "labels": IDS.where(torch.arange(6) > 1, -100),
    "index": torch.arange(2),
    "row": torch.arange(2),
}


@pytest.fixture
def args(options):
    return run.training_arguments(configs.build(configs.DPOConfig, options))


def dpo(model, args, **kwargs):
    return DPOTrainer(model.eval(), args, loss=losses.dpo, loss_options={"beta": 1.0}, **kwargs)


def train(trainer, steps=3):
    """Some steps of all that requires a gradient; the loss at the start and the margins after."""
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=0.02), []
    for _ in range(steps):
        losses.append(trainer.compute_loss(trainer.model, BATCH))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    values = trainer.compute_loss(trainer.model, BATCH, return_outputs=True)[1]
    return losses[0].item(), (values[:, 2] - values[:, 3]).detach()


def margins_to(initial, model):
    """beta (policy - initial) log-ratios of the pairs, through the logits of two models."""
    sums = []
    for each in (model, initial):
        logps = each(input_ids=IDS).logits.log_softmax(-1)[:, :-1]
        picked = logps.gather(-1, IDS[:, 1:, None]).squeeze(-1)
        sums.append((picked * (BATCH["labels"][:, 1:] >= 0)).sum(1))
    chosen, rejected = (sums[0] - sums[1]).chunk(2)
    return (chosen - rejected).detach()


def head_trains(model):
    model = with_adapter(model, peft.LoraConfig, ["q_proj"])
    model.get_output_embeddings().weight.requires_grad_(True)
    return model


def norms_train(model):
    model = with_adapter(model, peft.LoraConfig, ["q_proj"])
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.requires_grad_(True)
    return model


def biased(**options):
    def make(model):
        for layer in (model.lm_head, model.model.layers[0].self_attn.q_proj):
            layer.bias = torch.nn.Parameter(torch.zeros(layer.out_features))
        return with_adapter(model, peft.LoraConfig, ["q_proj"], **options)

    return make


DRIFTING = {
    "bias all": biased(bias="all"),
    "bias of lora": biased(bias="lora_only"),
    "head": head_trains,
    "norms": norms_train,
}


@pytest.mark.parametrize("name", DRIFTING)
def test_what_trains_beside_the_adapter_takes_a_copy(name, args, capsys):
    """With one line; the adapter switched off is refused by name."""
    model = DRIFTING[name](llama(32, 64))
    initial = copy.deepcopy(model).eval()
    with pytest.raises(ConfigError, match=r"'adapter' would drift: \d+ parameters outside it"):
        dpo(model, args, reference="adapter")
    capsys.readouterr()
    trainer = dpo(model, args)
    assert trainer.reference == "copy"
    assert "reference: a frozen copy, as the adapter switched off would" in capsys.readouterr().out
    start, margins = train(trainer)
    assert start == pytest.approx(math.log(2), abs=1e-5)
    torch.testing.assert_close(margins, margins_to(initial, model), rtol=1e-4, atol=1e-4)
    assert margins.abs().min() > 0.005


def configurations():
    for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        if "target_modules" in {field.name for field in dataclasses.fields(config)}:
            yield kind.value, config


@pytest.mark.parametrize(("kind", "config"), configurations())
def test_every_adapter_is_switched_off_whole_or_known_to_drift(kind, config):
    """Off it leaves the model below, wherever it was trained to; flags are as before."""
    base = llama().eval()
    try:
        model = with_adapter(copy.deepcopy(base), config, ["k_proj"], **NEEDED.get(kind, {}))
        perturbed(model)(input_ids=IDS)
    except (ValueError, TypeError, RuntimeError) as error:
        pytest.skip(f"peft itself does not run it so: {error}")
    flags = [p.requires_grad for p in model.parameters()]
    with torch.no_grad(), adapters_switched(model, kept_adapters(model)):
        off = model(input_ids=IDS).logits
    drifts = any(p.requires_grad for p in outside_adapters(model).values())
    assert drifts or torch.equal(off, base(input_ids=IDS).logits)
    assert flags == [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize("name", ["plain", "rslora", "pissa", "olora", "orthogonal", "dora"])
def test_every_kind_of_lora_has_the_initial_model_as_reference(name, args, capsys):
    """Some initialise by taking a part out of the weights below them."""
    model = with_adapter(llama(32, 64), peft.LoraConfig, ["q_proj", "k_proj"], **LORA[name][1])
    initial = copy.deepcopy(model).eval()
    trainer = dpo(model, args)
    start, margins = train(trainer, steps=2)
    assert start == pytest.approx(math.log(2), abs=1e-4)
    torch.testing.assert_close(margins, margins_to(initial, model), rtol=1e-3, atol=1e-3)
    said = "the model without its adapter differs" in capsys.readouterr().out
    assert said == (trainer.reference == "copy")
    assert trainer.reference == "adapter" or name in ("pissa", "olora", "orthogonal")


def stacked():
    """A LoRA of supervised training, frozen, with one on top of it that trains."""
    model = with_adapter(llama(32, 64), peft.LoraConfig, ["q_proj", "v_proj"])
    perturbed(model)
    model.add_adapter("dpo", peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    model.base_model.set_adapter(["default", "dpo"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".dpo." in name)
    return model


@pytest.mark.parametrize("reference", [None, "adapter", "copy"])
def test_a_lora_on_a_frozen_lora_keeps_that_in_the_reference(reference, args):
    model = stacked()
    initial = copy.deepcopy(model).eval()
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    trainer = dpo(model, args, reference=reference)
    assert trainer.reference == (reference or "adapter")
    start, margins = train(trainer)
    assert start == pytest.approx(math.log(2), abs=1e-5)
    torch.testing.assert_close(margins, margins_to(initial, model), rtol=1e-4, atol=1e-4)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert model.base_model.active_adapters == ["default", "dpo"]


def test_an_adapter_trained_before_is_part_of_the_reference(args, capsys):
    """As in TRL; by name the reference is the model below it, which is said."""
    model = perturbed(with_adapter(llama(32, 64), peft.LoraConfig, ["q_proj", "v_proj"]))
    trainer = dpo(model, args)
    assert trainer.reference == "copy"
    assert train(trainer)[0] == pytest.approx(math.log(2), abs=1e-5)
    assert "differs from the model as it is now; the reference is a copy" in capsys.readouterr().out
    assert dpo(model, args, reference="adapter").reference == "adapter"
    assert "the reference is the former" in capsys.readouterr().out


def test_copies_of_modules_are_switched_off_with_the_adapter(args):
    model = with_adapter(
        llama(32, 64), peft.LoraConfig, ["q_proj"], modules_to_save=["lm_head", "embed_tokens"]
    )
    initial = copy.deepcopy(model).eval()
    trainer = dpo(model, args)
    assert trainer.reference == "adapter"
    _, margins = train(trainer)
    torch.testing.assert_close(margins, margins_to(initial, model), rtol=1e-4, atol=1e-4)


def test_what_is_made_trainable_later_is_refused_where_the_reference_is_used(args):
    model = with_adapter(llama(32, 64), peft.LoraConfig, ["q_proj"])
    trainer = dpo(model, args)
    model.get_output_embeddings().weight.requires_grad_(True)
    with pytest.raises(ConfigError, match=r"would drift: 1 parameters outside it train"):
        trainer.compute_loss(model, BATCH)


def test_divergences_take_the_whole_head_of_a_copy(args):
    """A LoRA on the lm_head that was trained before belongs to the reference's distribution."""
    model = perturbed(with_adapter(llama(32, 64), peft.LoraConfig, ["lm_head", "q_proj"]))
    trainer = DPOTrainer(model, args, loss="tdpo2")
    assert trainer.reference == "copy"
    # KL(reference || policy) of a model to itself.
    _, kl = model(
        **{name: BATCH[name] for name in ("input_ids", "labels")},
        statistic="logprobs_and_kl",
        reference=trainer.reference_statistics(model, BATCH, shift_labels(BATCH["labels"]) >= 0)[1],
    )
    assert kl.abs().max() < 1e-5


class _NoRollout:
    def __len__(self):
        return 4


@pytest.mark.parametrize("name", DRIFTING)
def test_groups_take_the_same_reference(name, args):
    options = {"rollout": _NoRollout(), "pad_id": 0, "loss_options": {"beta": 0.1}}
    model = DRIFTING[name](llama(32, 64))
    with pytest.raises(ConfigError, match="'adapter' would drift"):
        GRPOTrainer(model, args, reference="adapter", **options)
    assert GRPOTrainer(model, args, **options).ref_model is not None
    # Without a use of it none is made.
    options["loss_options"] = {}
    assert GRPOTrainer(model, args, **options).ref_model is None


def test_the_cache_holds_the_model_as_it_is(options, tmp_path):
    """As the copy does, of an adapter that was trained before."""
    from fastpo.data.records import PAIR_FIELDS, load_rows
    from fastpo.data.tokens import PairCollator, tokenize_rows
    from fastpo.trainers import reference

    model = AutoModelForCausalLM.from_pretrained(options["model"])
    model = perturbed(with_adapter(model, peft.LoraConfig, ["q_proj"]))
    tokenizer = run.load_tokenizer(options["model"])
    rows, _ = tokenize_rows(load_rows(options["data"], PAIR_FIELDS), PAIR_FIELDS, tokenizer, 64)
    args = run.training_arguments(configs.build(configs.DPOConfig, options))
    collator = PairCollator(tokenizer.pad_token_id)
    trainer = DPOTrainer(model, args, reference="cached", data_collator=collator)
    cached = reference.add_cached(trainer, rows.select(range(4)), "train", tmp_path)
    batch = collator([cached[i] for i in range(4)])
    assert trainer.compute_loss(model.eval(), batch).item() == pytest.approx(math.log(2), abs=1e-5)
    perturbed(model)
    with pytest.raises(reference.ReferenceCacheError, match="another model"):
        reference.add_cached(trainer, rows.select(range(4)), "train", tmp_path)


def test_the_denoisers_reference_drifts_nowhere():
    """AdapterOff keeps a frozen adapter, by itself or by name, and refuses what would drift."""
    policy = stacked()
    with torch.no_grad():
        initial = policy(input_ids=IDS).logits
        perturbed_policy = perturbed(policy)
    for reference in (AdapterOff(policy), AdapterOff(policy, adapter="default")):
        torch.testing.assert_close(reference.predict(input_ids=IDS).logits, initial)
    assert not torch.allclose(perturbed_policy(input_ids=IDS).logits, initial, atol=1e-3)
    with pytest.raises(ValueError, match=r"adapter: expected an active adapter \(default, dpo\)"):
        AdapterOff(policy, adapter="missing")
    with pytest.raises(ValueError, match="expected one adapter that trains, the learner's"):
        AdapterOff(policy, adapter="dpo")
    policy.base_model.set_adapter(["default", "dpo"])
    with pytest.raises(ValueError, match="Freeze the one that the reference keeps and name it"):
        AdapterOff(policy)
    for make in DRIFTING.values():
        with pytest.raises(ValueError, match=r"parameters outside it that train"):
            AdapterOff(make(llama(32, 64)))
    policy = with_adapter(llama(32, 64), peft.LoraConfig, ["q_proj"])
    reference = AdapterOff(policy)
    policy.get_output_embeddings().weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"1 parameters outside it that train"):
        reference.predict(input_ids=IDS)
