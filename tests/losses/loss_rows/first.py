"""The first losses of the library."""

import torch
from loss_rows import Row, counted, full, paired

from fastpo import losses


def _kto(chosen, rejected, ref_chosen, ref_rejected, *counts, **options):
    desirable = torch.cat((torch.ones_like(chosen), torch.zeros_like(rejected))).bool()
    policy, ref = torch.cat((chosen, rejected)), torch.cat((ref_chosen, ref_rejected))
    return losses.kto(policy, ref, desirable, 0.2, **options)


ROWS = {
    "dpo": paired(losses.dpo),
    "dpo_smoothed": paired(losses.dpo, label_smoothing=0.1),
    "hinge": paired(losses.hinge),
    "ipo": full(losses.ipo),
    "ipo_summed": paired(losses.ipo, convention="summed"),
    "simpo": counted(losses.simpo),
    "simpo_smoothed": counted(losses.simpo, label_smoothing=0.1),
    "orpo": counted(losses.orpo),
    "orpo_sequence_mean": counted(losses.orpo, nll_mean="sequence_mean"),
    "kto": Row(_kto),
}
