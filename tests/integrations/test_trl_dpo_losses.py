"""The losses of TRL's DPO trainer, by its own code, against fastpo's on the same log-probs.

One trainer computes the loss of one batch again and again, its loss type, f-divergence, LD and WPO
settings changed in between. fastpo gets token log-probs from the logits of the same models. Both
compute in float32: a log-prob of ln V = 4.2 carries a few ulps, a sum of nine of them 1e-6, and the
loss beta = 0.1 of that, hence the bound; where the loss is large, its own ulps add as much.
"""

import itertools
import math

import pytest
import torch

from fastpo import losses
from fastpo.weights import ld_dpo_weights, wpo_weights

BOUND = 1e-6

pytestmark = pytest.mark.filterwarnings(
    "ignore:::(torch|trl|transformers|peft|accelerate|datasets|triton).*"
)

SMOOTHING, TAU, ALPHA, BETA = 0.07, 0.3, 0.3, 0.1

# TRL's name: fastpo's function of four sums, two counts and options.
OURS = {
    "sigmoid": lambda *x, **k: losses.dpo(*x[:4], **k),
    "hinge": lambda *x, **k: losses.hinge(*x[:4], **k),
    "ipo": losses.ipo,
    "exo_pair": lambda *x, **k: losses.exo_pair(*x[:4], label_smoothing=SMOOTHING, **k),
    "nca_pair": lambda *x, **k: losses.nca_pair(*x[:4], **k),
    "robust": lambda *x, **k: losses.robust(*x[:4], label_smoothing=SMOOTHING, **k),
    "bco_pair": lambda *x, **k: losses.bco_pair(*x[:4], **k),
    "sppo_hard": lambda *x, **k: losses.sppo_hard(*x[:4], **k),
    "aot": lambda *x, **k: losses.aot(*x[:4], label_smoothing=SMOOTHING, **k),
    "aot_unpaired": lambda *x, **k: losses.aot_unpaired(*x[:4], label_smoothing=SMOOTHING, **k),
    "apo_zero": lambda *x, **k: losses.apo_zero(*x[:4], **k),
    "apo_down": lambda *x, **k: losses.apo_down(*x[:4], **k),
    "discopop": lambda *x, **k: losses.discopop(*x[:4], tau=TAU, **k),
    "sigmoid_norm": losses.sigmoid_norm,
}
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
# TRL admits an f-divergence where log Z cancels in the difference of two rewards.
OF_DIFFERENCE = ("sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sigmoid_norm", "sft")
# Sorted losses have no pair to weigh. The sft loss is one expanded number that TRL then multiplies
# in place, which torch refuses: see test_wpo_with_sft_fails_in_trl.
WITHOUT_WPO = ("aot", "aot_unpaired", "sft")
CASES = [
    (loss, divergence)
    for loss, divergence in itertools.product((*OURS, "sft"), DIVERGENCES)
    if loss in OF_DIFFERENCE or divergence == "reverse_kl"
]

_cache = {}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors are tiny: threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def build(tiny_model, tiny_tokenizer, tmp_path):
    """Make a DPO trainer over four pairs of uneven lengths."""
    trl = pytest.importorskip("trl", exc_type=ImportError)
    datasets = pytest.importorskip("datasets", exc_type=ImportError)

    def words(start, count):
        return "".join(f" w{(start + 7 * i) % 61}" for i in range(count))

    rows = {
        "prompt": [f"w{i} w{i + 1}" for i in range(4)],
        "chosen": [words(3 * i, n) for i, n in enumerate((7, 2, 5, 1))],
        "rejected": [words(5 * i + 1, n) for i, n in enumerate((3, 6, 4, 8))],
    }

    def make(**options):
        _cache.clear()  # a trainer resets the state that all share through accelerate
        ref = tiny_model()
        with torch.no_grad():  # another model, so that log-ratios are not 0
            for parameter in ref.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
        config = trl.DPOConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            bf16=False,
            report_to=[],
            per_device_train_batch_size=4,
            **options,
        )
        return trl.DPOTrainer(
            model=tiny_model(),
            ref_model=ref,
            args=config,
            train_dataset=datasets.Dataset.from_dict(rows),
            processing_class=tiny_tokenizer,
        )

    return make


