"""The losses that take whole groups: the two responses of a pair are one group."""

import torch
from loss_rows import Row

from fastpo import losses


def grouped(loss, *inputs, has_beta=False, **fixed):
    """A loss of groups of two, the chosen first; ``inputs`` are the names of what it takes."""

    def call(chosen, rejected, ref_chosen, ref_rejected, *counts, **options):
        if not has_beta:
            options.pop("beta", None)
        policy, ref = torch.stack((chosen, rejected), 1), torch.stack((ref_chosen, ref_rejected), 1)
        if not counts:
            counts = [torch.ones_like(ref_chosen)] * 2
        wide = ref if ref.dtype == torch.float64 else ref.float()
        first = torch.tensor([True, False], device=ref.device).expand(ref.shape)
        made = {
            "ref": ref,
            "old_policy": ref,
            "counts": torch.stack(tuple(counts), 1),
            "scores": torch.tanh(wide),
            "levels": torch.where(first, 1, 2),
            "desirable": first,
        }
        return loss(policy, **{name: made[name] for name in inputs}, **fixed, **options)

    return Row(call, has_beta)


def _a2po(chosen, rejected, ref_chosen, ref_rejected, *counts, **options):
    policy, ref = torch.cat((chosen, rejected)), torch.cat((ref_chosen, ref_rejected))
    wide = ref if ref.dtype == torch.float64 else ref.float()
    return losses.a2po(policy, ref, torch.tanh(wide), torch.sigmoid(wide), **options)


ROWS = {
    "trpa": grouped(losses.trpa, "ref", "counts", "levels", has_beta=True),
    "disco": grouped(losses.disco, "desirable"),
    "disco_log_probs": grouped(losses.disco, "desirable", tau=10.0),
    "discob": grouped(losses.discob, "desirable"),
    "gepo": grouped(losses.gepo, "ref", "desirable", has_beta=True),
    "gepo_unbiased": grouped(
        losses.gepo, "ref", "desirable", has_beta=True, ddof=1, variance_of="reward"
    ),
    "reg_grpo": grouped(losses.reg_grpo, "old_policy", "scores"),
    "reg_grpo_added": grouped(losses.reg_grpo, "old_policy", "scores", convention="added"),
    "a2po": Row(_a2po),
    "kimi_mdpo": grouped(losses.kimi_mdpo, "old_policy", "scores", tau=0.1),
    "kimi_mdpo_log_z": grouped(losses.kimi_mdpo, "old_policy", "scores", tau=0.1, baseline="log_z"),
    "kimi_mdpo_policy_gradient": grouped(
        losses.kimi_mdpo, "old_policy", "scores", tau=0.1, scaling="policy_gradient"
    ),
}
