"""Losses of TRL's trainers besides DPO against fastpo's, on the batch a trainer itself made.

Each test builds one trainer, changes its options from case to case and compares the loss it would
train on. Models are in float64 where the trainer's code keeps that. KTO's fused head and ORPO's
odds are float32, with values of order 1 summed from log-probs of order 10: hence 1e-6.

BCO is not here: TRL 1.16 has no BCO trainer any more. DPO's losses have a file of their own.
"""

import copy

import pytest
import torch

from fastpo import losses

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:::(torch|trl|transformers|peft|accelerate|datasets|triton).*"
    ),
    pytest.mark.filterwarnings("ignore:The installed version of:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*experimental:UserWarning"),
    pytest.mark.slow,
]
DOUBLE, SINGLE = 1e-12, 1e-6
PROMPTS = ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9", "w10 w11 w12"]
CHOSEN = [" w20 w21 w22 w23", " w24", " w25 w26 w27", " w28 w29"]
REJECTED = [" w30 w31", " w32 w33 w34", " w35", " w36 w37 w38 w39 w40"]
GOLD = [" w41 w42", " w43 w44 w45 w46", " w47", " w48 w49"]


@pytest.fixture
def models(tiny_model):
    """Policy and reference in float64 with other weights."""
    policy, ref = tiny_model().double(), tiny_model().double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in ref.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=generator)
    return policy, ref


@pytest.fixture
def build(tmp_path, tiny_tokenizer):
    """A function that makes a trainer and takes the first batch of its own data loader."""
    datasets = pytest.importorskip("datasets", exc_type=ImportError)

    def make(trainer_class, config_class, model, rows, **options):
        arguments = config_class(
            output_dir=str(tmp_path),
            use_cpu=True,
            bf16=False,
            report_to=[],
            per_device_train_batch_size=len(PROMPTS),
            gradient_checkpointing=False,
            disable_tqdm=True,
        )
        trainer = trainer_class(
            model=model,
            args=arguments,
            train_dataset=datasets.Dataset.from_dict(rows),
            processing_class=tiny_tokenizer,
            **options,
        )
        trainer.model.eval()
        return trainer, next(iter(trainer.get_train_dataloader()))

    return make


def sums_and_counts(model, input_ids, attention_mask, counted):
    """Summed log-probs of the tokens marked by ``counted``, and how many there are."""
    with torch.no_grad():
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits
    logps = logits[:, :-1].log_softmax(-1).gather(2, input_ids[:, 1:, None])[..., 0]
    counted = counted[:, 1:].bool()
    return torch.where(counted, logps, 0).sum(1), counted.sum(1)


def pair_statistics(model, batch):
    """Sums of chosen and rejected, then counts, of a batch of TRL's older collator."""
    parts = [
        sums_and_counts(
            model,
            batch[f"{side}_input_ids"],
            batch[f"{side}_attention_mask"],
            batch[f"{side}_labels"] != -100,
        )
        for side in ("chosen", "rejected")
    ]
    return [sums for sums, _ in parts] + [counts for _, counts in parts]


def assert_close(got, want, bound):
    want = want.item() if isinstance(want, torch.Tensor) else want
    assert abs(got.item() - want) <= bound * max(1.0, abs(want))


