"""Losses on full-vocabulary divergences, token weights and sample weights."""

import torch
from loss_rows import Row, counted, paired

from fastpo import losses


def _wide(sums):
    return sums.to(torch.promote_types(sums.dtype, torch.float32))


def _kl(sums):
    """A divergence per response: a constant that goes with its pair."""
    return _wide(sums).detach().abs() / 10


def _with_kl(loss, **fixed):
    def call(chosen, rejected, ref_chosen, ref_rejected, *counts, **options):
        sums = (chosen, rejected, ref_chosen, ref_rejected)
        return loss(*sums, _kl(ref_chosen), _kl(ref_rejected), **fixed, **options)

    return Row(call)


def _rrpo(chosen, rejected, ref_chosen, ref_rejected, *counts, **options):
    return losses.rrpo(chosen, rejected, ref_chosen, ref_rejected, _kl(ref_chosen), **options)


def _sparse_po(chosen, rejected, ref_chosen, ref_rejected, *counts, **options):
    chosen, rejected, ref_chosen, ref_rejected = map(
        _wide, (chosen, rejected, ref_chosen.detach(), ref_rejected.detach())
    )
    ratios = chosen - ref_chosen, rejected - ref_rejected
    kls = _kl(ref_chosen), _kl(ref_rejected)
    totals = [torch.ones_like(kls[0])] * 2
    return losses.sparse_po(*ratios, *kls, *totals, l1=0.1, kl_l1=0.2, **options)


def _beta_dpo(*sums, beta=0.1, **options):
    sums = sums[:4]
    return losses.beta_dpo(*sums, torch.tensor(beta), _kl(sums[2]), **options)


def _re_po(chosen, rejected, ref_chosen, ref_rejected, *counts, **options):
    reliability = 1 / (1 + _kl(ref_chosen))
    return losses.re_po(chosen, rejected, reliability, ref_chosen, ref_rejected, **options)


def _re_po_simpo(chosen, rejected, chosen_counts, rejected_counts, **options):
    return losses.re_po(
        chosen,
        rejected,
        torch.full_like(_wide(chosen), 0.8).detach(),
        chosen_counts=chosen_counts,
        rejected_counts=rejected_counts,
        loss=losses.simpo,
        gamma=0.3,
        **options,
    )


ROWS = {
    "tdpo1": _with_kl(losses.tdpo1),
    "tdpo2": _with_kl(losses.tdpo2),
    "rrpo": Row(_rrpo),
    "sparse_po": Row(_sparse_po),
    "tgdpo": _with_kl(losses.tgdpo),
    "wpo": _with_kl(losses.wpo),
    "madpo": _with_kl(losses.madpo),
    # Its beta is a tensor, which is not read on the host.
    "beta_dpo": Row(_beta_dpo, has_beta=False),
    # The posterior has no gradient; test_weighted has the check with it held fixed.
    "re_po": Row(_re_po, has_gradient_of_value=False),
    "re_po_simpo": counted(_re_po_simpo)._replace(has_gradient_of_value=False),
    "re_po_ipo": paired(
        lambda c, r, rc, rr, **o: losses.re_po(
            c,
            r,
            torch.full_like(_wide(c), 0.9).detach(),
            rc,
            rr,
            loss=losses.ipo,
            convention="summed",
            **o,
        ),
        is_bounded=False,
    )._replace(has_gradient_of_value=False),
}
