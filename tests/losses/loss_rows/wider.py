"""Losses without a reference, of single responses, of lists and of reward models."""

import torch
from loss_rows import Row, counted, paired

from fastpo import losses


def unpaired(loss, **fixed):
    """A loss of single responses: the chosen are desirable, the rejected are not."""

    def call(chosen, rejected, ref_chosen, ref_rejected, *counts, **options):
        desirable = torch.cat((torch.ones_like(chosen), torch.zeros_like(rejected))).bool()
        policy, ref = torch.cat((chosen, rejected)), torch.cat((ref_chosen, ref_rejected))
        return loss(policy, ref, desirable, **fixed, **options)

    return Row(call)


def _bco_weighted(chosen, rejected, ref_chosen, ref_rejected, *counts, **options):
    weights = torch.full_like(torch.cat((chosen, rejected)), 1.5).detach()
    row = unpaired(losses.bco, delta=-0.1, weights=weights)
    return row.call(chosen, rejected, ref_chosen, ref_rejected, **options)


def _tpo_triple(chosen, rejected, ref_chosen, ref_rejected, *counts, **options):
    counts = (*counts, counts[0])
    return losses.tpo_triple(chosen, rejected, ref_chosen.detach(), *counts, **options)


def _tpo_triple_length_normalised(*tensors, **options):
    return _tpo_triple(*tensors, form="tpo_l", **options)


def _stacked(*pairs):
    """[B, 2] from tensors of chosen and rejected; the chosen score 2, the rejected 1."""
    lists = [torch.stack(pair, 1) for pair in pairs]
    return lists, torch.tensor([2.0, 1.0]).expand(lists[0].shape)


def listed(loss, *, has_beta=True, **fixed):
    """A loss of lists: the two responses of a pair."""

    def call(chosen, rejected, ref_chosen, ref_rejected, *counts, **options):
        if not has_beta:
            options.pop("beta", None)
        lists, scores = _stacked((chosen, rejected), (ref_chosen, ref_rejected))
        return loss(*lists, scores, **fixed, **options)

    return Row(call, has_beta)


def _pro(chosen, rejected, ref_chosen, ref_rejected, *counts, beta=None, **options):
    lists, scores = _stacked((chosen, rejected), counts)
    return losses.pro(*lists, scores, **options)


def _sft_fdiv(chosen, rejected, ref_chosen, ref_rejected, *counts, **options):
    policy, ref = torch.cat((chosen, rejected)), torch.cat((ref_chosen, ref_rejected))
    return losses.sft_fdiv(policy, ref, **options)


def _sft_hellinger(*tensors, **options):
    return _sft_fdiv(*tensors, divergence="hellinger", **options)


def _sft_js(*tensors, **options):
    return _sft_fdiv(*tensors, divergence="js", **options)


def scored(loss, *extra, **fixed):
    """A loss of a reward model, whose scores are the policy's values."""

    def call(chosen, rejected, ref_chosen, ref_rejected, *counts, beta=None, **options):
        constants = [{"chosen": ref_chosen, "rejected": ref_rejected}[name] for name in extra]
        return loss(chosen, rejected, *constants, **fixed, **options)

    return Row(call, has_beta=False)


def _gpm(chosen, rejected, *rest, beta=None, **options):
    embeddings = (torch.stack((x, torch.ones_like(x)), 1) for x in (chosen, rejected))
    return losses.gpm(*embeddings, **options)


def _gpm_regression(*tensors, **options):
    return _gpm(*tensors, form="regression", **options)


def _regret(chosen, rejected, ref_chosen, ref_rejected, *counts, beta=None, **options):
    values = (x.detach() for x in (ref_chosen, ref_rejected, ref_rejected, ref_chosen))
    return losses.regret_pref(chosen, rejected, *values, label=0.8, **options)


def _mapl(chosen, rejected, ref_chosen, ref_rejected, *counts, **options):
    other = ref_chosen.detach()
    return losses.mapl(chosen, rejected, ref_chosen, ref_rejected, other, **options)


def _gpo_pair(*tensors, **options):
    return losses.gpo_pair(*tensors[:4], tensors[2], tensors[3], **options)


ROWS = {
    "cpo": counted(losses.cpo),
    "cpo_smoothed": counted(losses.cpo, label_smoothing=0.1, nll_mean="sequence_mean"),
    "cpo_hinge": counted(losses.cpo, form="hinge"),
    "cpo_ipo": counted(losses.cpo, form="ipo"),
    "cpo_simpo": counted(losses.cpo_simpo),
    "alphapo": counted(losses.alphapo),
    "alphapo_negative": counted(losses.alphapo, alpha=-0.5),
    "alphapo_zero": counted(losses.alphapo, alpha=0.0),
    "asft": counted(losses.asft),
    "tpo_triple": Row(_tpo_triple),
    "tpo_triple_length_normalised": Row(_tpo_triple_length_normalised),
    "apo_zero_unpaired": unpaired(losses.apo_zero_unpaired),
    "bco": unpaired(losses.bco, delta=0.3),
    "bco_weighted": Row(_bco_weighted),
    "pro": Row(_pro, has_beta=False),
    "pl_dpo": listed(losses.pl_dpo),
    "adpo": listed(losses.adpo, has_beta=False),
    "adpo_kl": listed(losses.adpo, has_beta=False, kl_weight=0.1, drop_unrewarded=True),
    "tpo_tree": listed(losses.tpo_tree),
    "gpo": listed(losses.gpo),
    "gpo_pair": Row(_gpo_pair),
    "mapl": paired(losses.mapl),
    "mapl_between": Row(_mapl),
    "sft_fdiv": Row(_sft_fdiv),
    "sft_fdiv_hellinger": Row(_sft_hellinger),
    "sft_fdiv_js": Row(_sft_js),
    "rm_bt": scored(losses.rm_bt),
    "rm_margin": scored(losses.rm_margin, "chosen"),
    "rm_center": scored(losses.rm_center),
    "rm_secrets2": scored(losses.rm_secrets2, "chosen"),
    "rm_secrets2_margin": scored(losses.rm_secrets2, "chosen", form="adaptive_margin"),
    "rm_secrets2_smoothing": scored(losses.rm_secrets2, "chosen", form="label_smoothing"),
    "v0": scored(losses.v0),
    "gpm": Row(_gpm, has_beta=False),
    "gpm_regression": Row(_gpm_regression, has_beta=False),
    "regret_pref": Row(_regret, has_beta=False),
    "regret_pref_returns": scored(losses.regret_pref, model="partial_return"),
}
