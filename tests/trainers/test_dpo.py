import copy
import inspect
import math
import re

import pytest
import torch
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config

from fastpo import losses
from fastpo.data.records import PAIR_FIELDS, load_rows
from fastpo.data.tokens import PairCollator, tokenize_rows
from fastpo.inputs import Input, inputs_of, plain
from fastpo.trainers import config as configs
from fastpo.trainers import dpo, run
from fastpo.trainers.base import NonFiniteLossError
from fastpo.trainers.dpo import DPOTrainer, loss_arguments, pair_losses
from fastpo.trainers.head import add_logprob_head
from fastpo.trainers.output_layer import HeadError


def load(options):
    return run.load_model(configs.build(configs.DPOConfig, options))


def batch(options, count=4, extra=False):
    tokenizer = run.load_tokenizer(options["model"])
    rows, _ = tokenize_rows(load_rows(options["data"], PAIR_FIELDS), PAIR_FIELDS, tokenizer, 64)
    further = {"extra_ids": [5, 6, 7]} if extra else {}
    return PairCollator(tokenizer.pad_token_id)([rows[i] | further for i in range(count)])


def trainer(options, model, **kwargs):
    args = run.training_arguments(configs.build(configs.DPOConfig, options))
    collator = PairCollator(0)
    return DPOTrainer(model, args, data_collator=collator, **kwargs)


def plain_sums(model, inputs, parts=2):
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    labels = inputs["labels"][:, 1:]
    logps = logits[:, :-1].log_softmax(-1)
    picked = logps.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    return (picked * (labels >= 0)).sum(1).chunk(parts)


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


# Options that have no default.
NEEDED = {
    "flex_dpo": {"beta_rejected": 0.2},
    "modpo": {"weights": [0.5, 0.25, 0.25]},
    "ofs_dpo": {"alpha": 0.1},
    "r_dpo": {"alpha": 0.1},
}


# Losses that are trained by subclasses alone: a further input is trained in the method, or its
# log-probs are not of whole responses.
SUBCLASSED = [n for n in pair_losses() if n not in dpo.LOSSES and not dpo.columns_of(n)]


def columns(loss):
    """Random numbers in each further column that a loss takes."""
    inputs = inputs_of(getattr(losses, loss))
    found = {}
    for name in sorted(dpo.columns_of(loss) - {*dpo.REFERENCE, "extra_ids"}):
        found[name] = torch.rand(4, 2) if inputs[name].is_sequence else torch.rand(4)
    if loss == "beta_dpo":  # Of the batch: what fastpo.weights.BetaDPO gives.
        found |= {"batch_beta": torch.tensor(0.3)}
    return found


@pytest.mark.parametrize("loss", [n for n in pair_losses() if n not in SUBCLASSED])
def test_every_loss_trains(options, loss):
    """With a further response and a column for each input that is not computed here."""
    inputs = batch(options, extra=True) | columns(loss)
    model = load(options)
    subject = trainer(options, model, loss=loss, loss_options=NEEDED.get(loss))
    loss = subject.compute_loss(model, inputs)
    loss.backward()
    assert loss.isfinite()
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0


@pytest.mark.parametrize("loss", SUBCLASSED)
def test_what_is_not_computed_is_named(options, loss):
    """Whatever columns there are, and before anything is loaded."""
    inputs = inputs_of(getattr(losses, loss))
    there = {*dpo.COMPUTED, *(name for name, x in inputs.items() if not x.is_trained)}
    match = rf"{loss} needs \w+( over .*, here it is over the whole|\. It is trained and not compu)"
    with pytest.raises(configs.ConfigError, match=match):
        dpo.require_inputs(loss, there)
    options |= {"model": "missing", "loss": loss, "loss_options": NEEDED.get(loss, {})}
    with pytest.raises(configs.ConfigError, match=match):
        run.train_dpo(configs.build(configs.DPOConfig, options))


TRAINED = [
    (loss, name)
    for loss in pair_losses()
    for name, x in inputs_of(getattr(losses, loss)).items()
    if x.is_trained and name not in dpo.COMPUTED
]


@pytest.mark.parametrize(("loss", "name"), TRAINED)
def test_a_column_never_stands_in_for_what_is_trained(loss, name):
    with pytest.raises(configs.ConfigError, match=f"{name} is trained in {loss}, a column of num"):
        dpo.columns_given(loss, {name: torch.rand(4)})


