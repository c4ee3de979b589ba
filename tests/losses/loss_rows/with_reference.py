"""The losses over pairs with a reference model, and their sums."""

import torch
from loss_rows import Row, full, paired

from fastpo import losses


def with_chosen_counts(loss, **fixed):
    def call(chosen, rejected, ref_chosen, ref_rejected, counts, _, **options):
        return loss(chosen, rejected, ref_chosen, ref_rejected, counts, **fixed, **options)

    return Row(call)


def _aot_unpaired(chosen, rejected, ref_chosen, ref_rejected, *counts, **options):
    # Twice the rejected values: the log-ratios of the fixture have a tie, a kink of this loss.
    sums = chosen, rejected * 2, ref_chosen, ref_rejected
    return losses.aot_unpaired(*sums, label_smoothing=0.1, **options)


def _modpo(*tensors, link="sigmoid", **options):
    sums = tensors[:4]
    chosen, rejected = (x.detach() / 4 for x in sums[2:])  # exact in every dtype
    margins = (chosen, rejected), (rejected, chosen)
    return losses.modpo(*sums, *margins, weights=(0.5, 0.3, 0.2), link=link, **options)


def _sft(chosen, rejected, ref_chosen, ref_rejected, *counts, beta=None, **options):
    return losses.sft(torch.cat((chosen, rejected)), torch.cat(counts), **options)


def _mixed(*tensors, **options):
    sums = tensors[:4]
    parts = {
        "dpo": losses.dpo(*sums, **options),
        "exo_pair": losses.exo_pair(*sums, **options),
    }
    return losses.mixture(parts, {"dpo": 0.8, "exo_pair": 0.2})


def _rationale_rdpo(*tensors, **options):
    sums = tensors[:4]
    return losses.rationale_rdpo(*sums, sums[2].detach() * 2, gamma=0.1, **options)


def _rationale_rorpo(chosen, rejected, ref_chosen, ref_rejected, *counts, **options):
    extra = ref_chosen.detach() * 2, counts[1]
    return losses.rationale_rorpo(chosen, rejected, *counts, *extra, gamma=0.1, **options)


def _ofs_dpo(*tensors, **options):
    sums = tensors[:4]
    slow = sums[2].detach() * 2, sums[3].detach() / 2
    return losses.ofs_dpo(*sums, *slow, alpha=0.1, **options)


ROWS = {
    "robust": paired(losses.robust),
    "exo_pair": paired(losses.exo_pair),
    "nca_pair": paired(losses.nca_pair),
    "bco_pair": paired(losses.bco_pair),
    "sppo_hard": paired(losses.sppo_hard),
    "apo_zero": paired(losses.apo_zero),
    "apo_down": paired(losses.apo_down),
    "cal_dpo": paired(losses.cal_dpo),
    "discopop": paired(losses.discopop),
    "sigmoid_norm": full(losses.sigmoid_norm),
    "dpop": paired(losses.dpop),
    "r_dpo": full(losses.r_dpo, alpha=0.02),
    "flex_dpo": paired(losses.flex_dpo, beta_rejected=0.2),
    "modpo": Row(_modpo),
    "modpo_hinge": Row(lambda *tensors, **options: _modpo(*tensors, link="hinge", **options)),
    "cpo_constrained": full(losses.cpo_constrained),
    "cpo_constrained_prob": full(losses.cpo_constrained, margin_of="prob"),
    "cpo_constrained_clip": full(losses.cpo_constrained, form="clip"),
    "cpo_constrained_soft_floor": full(losses.cpo_constrained, form="soft_floor"),
    "cpo_constrained_paper": full(losses.cpo_constrained, form="paper"),
    "aot": paired(losses.aot),
    "aot_smoothed": paired(losses.aot, label_smoothing=0.1),
    "aot_unpaired": Row(_aot_unpaired),
    "f_dpo": paired(losses.f_dpo),
    "f_dpo_forward_kl": paired(losses.f_dpo, divergence="forward_kl"),
    "f_dpo_js": paired(losses.f_dpo, divergence="js_divergence"),
    "f_dpo_alpha": paired(losses.f_dpo, divergence="alpha_divergence", alpha=0.25),
    "sft": Row(_sft, has_beta=False),
    "mixture": Row(_mixed),
    "rpo": with_chosen_counts(losses.rpo),
    "rpo_sequence_mean": with_chosen_counts(losses.rpo, nll_mean="sequence_mean"),
    "iterative_rpo": with_chosen_counts(losses.iterative_rpo),
    "mpo_internvl": with_chosen_counts(losses.mpo_internvl),
    "rationale_rdpo": Row(_rationale_rdpo),
    "rationale_rorpo": Row(_rationale_rorpo),
    "ofs_dpo": Row(_ofs_dpo, has_gradient_of_value=False),
}
