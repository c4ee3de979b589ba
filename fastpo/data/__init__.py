"""Training data: reading and tokenising rows, and turning scores into pairs, lists and stages.

``records`` and ``tokens`` read data for the trainers and need ``datasets`` and ``transformers``;
``formats`` turns rows as people have them into prompts and completions.
The other modules are pure functions of tensors and need torch only: what judges say as numbers
(``scores``, ``win_rates``), scores to pairs (``pairs``, ``rules``, ``self_rewarding``), right and
wrong to pairs (``verdicts``), search trees (``search``, ``trees``), the order in which pairs are
learned (``curricula``), which prompts come next (``samplers``), how many to sample (``budgets``),
which to keep (``selection``; ``dynamic`` for groups of rollouts), which of them are the same
(``ids``) and which tokens count (``masks``).
"""

from fastpo import _lazy
from fastpo.data.errors import DataError

__all__ = ["DataError"]

__getattr__ = _lazy.submodules(__name__)
