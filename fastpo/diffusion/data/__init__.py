"""Data of diffusion methods that is more than scores: pools, trajectories, segments, rounds.

What needs scores only is in :mod:`fastpo.data`: ``visual_rules``, ``objectives`` and ``pairs``.
"""

from fastpo import _lazy

__getattr__ = _lazy.submodules(__name__)
