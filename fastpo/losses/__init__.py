"""Losses: pure torch functions of per-sequence statistics, one function per published method.

Every function returns the loss and the detached implicit rewards. Low-precision inputs are
computed in float32, float64 stays float64. ``reduction`` is over pairs (or responses) of the local
batch; the mean of an empty batch is 0.
"""

from fastpo.losses._common import LossOutput, UnpairedOutput
from fastpo.losses.pairwise import dpo, hinge, ipo
from fastpo.losses.reference_free import orpo, simpo
from fastpo.losses.unpaired import kto

__all__ = ["LossOutput", "UnpairedOutput", "dpo", "hinge", "ipo", "kto", "orpo", "simpo"]
