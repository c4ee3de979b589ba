"""Rewards to advantages and weights: one function per method, and one that calls them by name.

Results are float32, or float64 for float64 inputs, and carry no gradient. Nothing here waits for
the device, except where ranks exchange their rows.
"""

from fastpo.advantages.bnpo import bnpo
from fastpo.advantages.components import gdpo, mo_grpo, sum_rewards, weighted_sum_grpo
from fastpo.advantages.crpg import crpg_rewards
from fastpo.advantages.dgpo import dgpo
from fastpo.advantages.dispatch import METHODS, group_advantages
from fastpo.advantages.gigpo import gigpo
from fastpo.advantages.ngrpo import ngrpo
from fastpo.advantages.otb import otb
from fastpo.advantages.passk import passk_analytic, passk_max
from fastpo.advantages.relative import dr_grpo, gpg, grpo, opo
from fastpo.advantages.returns import remax_returns
from fastpo.advantages.rloo import rloo
from fastpo.advantages.shaping import (
    AdaptiveKL,
    gcpo_rewards,
    k1_in_reward,
    last_token_rewards,
    otc_rewards,
    overlong_penalty,
)
from fastpo.advantages.tokens import (
    TokenAdvantages,
    TokenMasks,
    discounted_returns,
    gae,
    masked_whiten,
    reinforce_pp,
    remax,
    step_returns,
    tppo_masks,
    truncated_gae,
)
from fastpo.advantages.weights import pu_rl_weights, zo_ranksgd_weights
from fastpo.advantages.whitened import reinforce_pp_baseline

__all__ = [
    "METHODS",
    "AdaptiveKL",
    "TokenAdvantages",
    "TokenMasks",
    "bnpo",
    "crpg_rewards",
    "dgpo",
    "discounted_returns",
    "dr_grpo",
    "gae",
    "gcpo_rewards",
    "gdpo",
    "gigpo",
    "gpg",
    "group_advantages",
    "grpo",
    "k1_in_reward",
    "last_token_rewards",
    "masked_whiten",
    "mo_grpo",
    "ngrpo",
    "opo",
    "otb",
    "otc_rewards",
    "overlong_penalty",
    "passk_analytic",
    "passk_max",
    "pu_rl_weights",
    "reinforce_pp",
    "reinforce_pp_baseline",
    "remax",
    "remax_returns",
    "rloo",
    "step_returns",
    "sum_rewards",
    "tppo_masks",
    "truncated_gae",
    "weighted_sum_grpo",
    "zo_ranksgd_weights",
]