def test_trained_inputs_and_those_that_make_a_method_are_asked_for_in_training(options):
    """What the trainer says of a batch; a history makes the method, an empty one is none."""
    model, inputs = load(options), batch(options)
    empty = {f"history_{side}": torch.rand(4, 0) for side in ("chosen", "rejected")}
    lists = {"label": torch.rand(4, 2)}
    for loss, more, message in (
        ("ofs_dpo", {"slow_chosen": torch.rand(4)}, "slow_chosen is trained in ofs_dpo"),
        ("inpo", {}, "inpo needs history_chosen, which makes the method"),
        ("mnpo", empty, "mnpo needs history_chosen, which makes the method"),
        ("accelerated_po", empty, "accelerated_po needs history_chosen, which makes the method"),
        ("osp", lists, "label: expected a column of a number per pair, got"),
    ):
        subject = trainer(
            options, model, loss=loss, loss_options=NEEDED.get(loss), reference="copy"
        )
        with pytest.raises(configs.ConfigError, match=message):
            subject.compute_loss(model, inputs | more)


def value_and_gradient(loss, inputs, **options):
    """Of the inputs that a loss takes; the gradient of all log-probs of the policy."""
    function = getattr(losses, loss)
    policy = {name: inputs[name].clone().requires_grad_() for name in inputs.keys() & dpo.POLICY}
    known = inspect.signature(function).parameters
    given = {name: value for name, value in (inputs | policy).items() if name in known}
    value = function(**given, **options).loss
    leaves = [policy[name] for name in sorted(policy)]
    return value, torch.cat(torch.autograd.grad(value, leaves, materialize_grads=True))


@pytest.mark.parametrize("loss", [n for n in pair_losses() if n not in SUBCLASSED])
def test_every_loss_is_another_one_than_dpo_and_ipo(loss):
    """On random inputs with the same beta, unless the loss declares that they are equal."""
    torch.manual_seed(0)
    inputs = {n: -20 * torch.rand(4).double() for n in (*dpo.POLICY, *dpo.REFERENCE)}
    inputs |= {name: torch.randint(3, 9, (4,)) for name in dpo.COUNTS}
    inputs |= {name: torch.rand(4).double() for name in dpo.KLS}
    for name, values in columns(loss).items():
        inputs[name] = values.unbind(1) if values.ndim > 1 else values
    function = getattr(losses, loss)
    if not inputs_of(function).get("extra", Input()).is_required:
        del inputs["extra"], inputs["ref_extra"]
    known = inspect.signature(function).parameters
    beta = next((known[name].default for name in ("beta", "eta") if name in known), 0.1)
    value, gradient = value_and_gradient(loss, inputs, **NEEDED.get(loss, {}))
    for other, options in (("dpo", {}), ("ipo", {}), ("ipo", {"convention": "summed"})):
        plain_value, plain_gradient = value_and_gradient(other, inputs, beta=beta, **options)
        is_equal = torch.isclose(value, plain_value, rtol=1e-6)
        assert is_equal == torch.allclose(gradient, plain_gradient, rtol=1e-6)
        declared = other in (loss, plain(function, NEEDED.get(loss, {})))
        assert is_equal == (declared and not (loss == "ipo" and options)), other


def test_a_loss_that_is_a_plainer_one_says_so(options, capsys):
    model = load(options)
    trainer(options, model, loss="f_dpo")
    assert "loss: f_dpo with these options is dpo" in capsys.readouterr().out
    trainer(options, model, loss="f_dpo", loss_options={"divergence": "forward_kl"})
    assert "is dpo" not in capsys.readouterr().out


def test_columns_streams_and_extra_reach_the_loss(options):
    """What a loss gets by its arguments' names; columns never stand in for what is trained."""
    inputs = batch(options, extra=True)
    inputs |= {"label": torch.rand(4), "history_chosen": torch.rand(4, 3), "extra": torch.rand(4)}
    got = {}

    def loss(
        policy_chosen: torch.Tensor,
        policy_rejected: torch.Tensor,
        ref_chosen: torch.Tensor,
        rejected_counts: torch.Tensor,
        extra: torch.Tensor,
        ref_extra: torch.Tensor,
        label: torch.Tensor,
        history_chosen: list[torch.Tensor] = (),
        history_rejected: list[torch.Tensor] = (),
        scale: float = 1.0,
    ):
        got.update(locals())
        return losses.dpo(policy_chosen, policy_rejected, ref_chosen, ref_chosen)

    model = load(options)
    subject = trainer(options, model, loss=loss, loss_options={"scale": 2.0})
    subject.compute_loss(model, inputs)
    rows = {name: inputs[name] for name in ("input_ids", "attention_mask", "labels")}
    sums = plain_sums(model, rows, parts=3)
    for name, want in zip(("policy_chosen", "policy_rejected", "extra"), sums, strict=True):
        torch.testing.assert_close(got[name], want)
        assert got[name].requires_grad
    torch.testing.assert_close(got["ref_extra"], sums[2].detach())
    assert got["label"] is inputs["label"]
    assert [h.tolist() for h in got["history_chosen"]] == inputs["history_chosen"].T.tolist()
    assert got["history_rejected"] == ()
    assert got["scale"] == 2.0
    counts = (inputs["labels"][:, 1:] >= 0).sum(1).chunk(3)
    assert got["rejected_counts"].tolist() == counts[1].tolist()