CPO_CASES = {
    "sigmoid": (dict(loss_type="sigmoid", beta=0.1), losses.cpo, dict(beta=0.1)),
    "smoothed": (
        dict(loss_type="sigmoid", beta=0.5, label_smoothing=0.1, cpo_alpha=0.3),
        losses.cpo,
        dict(beta=0.5, label_smoothing=0.1, cpo_alpha=0.3),
    ),
    "hinge": (dict(loss_type="hinge", beta=0.2), losses.cpo, dict(form="hinge", beta=0.2)),
    "ipo": (dict(loss_type="ipo", beta=0.7), losses.cpo, dict(form="ipo", beta=0.7)),
    "simpo": (
        dict(loss_type="simpo", beta=2.0, simpo_gamma=0.5),
        losses.cpo_simpo,
        dict(beta=2.0, gamma=0.5),
    ),
    "simpo, smoothed": (
        dict(loss_type="simpo", beta=2.0, simpo_gamma=0.5, label_smoothing=0.2, cpo_alpha=0.0),
        losses.simpo,
        dict(beta=2.0, gamma=0.5, label_smoothing=0.2),
    ),
    "alphapo": (
        dict(loss_type="simpo", beta=2.5, simpo_gamma=0.1, alpha=0.25, cpo_alpha=0.0),
        losses.alphapo,
        dict(beta=2.5, gamma=0.1, alpha=0.25),
    ),
    "alphapo, negative": (
        dict(loss_type="simpo", beta=2.5, simpo_gamma=0.1, alpha=-0.5, cpo_alpha=0.0),
        losses.alphapo,
        dict(beta=2.5, gamma=0.1, alpha=-0.5),
    ),
}


def test_cpo(models, build):
    cpo = pytest.importorskip("trl.experimental.cpo", exc_type=ImportError)
    rows = {"prompt": PROMPTS, "chosen": CHOSEN, "rejected": REJECTED}
    trainer, batch = build(cpo.CPOTrainer, cpo.CPOConfig, models[0], rows)
    statistics = pair_statistics(trainer.model, batch)
    assert statistics[0].dtype == torch.float64
    plain = dict(label_smoothing=0.0, cpo_alpha=1.0, alpha=0.0)
    for options, loss, arguments in CPO_CASES.values():
        vars(trainer).update(plain | options)
        want, metrics = trainer.get_batch_loss_metrics(trainer.model, batch)
        got = loss(*statistics, **arguments)
        assert_close(got.loss, want.detach(), DOUBLE)
        assert_close(got.chosen_rewards.mean(), metrics["rewards/chosen"], DOUBLE)
        assert_close(got.rejected_rewards.mean(), metrics["rewards/rejected"], DOUBLE)


def test_orpo(models, build):
    orpo = pytest.importorskip("trl.experimental.orpo", exc_type=ImportError)
    rows = {"prompt": PROMPTS, "chosen": CHOSEN, "rejected": REJECTED}
    trainer, batch = build(orpo.ORPOTrainer, orpo.ORPOConfig, models[0], rows)
    statistics = pair_statistics(trainer.model, batch)
    ids, mask = batch["chosen_input_ids"], batch["chosen_attention_mask"]
    nll_sums, nll_counts = sums_and_counts(trainer.model, ids, mask, mask)
    assert (nll_counts > statistics[2]).all()  # the prompt's tokens are counted as well
    for beta in (0.1, 1.0):
        trainer.beta = beta
        want, metrics = trainer.get_batch_loss_metrics(trainer.model, batch)
        got = losses.orpo(*statistics, beta=beta, nll_sums=nll_sums, nll_counts=nll_counts)
        assert_close(got.loss, want.detach(), SINGLE)
        assert_close(got.metrics["nll"], metrics["nll_loss"], SINGLE)
        assert_close(got.chosen_rewards.mean(), metrics["rewards/chosen"], SINGLE)


TPO_CASES = {
    "sigmoid": dict(loss_type="sigmoid", beta=0.01),
    "smoothed": dict(loss_type="sigmoid", beta=0.5, label_smoothing=0.1, tpo_alpha=0.4),
    "hinge": dict(loss_type="hinge", beta=0.2),
    "ipo": dict(loss_type="ipo", beta=0.7),
    "tpo-l": dict(loss_type="tpo-l", beta=2.0, tpo_l_gamma=0.5, label_smoothing=0.1),
}


