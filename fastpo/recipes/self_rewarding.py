"""Self-Rewarding language models, and a judge that is the model itself."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastpo.data.pairs import best_worst
from fastpo.data.scores import mean_judgements
from fastpo.recipes._recipe import recipe
from fastpo.trainers.rounds import OuterLoop
from fastpo.trainers.sampling import batches, encode_prompts, generate, seed_of

RUBRIC = """Review the user's question and the response. Add a point for each that holds: it is
relevant; it answers a good part of the question; it answers the basic elements usefully; it is
clearly written by an assistant, direct and well organised; it is expert, without superfluous text.

User: {prompt}
<response>{response}</response>

After a short justification, conclude with the line "Score: <total points>".
"""


@recipe(samples=4, temperature=0.7, top_p=0.9)
def self_rewarding(loop: OuterLoop, *, rounds: int = 2, beta: float = 0.1) -> None:
    """Self-Rewarding (arXiv:2401.10020): the model judges its own responses.

    Best against worst, equal scores dropped; DPO from the model of the round, which is taken to be
    the reference too (the paper's excerpts do not say). The paper brings new prompts to every
    round: give a function as ``prompts``. Without ``score`` the judge is :func:`rubric_judge`.

    Options:
        rounds: of sampling and training.
        beta: of DPO.
    """
    loop.score_function = loop.score_function or rubric_judge(loop.model, loop.tokenizer)
    for _ in loop.rounds(rounds):
        samples = loop.sample()
        pairs = best_worst(loop.rewards(loop.score(samples)))
        loop.train(samples.rows(pairs), "dpo", ref="current", beta=beta)


def _points(text: str) -> float:
    found = re.search(r"[Ss]core:\s*([0-5](?:\.\d+)?)\b", text)
    return float(found[1]) if found else float("nan")


def rubric_judge(
    model: torch.nn.Module,
    tokenizer: Any,
    template: str = RUBRIC,
    parse: Callable[[str], float] = _points,
    votes: int = 3,
    batch_size: int = 8,
    max_length: int = 2048,
    seed: int = 0,
    **generation: Any,
) -> Callable[[list, list[list[str]]], Tensor]:
    """A scorer: the model as it is when called, asked to grade each response.

    Args:
        model: the judge.
        tokenizer: of the model; with a chat template, the question is put as a user's message.
        template: with ``{prompt}`` and ``{response}``.
        parse: points in a judgement, NaN where there are none.
        votes: judgements per response, averaged over those that could be read.
        batch_size: responses judged together.
        max_length: tokens of the question.
        seed: of the judgements.
        **generation: of ``GenerationConfig``.

    Returns:
        A function from prompts [B] and responses [B][K] to scores [B, K], NaN where no judgement
        could be read.
    """
    options = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "max_new_tokens": 256}

    def score(prompts: list, responses: list[list[str]]) -> Tensor:
        texts = [
            template.format(prompt=_text(prompt), response=response)
            for prompt, group in zip(prompts, responses, strict=True)
            for response in group
        ]
        if tokenizer.chat_template:
            texts = [[{"role": "user", "content": text}] for text in texts]
        ids, _ = encode_prompts(texts, tokenizer, max_length)
        judged = []
        for part in batches(len(ids), batch_size):
            of_part = seed_of(seed, part.start)
            found = generate(model, tokenizer, ids[part], votes, of_part, **options | generation)
            judged += [
                [parse(text) for text in tokenizer.batch_decode(group, skip_special_tokens=True)]
                for group in found
            ]
        return mean_judgements(torch.tensor(judged).view(len(prompts), -1, votes))

    return score


def _text(prompt: str | list[dict[str, str]]) -> str:
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]
