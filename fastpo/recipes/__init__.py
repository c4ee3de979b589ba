"""Recipes: outer loops of published on-policy methods, one short function each.

``recipes.sppo(model, tokenizer, prompts, score=preferences, rounds=3, output="run")`` samples from
the model, scores, builds pairs, trains, and repeats; see :mod:`fastpo.trainers.rounds` for the
parts. They need the extra ``fastpo[train]``.
"""

from fastpo.recipes.apo_momentum import apo_momentum
from fastpo.recipes.curry_dpo import curry_dpo
from fastpo.recipes.dno import dno, dno_prct
from fastpo.recipes.egpo import egpo
from fastpo.recipes.evolve import evolve
from fastpo.recipes.inpo import inpo
from fastpo.recipes.iterative_dpo import iterative_dpo
from fastpo.recipes.mnpo import mnpo
from fastpo.recipes.online_dpo import online_dpo
from fastpo.recipes.raft import raft
from fastpo.recipes.rebel import rebel
from fastpo.recipes.self_rewarding import rubric_judge, self_rewarding
from fastpo.recipes.selm import selm
from fastpo.recipes.sppo import sppo
from fastpo.recipes.temporal_self_rewarding import temporal_self_rewarding
from fastpo.recipes.xpo import xpo

__all__ = [
    "apo_momentum",
    "curry_dpo",
    "dno",
    "dno_prct",
    "egpo",
    "evolve",
    "inpo",
    "iterative_dpo",
    "mnpo",
    "online_dpo",
    "raft",
    "rebel",
    "rubric_judge",
    "self_rewarding",
    "selm",
    "sppo",
    "temporal_self_rewarding",
    "xpo",
]
