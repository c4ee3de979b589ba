"""A causal LM whose forward returns log-probs or a likelihood instead of logits.

The statistic is computed inside the model's own forward, because that is where wrappers (peft,
DistributedDataParallel, FSDP) have their hooks: parameters are gathered and gradients reduced as
ever.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastpo
from fastpo.data.tokens import IGNORED
from fastpo.trainers.output_layer import HeadError, output_head

STATISTICS = ("logprobs", "nll_sum", "reference", "logprobs_and_kl", "logprobs_and_entropy")
# Config entries that multiply the logits, in transformers' models.
_MULTIPLIERS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
# What transformers' mixtures of experts, or their configs, call the weight of the router loss.
_ROUTER_WEIGHTS = ("router_aux_loss_coef", "aux_loss_coef")


class Reference(NamedTuple):
    """What the divergence of another model from this one needs: hidden states and the head."""

    hidden_BTH: Tensor
    weight_VH: Tensor
    bias_V: Tensor | None


def shift_labels(labels: Tensor) -> Tensor:
    """Targets [B, T] of labels [B, T]: at each position the label of the next, -100 at the end.

    >>> shift_labels(torch.tensor([[-100, 5, 6]]))
    tensor([[   5,    6, -100]])
    """
    return nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)


def head_options(config: Any) -> dict[str, float | None]:
    """``logit_scale`` and ``softcap`` for :func:`fastpo.linear_logprobs` from a model's config."""
    config = config.get_text_config()
    scale = next((s for n in _MULTIPLIERS if (s := getattr(config, n, None)) is not None), None)
    scaling = getattr(config, "logits_scaling", None)
    if scale is None and scaling is not None:
        # Granite and MiniCPM3 divide by it, HyperCLOVA X multiplies.
        scale = scaling if config.model_type == "hyperclovax" else 1 / scaling
    return {
        "logit_scale": 1.0 if scale is None else float(scale),
        "softcap": getattr(config, "final_logit_softcapping", None),
    }


