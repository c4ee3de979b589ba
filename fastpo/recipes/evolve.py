"""EVOLVE: preference training of answers and of their refinement."""

from __future__ import annotations

from dataclasses import replace

from fastpo.data.pairs import best_worst
from fastpo.recipes._recipe import recipe
from fastpo.trainers.config import ConfigError
from fastpo.trainers.rounds import OuterLoop

REFINE = "{prompt}\n\nDraft of an answer:\n{response}\n\nA better answer to the question:\n"


@recipe()
def evolve(
    loop: OuterLoop,
    *,
    rounds: int = 3,
    refinements: int = 1,
    template: str = REFINE,
    min_gap: float = 0.0,
    beta: float = 0.1,
) -> None:
    """EVOLVE (arXiv:2502.05605): DPO on direct answers and on refinements of a draft.

    Each chain refines the first of the answers before it; best against worst of its K responses,
    in the context of the prompt and in that of prompt and draft alike. Text prompts only.

    Experimental: the paper was not read; its weights of the two parts, its losses beside DPO and
    its reference (the model of the round here) are not known.

    Options:
        rounds: of sampling and training.
        refinements: drafts in a chain.
        template: of the refinement's prompt, with ``{prompt}`` and ``{response}``.
        min_gap: least difference of scores of a pair.
        beta: of DPO.
    """
    for _ in loop.rounds(rounds):
        if not all(isinstance(prompt, str) for prompt in loop.prompts):
            raise ConfigError("prompts: this recipe needs texts, not lists of messages.")
        samples, rows = loop.sample(), []
        for step in range(refinements + 1):
            # The judge sees the question, not the draft.
            shown = replace(samples, prompts=loop.prompts)
            rows += samples.rows(best_worst(loop.rewards(loop.score(shown)), min_gap))
            if step < refinements:
                drafts = [group[0] for group in samples.texts]
                prompts = [
                    template.format(prompt=prompt, response=draft)
                    for prompt, draft in zip(loop.prompts, drafts, strict=True)
                ]
                samples = loop.sample(prompts=prompts)
        loop.train(rows, "dpo", ref="current", beta=beta)
