"""Weights and masks that methods put on tokens [B, T], on responses and on pairs [B].

Pure torch. What is drawn at random takes a ``torch.Generator``; what has a memory is a module with
a state dict and, for several ranks, a hook.
"""

from fastpo.weights.adaptive import AllReduce, BatchBeta, BetaDPO, DynamicLabels, RePO
from fastpo.weights.pairs import (
    divergence_masks,
    ld_dpo_weights,
    ma_po_weights,
    phrase_masks,
    sampo_masks,
    step_masks,
    tgdpo_weights,
)
from fastpo.weights.samples import bald, madpo_weights, upo_filter, upo_weights, wpo_weights
from fastpo.weights.sparse_mask import SparseMask
from fastpo.weights.thinking import answer_masks, thinking_masks

__all__ = [
    "AllReduce",
    "BatchBeta",
    "BetaDPO",
    "DynamicLabels",
    "RePO",
    "SparseMask",
    "answer_masks",
    "bald",
    "divergence_masks",
    "ld_dpo_weights",
    "ma_po_weights",
    "madpo_weights",
    "phrase_masks",
    "sampo_masks",
    "step_masks",
    "tgdpo_weights",
    "thinking_masks",
    "upo_filter",
    "upo_weights",
    "wpo_weights",
]
