"""The router loss of mixtures of experts: in the loss as the model's own forward adds it."""

import inspect

import pytest
import torch
from test_reference_drift import BATCH, IDS, dpo
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from fastpo.trainers import config as configs
from fastpo.trainers import run
from fastpo.trainers.grpo import GRPOTrainer
from fastpo.trainers.head import add_logprob_head, router_loss_weight
from fastpo.trainers.output_layer import HeadError
from fastpo.trainers.sft import SFTTrainer

# Sizes by the names that configurations give them; each takes those it knows.
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32, "shared_intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 4,
    "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_k": 2, "kv_channels": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def mixtures():
    """Every causal LM of transformers whose forward knows of router logits."""
    for config, classes in MODEL_FOR_CAUSAL_LM_MAPPING.items():
        for cls in classes if isinstance(classes, tuple) else (classes,):
            if "output_router_logits" in inspect.signature(cls.forward).parameters:
                yield config, cls


def make(config_class, cls, **options):
    known = inspect.signature(config_class.__init__).parameters
    known = {*known, *getattr(config_class, "__dataclass_fields__", ())}
    sizes = {name: value for name, value in SIZES.items() if name in known}
    config = config_class(**sizes)
    text = config.get_text_config()
    text.output_router_logits = True
    for name in ("router_aux_loss_coef", "aux_loss_coef"):
        if hasattr(text, name):
            setattr(text, name, 0.5)
    torch.manual_seed(0)
    return cls(config).float().eval()


def own_loss(model):
    inputs = {name: BATCH[name] for name in ("input_ids", "attention_mask", "labels")}
    return model(**inputs)


@pytest.mark.parametrize(("config", "cls"), mixtures())
def test_every_mixture_has_its_own_loss_or_is_refused(config, cls):
    """Value and gradient, of the routers too, or an error with the model's name."""
    try:
        model = make(config, cls)
        own = own_loss(model)
    except Exception as error:
        pytest.skip(f"transformers has no model of these sizes: {error}")
    trained = list(model.parameters())
    want = torch.autograd.grad(own.loss, trained, allow_unused=True)
    add_logprob_head(model)
    if own.aux_loss is None:
        with pytest.raises(HeadError, match=rf"{cls.__name__}: output_router_logits asks for"):
            router_loss_weight(model)
        return
    assert router_loss_weight(model) == 0.5
    inputs = {name: BATCH[name] for name in ("input_ids", "attention_mask", "labels")}
    nll_sum, router_loss = model(**inputs, statistic="nll_sum", with_router_loss=True)
    loss = nll_sum / (BATCH["labels"][:, 1:] >= 0).sum() + 0.5 * router_loss
    torch.testing.assert_close(loss, own.loss)
    got = torch.autograd.grad(loss, trained, allow_unused=True)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def mixtral(weight=0.5, asked=True):
    model = make(MixtralConfig, MixtralForCausalLM)
    model.router_aux_loss_coef = model.config.router_aux_loss_coef = weight
    model.config.output_router_logits = asked
    return model


@pytest.fixture
def args(options):
    return run.training_arguments(configs.build(configs.SFTConfig, options))


@pytest.mark.parametrize("asked", [True, False])
def test_fitting_has_the_models_own_loss(asked, args):
    """In training and evaluation; nothing is added unless the config asks for it."""
    model = mixtral(asked=asked)
    own = own_loss(model)
    trainer = SFTTrainer(model, args)
    assert trainer.router_weight == (0.5 if asked else 0)
    torch.testing.assert_close(trainer.compute_loss(model, BATCH), own.loss)
    torch.testing.assert_close(trainer.prediction_step(model, BATCH, True)[0], own.loss.detach())
    # A share of a step of two batches, whose tokens are counted together.
    trainer.current_gradient_accumulation_steps = 2
    tokens = (BATCH["labels"][:, 1:] >= 0).sum()
    half = trainer.compute_loss(model, BATCH, num_items_in_batch=2 * tokens)
    torch.testing.assert_close(2 * half, own.loss)


def test_pairs_add_the_router_loss(args):
    """TRL adds it so, of chosen and rejected responses together."""
    router_loss = own_loss(mixtral()).aux_loss
    with_, without = (
        dpo(model := mixtral(asked=asked), args).compute_loss(model, BATCH)
        for asked in (True, False)
    )
    torch.testing.assert_close(with_ - without, 0.5 * router_loss)


class _NoRollout:
    def __len__(self):
        return 4


@pytest.mark.parametrize("forward_rows", [0, 2])
def test_groups_add_the_router_loss(forward_rows, args):
    """The mean over the forwards of an optimiser step."""
    rows = torch.tensor(len(IDS))
    batch = BATCH | {
        "advantages": torch.tensor([1.0, -1.0, 0.5, -0.5]), "rows": len(IDS), "all_rows": rows,
        "all_filled": rows, "metrics": {}, "row": torch.arange(4),
    }  # fmt: skip
    del batch["index"]
    losses, parts = [], []
    for asked in (True, False):
        model = mixtral(asked=asked)
        options = {"rollout": _NoRollout(), "pad_id": 0, "forward_rows": forward_rows}
        trainer = GRPOTrainer(model, args, **options)
        trainer.current_gradient_accumulation_steps = 3
        pieces = trainer._forwards(batch)
        tokens = (BATCH["labels"][:, 1:] >= 0).sum()
        losses.append(
            sum(trainer.compute_loss(model, p, num_items_in_batch=tokens) for p in pieces)
        )
    for piece in pieces:
        inputs = {name: piece[name] for name in ("input_ids", "attention_mask")}
        parts.append(mixtral()(**inputs).aux_loss)
    torch.testing.assert_close(losses[0] - losses[1], 0.5 * sum(parts) / len(parts) / 3)


def test_a_further_part_of_a_models_own_loss_is_refused():
    """Such as Bamba's z-loss; here of any model whose loss is not the mean NLL."""

    class Penalised(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            if out.loss is not None:
                out.loss = out.loss + 0.01 * out.logits.logsumexp(-1).pow(2).mean()
            return out

    config = LlamaConfig(**{n: v for n, v in SIZES.items() if hasattr(LlamaConfig(), n)})
    model = add_logprob_head(Penalised(config))
    with pytest.raises(HeadError, match="Penalised: its own loss differs by"):
        router_loss_weight(model)
