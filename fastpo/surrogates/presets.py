"""Published policy-gradient losses as settings of one op, and where each was read.

A preset is a place to start: every setting can be overridden in ``policy_loss``. The trainers named
are TRL 1.16, unless a version stands with it, and verl at b178a3c; where the two differ under one
name, both are here.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from fastpo.operands import Surrogate

_NO_CLIP = {"clip_low": math.inf, "clip_high": math.inf}


class Preset(NamedTuple):
    """One published loss.

    Attributes:
        settings: of the op.
        aggregation: of sequences to a loss; ``fastpo.surrogates.AGGREGATIONS`` lists them.
        source: paper and code it was read in.
        needs: optional tensors of ``policy_loss`` that it makes no sense without.
        equals: the preset that it is where each sequence has one advantage; empty if none.
    """

    settings: Surrogate
    aggregation: str
    source: str
    needs: tuple[str, ...] = ()
    equals: str = ""


def _preset(aggregation: str, source: str, *needs: str, equals: str = "", **settings) -> Preset:
    return Preset(Surrogate(**settings), aggregation, source, needs, equals)


PRESETS: dict[str, Preset] = {
    "grpo": _preset("sequence_mean", "arXiv:2402.03300; TRL loss_type grpo"),
    # TRL's name; the BNPO paper (arXiv:2506.02864) is an advantage.
    "bnpo": _preset("local_token_mean", "TRL loss_type bnpo"),
    "dr_grpo": _preset("fixed_length", "arXiv:2503.20783; TRL loss_type dr_grpo"),
    "dapo": _preset("token_mean", "arXiv:2503.14476; TRL loss_type dapo", clip_high=0.28),
    "ppo": _preset("token_mean", "arXiv:1707.06347; verl vanilla without its dual clip"),
    "dual_clip": _preset("token_mean", "arXiv:1912.09729; verl vanilla", dual_clip=3.0),
    "ngrpo": _preset(
        "token_mean", "arXiv:2509.18851; the authors' script", clip_low=0.16, clip_high=0.24
    ),
    "gspo": _preset(
        "sequence_mean",
        "arXiv:2507.18071; TRL importance_sampling_level sequence, verl gspo",
        level="sequence",
        clip_low=3e-4,
        clip_high=4e-4,
    ),
    "gspo_token": _preset(
        "sequence_mean",
        "arXiv:2507.18071; TRL 1.10 experimental gspo_token, verl gspo",
        equals="gspo",
        level="sequence_token",
        clip_low=3e-4,
        clip_high=4e-4,
    ),
    "luspo": _preset(
        "sequence_sum",
        "arXiv:2602.05261; TRL loss_type luspo",
        level="sequence",
        clip_low=2e-3,
        clip_high=2.5e-3,
    ),
    # TRL caps the ratio at epsilon_high = 1 + clip_high and has no lower bound.
    "cispo": _preset(
        "token_mean",
        "arXiv:2506.13585, arXiv:2510.13786; TRL loss_type cispo",
        kind="cispo",
        clip_low=1.0,
        clip_high=4.0,
    ),
    "cispo_verl": _preset("token_mean", "arXiv:2506.13585; verl cispo", kind="cispo"),
    "sapo": _preset("sequence_mean", "arXiv:2511.20347; TRL and verl sapo", kind="sapo"),
    "vespo": _preset("token_mean", "arXiv:2602.10693; TRL loss_type vespo", kind="vespo"),
    "gmpo": _preset(
        "sequence_mean",
        "arXiv:2507.20673; TRL experimental gmpo, verl geo_mean",
        kind="gmpo",
        clip_low=0.4,
        clip_high=0.4,
    ),
    "gpg": _preset("token_mean", "arXiv:2504.02546; verl gpg", kind="reinforce"),
    "reinforce": _preset("token_mean", "-A log p; doi:10.1007/BF00992696", kind="reinforce"),
    "rloo": _preset("sequence_sum", "arXiv:2402.14740; TRL RLOOTrainer", level="sequence_sum"),
    "clip_cov": _preset("token_mean", "arXiv:2505.22617; verl clip_cov", "policy_mask"),
    "kl_cov": _preset("token_mean", "arXiv:2505.22617; verl kl_cov", "penalties", **_NO_CLIP),
    "gtpo": _preset("sequence_mean", "arXiv:2508.03772; the authors' code", "weights", **_NO_CLIP),
    "value": _preset("token_mean", "arXiv:1506.02438; verl value loss", kind="value"),
}


def method_names() -> tuple[str, ...]:
    """Names that ``policy_loss`` takes as ``method``; ``value`` is that of ``value_loss``.

    Returns:
        The keys of ``PRESETS``, whose entries hold settings, aggregation and source.

    Example:
        >>> "gspo" in method_names()
        True
    """
    return tuple(PRESETS)