def _hidden_and_router_loss(
    model: nn.Module, own_forward: Callable, inputs: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Last hidden states [B, T, H], and the router loss [] as the model's own forward forms it."""
    backbone, seen = getattr(model, model.base_model_prefix), []
    hook = backbone.register_forward_hook(lambda _, args, out: seen.append(out.last_hidden_state))
    try:
        out = own_forward(model, **inputs, use_cache=False, logits_to_keep=1)
    finally:
        hook.remove()
    return seen[0], out.aux_loss


def _statistic(
    model: nn.Module,
    own_forward: Callable,
    statistic: str,
    labels: Tensor,
    reference: Reference | None = None,
    temperature: float = 1.0,
    with_router_loss: bool = False,
    **inputs: Tensor,
) -> Any:
    """One of ``STATISTICS``, without logits, and the router loss beside it if asked for."""
    if statistic not in STATISTICS:
        raise ValueError(f"statistic: expected one of {', '.join(STATISTICS)}, got {statistic!r}.")
    if with_router_loss:
        hidden_BTH, router_loss = _hidden_and_router_loss(model, own_forward, inputs)
        found = _statistic_of(model, hidden_BTH, statistic, labels, reference, temperature)
        return found, router_loss
    backbone = getattr(model, model.base_model_prefix)
    hidden_BTH = backbone(**inputs, use_cache=False).last_hidden_state
    return _statistic_of(model, hidden_BTH, statistic, labels, reference, temperature)


def _statistic_of(
    model: nn.Module,
    hidden_BTH: Tensor,
    statistic: str,
    labels: Tensor,
    reference: Reference | None,
    temperature: float,
) -> Any:
    weight_VH, bias_V, lora = output_head(model)
    # Norms and adapters may be kept in float32 beside a bfloat16 head; autocast casts by itself.
    dtype = weight_VH.dtype
    if not torch.is_autocast_enabled(hidden_BTH.device.type):
        hidden_BTH = hidden_BTH.to(dtype)
        lora = lora and fastpo.LoRA(lora.a.to(dtype), lora.b.to(dtype), lora.scaling)
    options = head_options(model.config) | {"temperature": temperature}
    targets_BT = shift_labels(labels)
    if statistic == "nll_sum" and lora is None:
        return fastpo.linear_nll(
            hidden_BTH, weight_VH, targets_BT, bias_V, reduction="sum", **options
        )
    options["lora"] = lora
    if statistic == "logprobs_and_entropy":
        outputs = ("logprobs", "entropy")
        stats = fastpo.linear_token_stats(
            hidden_BTH, weight_VH, targets_BT, bias_V, outputs=outputs, **options
        )
        return stats.logprobs, stats.entropy
    logprobs_BT = fastpo.linear_logprobs(hidden_BTH, weight_VH, targets_BT, bias_V, **options)
    if statistic == "nll_sum":
        return -logprobs_BT.sum()
    if statistic == "reference":
        if lora is not None:
            # hidden @ weight.T + s (hidden @ a.T) @ b.T is one product of wider operands.
            low_BTr = lora.scaling * (hidden_BTH @ lora.a.T)
            hidden_BTH = torch.cat([hidden_BTH, low_BTr.to(hidden_BTH.dtype)], -1)
            weight_VH = torch.cat([weight_VH, lora.b.to(dtype)], 1)
        return logprobs_BT, Reference(hidden_BTH, weight_VH, bias_V)
    if statistic == "logprobs_and_kl":
        kl_BT = fastpo.linear_divergence(
            hidden_BTH, weight_VH, *reference[:2], bias_V, reference.bias_V,
            kind="forward_kl", mask=targets_BT != IGNORED, **options,
        )  # fmt: skip
        return logprobs_BT, kl_BT
    return logprobs_BT


def add_logprob_head(model: nn.Module) -> nn.Module:
    """Let ``model(..., labels=labels, statistic="logprobs")`` return log-probs; call before peft.

    ``statistic="logprobs"`` gives [B, T] float32, at position t the log-prob in nats of label
    t + 1, 0 where that label is -100; ``"nll_sum"`` gives the negative sum of these.
    ``"reference"`` gives the log-probs and a :class:`Reference`, and ``"logprobs_and_kl"`` with
    ``reference=`` such a one of a model with the same vocabulary gives the log-probs and the
    KL(reference || model) [B, T] over the vocabulary, in nats, 0 likewise.
    ``"logprobs_and_entropy"`` gives the log-probs and the entropy [B, T], in nats, both
    differentiable. ``temperature=`` divides the logits. With ``with_router_loss=True`` the router
    loss [] of a mixture of experts comes beside the statistic, see :func:`router_loss_weight`.
    Without ``statistic`` the forward is the model's own. The class of the model becomes a subclass
    of the same name, so copies, checkpoints and generation work as before.

    Args:
        model: a transformers causal LM whose logits are a linear head on its base model's output.

    Returns:
        The same model.

    Raises:
        HeadError: a ValueError too. The output layer is of a kind that is not served, or the fused
            head's log-probs are not those of the model's own logits on a short probe.
        ValueError: ``forward`` was replaced before.
    """
    cls = type(model)
    output_head(model)
    if getattr(cls, "has_logprob_head", False):
        return model
    if "forward" in vars(model):
        remedy = "Call add_logprob_head first, and load without a device_map over several devices."
        raise ValueError(f"the forward of this {cls.__name__} was already replaced. {remedy}")

    @functools.wraps(cls.forward)
    def forward(self, *args, statistic=None, **kwargs):
        if statistic is None:
            return cls.forward(self, *args, **kwargs)
        return _statistic(self, cls.forward, statistic, *args, **kwargs)

    members = {"forward": forward, "has_logprob_head": True, "__module__": cls.__module__}
    model.__class__ = type(cls.__name__, (cls,), members)
    with probing(model) as ids_BT:
        _check_against_logits(model, ids_BT)
    return model


@contextlib.contextmanager
def probing(model: nn.Module) -> Iterator[Tensor]:
    """A few token ids [B, T] to try a model on, without gradient and in eval mode."""
    was_training = model.training
    device = model.get_output_embeddings().weight.device
    vocab = model.config.get_text_config().vocab_size
    model.eval()
    try:
        with torch.no_grad():
            yield (torch.arange(1, 9, device=device) * 37 % vocab).view(2, 4)
    finally:
        model.train(was_training)


def _rounding(logits_BTV: Tensor, *computed_in: Tensor) -> Tensor:
    """How far log-probs of logits may be off that were rounded to the types of some tensors.

    By the rounding of the id's own logit, and through the normaliser by that of all whose
    probability is not 0: a huge logit of a masked id says nothing about the others.
    """
    eps = max(torch.finfo(tensor.dtype).eps for tensor in computed_in)
    sizes_BTV = logits_BTV.abs().float()
    counted_BT1 = sizes_BTV.where(logits_BTV.float().softmax(-1) > 0, 0).amax(-1, keepdim=True)
    return 1e-4 + 4 * eps * torch.maximum(sizes_BTV, counted_BT1)


def _check_against_logits(model: nn.Module, ids_BT: Tensor) -> None:
    """Compare with the model's own logits on a few tokens: no list of head kinds is complete.

    Every id of the vocabulary is compared, so that one which the model masks (by -inf or any huge
    number) is a difference at that id, and enters no bound but its own.
    """
    logits_BTV = model(input_ids=ids_BT).logits[:, :-1]
    fused_BT, head = model(input_ids=ids_BT, labels=ids_BT, statistic="reference")
    own_BTV = logits_BTV.float().log_softmax(-1)
    options = head_options(model.config)
    head_BTV = nn.functional.linear(*head).float()[:, :-1] * options["logit_scale"]
    if (softcap := options["softcap"]) is not None:
        head_BTV = softcap * (head_BTV / softcap).tanh()
    bound_BTV = _rounding(head_BTV, logits_BTV, head.weight_VH)
    head_BTV = head_BTV.log_softmax(-1)
    targets_BT1 = ids_BT[:, 1:, None]
    head_BTV = head_BTV.scatter(-1, targets_BT1, fused_BT[:, :-1, None])
    gap_BTV = (head_BTV - own_BTV).abs()
    agrees_BTV = (gap_BTV <= bound_BTV) | (head_BTV == own_BTV)  # The latter for -inf in both.
    if not agrees_BTV.all():
        ids = int((~agrees_BTV).flatten(0, 1).any(0).sum())
        raise HeadError(
            f"{type(model).__name__}: log-probs of the fused head differ by up to "
            f"{gap_BTV[~agrees_BTV].max().item():.3g} nats from those of the model's logits, at "
            f"{ids} of {own_BTV.shape[-1]} ids: its head is not softcap * tanh(scale * (hidden @ "
            "weight.T + bias) / softcap), or it masks ids, or weights are NaN."
        )


def router_loss_weight(model: nn.Module) -> float:
    """What a mixture of experts multiplies its router loss with in its own loss; 0 without one.

    The router loss (load balancing, arXiv:2101.03961) belongs to the loss where the model's config
    says ``output_router_logits``.

    Args:
        model: of :func:`add_logprob_head`.

    Raises:
        HeadError: on a short probe the model's own loss is not the mean NLL plus this weight times
            its router loss, so that a part of it would be lost.
    """
    config = model.config.get_text_config()
    with probing(model) as ids_BT:
        own = model(input_ids=ids_BT, labels=ids_BT)
        logprobs_BT = model(input_ids=ids_BT, labels=ids_BT, statistic="logprobs")
    weight, router_loss = 0.0, getattr(own, "aux_loss", None)
    if getattr(config, "output_router_logits", False):
        keeps = "logits_to_keep" in inspect.signature(type(model).forward).parameters
        owners = itertools.product((model, config), _ROUTER_WEIGHTS)
        found = (getattr(owner, name, None) for owner, name in owners)
        weight = next((value for value in found if value is not None), None)
        if not isinstance(router_loss, Tensor) or weight is None or not keeps:
            remedy = "Set output_router_logits to False in its config to train without"
            raise HeadError(
                f"{type(model).__name__}: output_router_logits asks for a router loss, which its "
                f"forward does not give. {remedy}."
            )
    if own.loss is None:
        return weight
    expected = -logprobs_BT.sum() / ids_BT[:, 1:].numel() + (weight and weight * router_loss)
    bound_BTV = _rounding(own.logits[:, :-1], own.logits)
    gap = (own.loss - expected).abs()
    if not gap <= bound_BTV.gather(-1, ids_BT[:, 1:, None]).mean():
        raise HeadError(
            f"{type(model).__name__}: its own loss differs by {gap.item():.3g} from the mean NLL "
            f"plus {weight} times its router loss. Switch the further part off in its config."
        )
    return weight