def plain_kl(model, ref, inputs):
    """KL(ref || model) summed over the tokens of each response, from both logits."""
    names = ("input_ids", "attention_mask")
    log_p, log_q = (m(**{n: inputs[n] for n in names}).logits.log_softmax(-1) for m in (model, ref))
    kl = (log_q.exp() * (log_q - log_p)).sum(-1)[:, :-1]
    return (kl * (inputs["labels"][:, 1:] >= 0)).sum(1).chunk(2)


@pytest.mark.parametrize("reference", ["copy", "adapter"])
def test_losses_over_the_vocabulary_get_their_divergence(options, reference):
    """TDPO from both models' logits, and its gradients."""
    if reference == "adapter":
        options |= {"lora_r": 4}
    inputs, model = batch(options), load(options)
    subject = trainer(options, model, loss="tdpo2", reference=reference)
    ref = copy.deepcopy(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn_like(parameter)
    loss = subject.compute_loss(model, inputs)
    sums = [*plain_sums(model, inputs), *(x.detach() for x in plain_sums(ref, inputs))]
    want = losses.tdpo2(*sums, *plain_kl(model, ref, inputs)).loss
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    trained = [p for p in model.parameters() if p.requires_grad]
    for got, expected in zip(*(torch.autograd.grad(x, trained) for x in (loss, want)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)


def test_a_divergence_needs_the_reference_itself(options):
    with pytest.raises(configs.ConfigError, match=r"reference: the loss tdpo1 needs the whole voc"):
        trainer(options, load(options), loss="tdpo1", reference="cached")


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("sppo", "sppo needs chosen_win_rates. Give the rows a column chosen_win_rates, a number"),
        ("selm", "selm needs extra. Give the rows a column extra, a further response"),
        ("modpo", "modpo needs chosen_margins. Give the rows a column chosen_margins, a list per"),
    ],
)
def test_a_loss_that_needs_more_is_refused_before_anything_is_loaded(options, loss, message):
    options |= {"loss": loss, "model": "missing", "loss_options": NEEDED.get(loss, {})}
    with pytest.raises(configs.ConfigError, match=re.escape(message)):
        run.train_dpo(configs.build(configs.DPOConfig, options))


def test_a_loss_without_its_reference_columns_is_refused(options):
    model = load(options)
    subject = trainer(options, model, loss="dpo", reference="cached")
    match = r"dpo needs ref_chosen\. Set reference, or give the rows a column ref_chosen"
    with pytest.raises(configs.ConfigError, match=match):
        subject.compute_loss(model, batch(options))


def test_the_command_line_trains_with_any_loss_over_sums(options):
    """Options of a loss that have no flag of their own go by loss_options."""
    more = {"loss": "discopop", "loss_options": {"tau": "1e-1"}, "max_steps": 1}
    results = run.train_dpo(configs.build(configs.DPOConfig, options, more))
    assert math.isfinite(results["after"]["eval_loss"])
    with pytest.raises(configs.ConfigError, match=r"alpha: the loss r_dpo needs it.*loss_options"):
        loss_arguments("r_dpo")
    assert {"dpo", "ipo", "hinge", "simpo", "orpo"} <= set(dpo.LOSSES) < set(pair_losses())


# peft warns of an adapter on a tied head; here it is the case under test.
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("targets", ["all-linear", "q_proj,lm_head"])
def test_adapter_reference_is_the_base_model(options, targets):
    """With a trained LoRA, also on the head, the reference is the model that was loaded."""
    pytest.importorskip("peft")
    base = load(options)
    model = load(options | {"lora_r": 2, "lora_targets": targets})
    subject = trainer(options, model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.05)
    inputs = batch(options)
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
    with pytest.raises(HeadError, match=r"the output head is a .*\.Odd, and the fused head serves"):
        add_logprob_head(model)


def test_wrong_options_are_named(options):
    with pytest.raises(ValueError, match="gamma: the loss dpo has no such option"):
        loss_arguments("dpo", gamma=1.0)
    with pytest.raises(ValueError, match="needs a LoRA"):
        trainer(options, load(options), reference="adapter")