@pytest.fixture
def setting(build):
    """The trainer, its batch, and statistics of both models from their logits."""
    if not _cache:
        trainer = build(use_weighting=True, beta=BETA, discopop_tau=TAU)
        batch = next(iter(trainer.get_train_dataloader()))
        # A gap in a response, as tool calls leave: positions count tokens, not places.
        longest = batch["completion_mask"].sum(1).argmax()
        batch["completion_mask"][longest, batch["completion_mask"][longest].argmax() + 1] = 0
        _cache["setting"] = trainer, batch
    return _cache["setting"]


def statistics(trainer, batch):
    """[2B, T] log-probs of policy and reference, log sum p^2, and the mask."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    mask = batch["completion_mask"][:, 1:].bool()
    targets = batch["input_ids"][:, 1:, None]
    logps = trainer.model(**inputs).logits[:, :-1].log_softmax(-1)
    with torch.no_grad():
        ref_logps = trainer.ref_model(**inputs).logits[:, :-1].log_softmax(-1)
    policy, ref = (torch.where(mask, x.gather(2, targets)[..., 0], 0) for x in (logps, ref_logps))
    return policy, ref, (2 * logps.detach()).logsumexp(-1), mask


def fastpo_loss(stats, loss_type, divergence="reverse_kl", ld_alpha=None, use_weighting=False):
    """One loss type, by pair; its mean is TRL's loss."""
    policy, ref, log_sum_sq, mask = stats
    masks = mask.chunk(2)
    counts = [x.sum(1) for x in masks]
    options = dict(reduction="none")
    if loss_type == "sft":  # plain log-probs whatever the other settings
        return losses.sft(policy.chunk(2)[0].sum(1), counts[0], **options).loss
    weights = [x.float() for x in masks] if ld_alpha is None else ld_dpo_weights(*masks, ld_alpha)
    sums = [
        (values * weight).sum(1)
        for tokens in (policy, ref)
        for values, weight in zip(tokens.chunk(2), weights, strict=True)
    ]
    if divergence != "reverse_kl":
        scores = [losses.f_divergence_score(p - r, divergence, ALPHA)
                  for p, r in zip(sums[:2], sums[2:], strict=True)]  # fmt: skip
        sums = *scores, *map(torch.zeros_like, scores)
    loss = OURS[loss_type](*sums, *counts, beta=BETA, **options).loss
    if use_weighting:
        chosen, rejected = wpo_weights(policy.detach(), log_sum_sq, mask).chunk(2)
        loss = loss * chosen * rejected
    return loss


def trl_loss(setting, loss_types, weights=None, **settings):
    """TRL's own code on the batch."""
    trainer, batch = setting
    trainer.loss_types, trainer.loss_weights = loss_types, weights or [1.0] * len(loss_types)
    trainer.label_smoothing, trainer.f_alpha_divergence_coef = SMOOTHING, ALPHA
    trainer.f_divergence_type = settings.get("divergence", "reverse_kl")
    trainer.ld_alpha = settings.get("ld_alpha")
    trainer.use_weighting = settings.get("use_weighting", False)
    return trainer.compute_loss(trainer.model, dict(batch))


def assert_same(got, want, case):
    bound = BOUND * max(1.0, abs(want.item()))
    assert abs(got.item() - want.item()) <= bound, (case, got.item(), want.item())


@pytest.mark.parametrize(("loss", "divergence"), CASES)
def test_loss(setting, loss, divergence):
    seen = {}
    with torch.no_grad():
        stats = statistics(*setting)
        for ld_alpha, use_weighting in itertools.product((None, 0.0, 0.5, 1.0), (False, True)):
            if use_weighting and loss in WITHOUT_WPO:
                continue
            case = dict(divergence=divergence, ld_alpha=ld_alpha, use_weighting=use_weighting)
            want = trl_loss(setting, [loss], **case)
            assert_same(fastpo_loss(stats, loss, **case).mean(), want, case)
            seen[ld_alpha, use_weighting] = want.item()
    if loss != "sft":  # the settings do something, but for LD at 1
        assert seen.pop((1.0, False)) == pytest.approx(seen[None, False], rel=1e-6)
        seen.pop((1.0, True), None)
        pairs = itertools.combinations(seen.values(), 2)
        assert all(not math.isclose(x, y, rel_tol=1e-5) for x, y in pairs)


