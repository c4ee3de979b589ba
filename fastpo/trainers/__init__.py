"""Trainers on top of ``transformers.Trainer``; they need the extra ``fastpo[train]``.

``fastpo.trainers.dpo.DPOTrainer`` and ``fastpo.trainers.sft.SFTTrainer`` take a model and tokenised
rows; ``fastpo.trainers.run`` goes from a config (``fastpo.trainers.config``) to a finished run, as
the command line does; ``fastpo.trainers.rounds`` samples and trains in turns, as
``fastpo.recipes`` do. Nothing is imported before it is asked for, so that ``fastpo --help`` stays
fast.
"""

from fastpo import _lazy

__getattr__ = _lazy.submodules(__name__)