def test_triple_po(models, build):
    tpo = pytest.importorskip("trl.experimental.tpo", exc_type=ImportError)
    rows = {"prompt": PROMPTS, "chosen": CHOSEN, "rejected": REJECTED, "reference": GOLD}
    trainer, batch = build(tpo.TPOTrainer, tpo.TPOConfig, models[0], rows)
    sums, counts = sums_and_counts(
        trainer.model, batch["input_ids"], batch["attention_mask"], batch["completion_mask"]
    )
    statistics = [*sums.chunk(3), *counts.chunk(3)]
    plain = dict(label_smoothing=0.0, tpo_alpha=1.0, tpo_l_gamma=0.5)
    for options in TPO_CASES.values():
        options = plain | options
        vars(trainer).update(options)
        want = trainer.compute_loss(trainer.model, dict(batch))
        form, gamma = options.pop("loss_type").replace("-", "_"), options.pop("tpo_l_gamma")
        got = losses.tpo_triple(*statistics, form=form, gamma=gamma, **options)
        assert_close(got.loss, want.detach(), DOUBLE)
        rewards = trainer._metrics["eval"]["rewards/chosen"][-1]
        assert_close(got.chosen_rewards.mean(), rewards, DOUBLE)


def test_kto(models, build):
    trl = pytest.importorskip("trl", exc_type=ImportError)
    policy, ref = (model.float() for model in models)
    plain = [copy.deepcopy(model).eval() for model in (policy, ref)]  # TRL changes their forward
    rows = {"prompt": PROMPTS, "completion": CHOSEN, "label": [True, False, False, True]}
    trainer, batch = build(trl.KTOTrainer, trl.KTOConfig, policy, rows, ref_model=ref)
    names = ("input_ids", "attention_mask", "completion_mask")
    sums, mismatched = (
        [sums_and_counts(model, *(batch[prefix + name] for name in names))[0] for model in plain]
        for prefix in ("", "KL_")
    )
    kl = (mismatched[0] - mismatched[1]).mean()
    assert kl > 0.01  # else the reference point would not be tested
    both = torch.as_tensor(batch["label"]).bool()
    cases = ((both, 0.1, 1.0, 1.0), (both, 0.5, 2.0, 0.5), (torch.ones_like(both), 0.5, 1.0, 1.0))
    for desirable, beta, *weights in cases:
        trainer.beta, trainer.desirable_weight, trainer.undesirable_weight = beta, *weights
        for loss_type, loss, extra in (
            ("kto", losses.kto, (kl,)),
            ("apo_zero_unpaired", losses.apo_zero_unpaired, ()),
        ):
            trainer.loss_type, trainer.calculate_KL = loss_type, loss_type == "kto"
            want = trainer.compute_loss(trainer.model, batch | {"label": desirable})
            got = loss(*sums, desirable, *extra, beta, *weights)
            assert_close(got.loss, want.detach(), SINGLE)
            rewards = trainer._metrics["eval"]["rewards/chosen"][-1]
            assert_close(got.rewards[desirable].mean(), rewards, SINGLE)


@pytest.fixture
def reward_model(tiny_model):
    transformers = pytest.importorskip("transformers")
    config = tiny_model().config
    config.num_labels = 1
    torch.manual_seed(0)
    return transformers.LlamaForSequenceClassification(config).double()


def test_reward_model(reward_model, build):
    trl = pytest.importorskip("trl", exc_type=ImportError)
    rows = {"chosen": [*map("".join, zip(PROMPTS, CHOSEN, strict=True))]}
    rows["rejected"] = [*map("".join, zip(PROMPTS, REJECTED, strict=True))]
    rows["margin"] = [1.0, 0.5, 0.0, 0.25]
    trainer, batch = build(trl.RewardTrainer, trl.RewardConfig, reward_model, rows)
    margins = batch.pop("margin")
    with torch.no_grad():
        scores = trainer.model(**batch).logits[:, 0].chunk(2)
    for coefficient in (None, 0.01, 1.0):
        trainer.args.center_rewards_coefficient = coefficient
        for inputs, extra, plain in (
            (batch, (), losses.rm_bt),
            (batch | {"margin": margins}, (margins,), losses.rm_margin),
        ):
            want = trainer.compute_loss(trainer.model, dict(inputs))
            if coefficient:
                got = losses.rm_center(*scores, *extra, coefficient=coefficient)
            else:
                got = plain(*scores, *extra)
            assert_close(got.loss, want.detach(), DOUBLE)