@pytest.mark.parametrize("loss", [*OURS, "sft"])
def test_gradient(setting, loss):
    """Of all weights of the model: what is held constant is the same."""
    trainer, batch = setting
    parameters = list(trainer.model.parameters())
    # TRL multiplies the output of its relu in place: see test_wpo_with_hinge_does_not_train_in_trl.
    for use_weighting in (False,) if loss in (*WITHOUT_WPO, "hinge") else (False, True):
        case = dict(use_weighting=use_weighting, ld_alpha=0.5)
        want = torch.autograd.grad(trl_loss(setting, [loss], **case), parameters)
        ours = fastpo_loss(statistics(trainer, batch), loss, **case).mean()
        got = torch.autograd.grad(ours, parameters)
        size = torch.cat([x.flatten() for x in want]).norm()
        error = torch.cat([(x - y).flatten() for x, y in zip(got, want, strict=True)]).norm()
        assert error <= 1e-5 * size, (loss, case, error / size)


MIXTURES = {
    "mpo_internvl": (["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0]),
    "rpo": (["sigmoid", "sft"], [1.0, 0.005]),
    "iterative_rpo": (["sigmoid", "sft"], [1.0, 1.0]),
    "three": (["ipo", "discopop", "aot"], [0.1, 0.7, -0.2]),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_mixture(setting, name):
    types, weights = MIXTURES[name]
    with torch.no_grad():
        stats = statistics(*setting)
        want = trl_loss(setting, types, weights)
        policy, ref, _, mask = stats
        sums = [x.sum(1) for tokens in (policy, ref) for x in tokens.chunk(2)]
        counts = [x.sum(1) for x in mask.chunk(2)]
        parts = {
            kind: losses.sft(sums[0], counts[0])
            if kind == "sft"
            else OURS[kind](*sums, *counts, beta=BETA)
            for kind in types
        }
        mixed = losses.mixture(parts, dict(zip(types, weights, strict=True))).loss
        assert_same(mixed, want, name)
        if name != "three":
            options = {"iterative_rpo": dict(nll_mean="token_mean")}.get(name, {})
            got = getattr(losses, name)(*sums, counts[0], beta=BETA, **options).loss
            assert_same(got, want, name)


def test_f_dpo(setting):
    with torch.no_grad():
        policy, ref, *_ = statistics(*setting)
        sums = [x.sum(1) for tokens in (policy, ref) for x in tokens.chunk(2)]
        for divergence in DIVERGENCES:
            want = trl_loss(setting, ["sigmoid"], divergence=divergence)
            got = losses.f_dpo(*sums, beta=BETA, divergence=divergence, alpha=ALPHA).loss
            assert_same(got, want, divergence)


def test_sft_is_the_mean_over_tokens(setting):
    with torch.no_grad():
        policy, _, _, mask = statistics(*setting)
        want = -policy.chunk(2)[0][mask.chunk(2)[0]].double().mean()
        assert_same(trl_loss(setting, ["sft"]), want, "sft")


def test_wpo_with_sft_fails_in_trl(setting):
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
        trl_loss(setting, ["sft"], use_weighting=True)


def test_wpo_with_hinge_does_not_train_in_trl(setting):
    loss = trl_loss(setting, ["hinge"], use_weighting=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_label_smoothing_does_not_reach_sigmoid_in_trl(setting):
    """TRL has no conservative DPO any more: fastpo's ``dpo`` with smoothing is another loss."""
    with torch.no_grad():
        policy, ref, *_ = statistics(*setting)
        sums = [x.sum(1) for tokens in (policy, ref) for x in tokens.chunk(2)]
        want = trl_loss(setting, ["sigmoid"])
        assert_same(losses.dpo(*sums, beta=BETA).loss, want, "sigmoid")
        smoothed = losses.dpo(*sums, beta=BETA, label_smoothing=SMOOTHING).loss
        assert not math.isclose(smoothed.item(), want.item(), rel_tol=1e-4)


@pytest.mark.parametrize("loss", [name for name in OURS if name not in OF_DIFFERENCE])
def test_trl_refuses_f_divergences(build, loss):
    with pytest.raises(ValueError, match="is only supported for the following loss types"):
        build(loss_type=loss, f_divergence_type="js_divergence", label_smoothing=SMOOTHING)


@pytest.mark.parametrize("loss", ["aot", "aot_unpaired"])
def test_trl_refuses_wpo_of_sorted_losses(build, loss):
    with pytest.raises(NotImplementedError, match="misalign per-pair weights"):
        build(loss_type=loss, use_weighting=True)


def test_trl_refuses_exo_without_smoothing(build):
    with pytest.raises(ValueError, match=r"must be greater than 0\.0"):
        build(loss_type="exo_pair")
