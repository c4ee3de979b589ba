"""The losses of online and self-play methods, and the policy-gradient surrogates.

What a loss takes beside the policy (labels, win rates, scores, histories) is made from the
references, so that it moves with its pair; a gradient must not reach it.
"""

import torch
from loss_rows import Row, counted, full

from fastpo import losses


def _wide(*tensors):
    """float32 or float64: what comes from a narrow tensor is the same as from its float32 copy."""
    return [x if x.dtype == torch.float64 else x.float() for x in tensors]


def _label(ref_chosen, ref_rejected):
    ref_chosen, ref_rejected = _wide(ref_chosen, ref_rejected)
    return torch.sigmoid(ref_chosen - ref_rejected)


def _rates(ref_chosen, ref_rejected):
    return [torch.sigmoid(x + 2) for x in _wide(ref_chosen, ref_rejected)]


def _shifted(tensors, shift):
    return [x + shift for x in _wide(*tensors)]


def labelled(loss, **fixed):
    def call(*tensors, **options):
        return loss(*tensors[:4], label=_label(*tensors[2:4]), **fixed, **options)

    return Row(call)


def rated(loss, with_counts=False, **fixed):
    def call(*tensors, **options):
        counts = tensors[4:] if with_counts else ()
        return loss(*tensors[:4], *_rates(*tensors[2:4]), *counts, **fixed, **options)

    return Row(call)


def with_extra(loss, **fixed):
    def call(*tensors, **options):
        chosen, rejected, ref_chosen, ref_rejected = _wide(*tensors[:4])
        extra = {"extra": (chosen + rejected) / 2, "ref_extra": (ref_chosen + ref_rejected) / 2}
        if loss is losses.xpo:
            extra.pop("ref_extra")
        return loss(*tensors[:4], **extra, **fixed, **options)

    return Row(call)


def with_history(loss, streams, **fixed):
    has_beta = loss is losses.accelerated_po

    def call(*tensors, **options):
        if not has_beta:
            options.pop("beta", None)
        pairs = [_shifted(tensors[2:4], 0.3 * (j + 1)) for j in range(streams)]
        chosen, rejected = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        return loss(*tensors[:4], chosen, rejected, **fixed, **options)

    return Row(call, has_beta)


def of_responses(loss, arguments, has_beta=False, has_gradient_of_value=True):
    """A loss over responses: chosen ones first, then rejected ones."""

    def call(*tensors, **options):
        if not has_beta:
            options.pop("beta", None)
        policy, ref = torch.cat(tensors[:2]), torch.cat(tensors[2:4])
        return loss(policy, **arguments(policy, ref, torch.cat(tensors[4:])), **options)

    return Row(call, has_beta, has_gradient_of_value=has_gradient_of_value)


def of_tokens(loss, arguments, has_beta=True, **fixed):
    """A loss over [B, T]: the pair's two values are the tokens of one response."""

    def call(*tensors, **options):
        if not has_beta:
            options.pop("beta", None)
        policy, ref = (torch.stack(tensors[i : i + 2], 1) for i in (0, 2))
        return loss(policy, **arguments(policy, ref), **fixed, **options)

    return Row(call, has_beta, has_gradient_of_value=loss is not losses.nash_md)


def _rebel(*tensors, beta=None, **options):
    return losses.rebel(*tensors[:4], *_rates(*tensors[2:4]), **options)


def _power_dl(chosen, rejected, ref_chosen, ref_rejected, *counts, **options):
    label = counts[0] / (counts[0] + counts[1] + 1)
    return losses.power_dl(chosen, rejected, *counts, label, **options)


def _srpo(*tensors, **options):
    chosen, rejected, ref_chosen, ref_rejected = _wide(*tensors[:4])
    policy = chosen + 0.5, rejected - 0.2, chosen + 0.1, rejected + 0.3
    ref = ref_chosen + 0.2, ref_rejected - 0.1, ref_chosen + 0.3, ref_rejected + 0.1
    label = _label(*tensors[2:4])
    return losses.srpo(*tensors[:4], *policy, *ref, label, **options)


def _codpo(*tensors, **options):
    return losses.codpo(*tensors[:5], **options)


def _mask(policy):
    return torch.ones_like(policy, dtype=torch.bool)


def _nash_md(policy, ref):
    return {"ref": ref, "mask": _mask(policy), "win_rates": _label(ref[:, 0], ref[:, 1])}


def _remax(policy, ref):
    return {"returns": torch.tanh(_wide(ref)[0]), "mask": _mask(policy)}


def _groups(policy, ref):
    return {"ref": ref, "scores": torch.tanh(_wide(ref)[0])}


def _rloo(policy, ref, counts):
    half = ref.shape[0] // 2
    advantages = torch.cat((torch.full((half,), 0.5), torch.full((half,), -0.5)))
    return {"old_policy": ref, "advantages": advantages}


def _crpg(policy, ref, counts):
    (wide,) = _wide(ref)
    scores = {"scores": torch.tanh(wide), "baseline_scores": torch.zeros_like(wide)}
    return {"ref": ref, "counts": counts, "passed": ref > -3, "kl_max": 10.0, **scores}


def _raft(policy, ref, counts):
    return {"counts": counts, "kept": ref > -3}


def _crraft(policy, ref, counts):
    return {"weights": torch.sigmoid(_wide(ref)[0])}


def _barrier(policy, ref, counts):
    returns = torch.tensor([10.0, 4.0]).expand(ref.shape[0], 2)
    return {"old_policy": ref, "returns": returns, "objective": 0}


ROWS = {
    "soft_label_ce": labelled(losses.soft_label_ce),
    "osp": labelled(losses.osp),
    "dno": rated(losses.dno),
    "mcts_dpo": full(losses.mcts_dpo),
    "mcts_dpo_ipo": full(losses.mcts_dpo, form="ipo"),
    "mcts_dpo_label": Row(
        lambda *tensors, **options: losses.mcts_dpo(
            *tensors, label=_label(*tensors[2:4]), **options
        )
    ),
    "selm": with_extra(losses.selm),
    "xpo": with_extra(losses.xpo),
    "xpo_ipo": with_extra(losses.xpo, form="ipo"),
    "vpo": with_extra(losses.vpo),
    "vpo_online": with_extra(losses.vpo, setting="online"),
    "accelerated_po": with_history(losses.accelerated_po, 1),
    "accelerated_po_first_round": with_history(losses.accelerated_po, 0),
    "power": counted(losses.power),
    "power_dl": Row(_power_dl),
    "inpo": with_history(losses.inpo, 1, eta=0.5),
    "inpo_first_round": with_history(losses.inpo, 0, eta=0.5),
    "mnpo": with_history(losses.mnpo, 2, eta=0.5),
    "mnpo_weights": with_history(losses.mnpo, 3, eta=0.5, history_weights=[1.0, 0.0]),
    "rebel": Row(_rebel, has_beta=False),
    "online_ipo": labelled(losses.online_ipo),
    "egpo": rated(losses.egpo),
    "egpo_averaged": rated(losses.egpo, with_counts=True, convention="averaged"),
    "sppo": rated(losses.sppo),
    "sppo_single": labelled(losses.sppo_single),
    "srpo": Row(_srpo),
    "copg": Row(
        lambda *tensors, **options: losses.copg(*tensors[:4], *_rates(*tensors[2:4]), **options)
    ),
    "copg_groups": of_tokens(losses.copg_groups, _groups),
    "nash_md": of_tokens(losses.nash_md, _nash_md),
    "nash_md_sequence": of_tokens(losses.nash_md, _nash_md, credit="sequence"),
    "rloo": of_responses(losses.rloo, _rloo),
    "remax": of_tokens(losses.remax, _remax, has_beta=False),
    "raft": of_responses(losses.raft, _raft),
    "codpo": Row(_codpo),
    "crraft": of_responses(losses.crraft, _crraft),
    "crpg": of_responses(losses.crpg, _crpg, has_gradient_of_value=False),
    "c_morl_barrier": of_responses(losses.c_morl_barrier, _barrier, has_beta=True),
}
