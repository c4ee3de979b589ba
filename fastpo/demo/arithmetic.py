"""GRPO on sums of two digits: ``python -m fastpo.demo.arithmetic [output folder]``.

A small Llama is made on the spot and fitted to sums of which some are answered at random, so that
its own answers are often wrong. ``fastpo.trainers.grpo`` then trains it on answers that it samples
itself, rewarded if they are right. The mean reward is that of samples for the same sums: so small a
model learns these, not to add. Nothing is downloaded.
"""

from __future__ import annotations

import itertools
import json
import random
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch

RANDOM_ANSWERS = 0.5
FIT_COPIES = 100


def right(completions: list[str], answer: list[str], **columns) -> list[float]:
    """The reward: 1 for exactly the answer, else 0."""
    return [float(c == a) for c, a in zip(completions, answer, strict=True)]


def sums(seed: int = 0) -> dict[str, list[dict[str, str]]]:
    """Prompts to ``train`` on with answers of one digit, and completions to ``fit`` first.

    >>> sums()["train"][3]
    {'prompt': '0+3=', 'answer': '3'}
    """
    generator = random.Random(seed)
    digits = ((a, b) for a, b in itertools.product(range(10), repeat=2) if a + b < 10)
    rows = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a, b in digits]
    fit = []
    for row in rows * FIT_COPIES:
        is_random = generator.random() < RANDOM_ANSWERS
        answer = str(generator.randrange(10)) if is_random else row["answer"]
        fit.append({"prompt": row["prompt"], "completion": answer})
    return {"train": rows, "fit": fit}


def main(
    output: str = "arithmetic_output", seed: int = 0, fit_steps: int = 400, steps: int = 150
) -> dict[str, Any]:
    """Make the model, fit it, train it; prints the mean reward before and after.

    Args:
        output: folder to write; the runs of an earlier call in it are removed.
        seed: of the weights, the order and the samples.
        fit_steps: optimiser steps on given answers.
        steps: optimiser steps on sampled answers.

    Returns:
        What ``fastpo train grpo`` writes to ``results.json``.
    """
    from fastpo.trainers import run, scratch
    from fastpo.trainers.config import GRPOConfig, SFTConfig

    # The products of so small a model are faster without threads to wait for.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    started = time.perf_counter()
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("init", "sft", "grpo"):
        shutil.rmtree(folder / part, ignore_errors=True)
    rows = sums(seed)
    paths = {}
    for part, found in rows.items():
        path = folder / f"{part}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
        paths[part] = str(path)
    texts = (row["prompt"] + row["answer"] for row in rows["train"])
    # No more tokens than bytes: every character is one.
    scratch.init_model(
        folder / "init", texts, vocab_size=259, hidden_size=64, layers=2, heads=2, seed=seed
    )
    shared = {
        "seed": seed, "max_length": 16, "save_steps": 100_000, "warmup_steps": 50,
        "tensorboard": False, "schedule": "constant_with_warmup",
        "trainer": {"disable_tqdm": True},
    }  # fmt: skip
    run.train_sft(
        SFTConfig(
            model=str(folder / "init"), data=paths["fit"], output=str(folder / "sft"),
            eval_share=0.0, max_steps=fit_steps, batch_size=64, learning_rate=1e-3,
            logging_steps=50, **shared,
        )
    )  # fmt: skip
    results = run.train_grpo(
        GRPOConfig(
            model=str(folder / "sft"), data=paths["train"], eval_data=paths["train"],
            output=str(folder / "grpo"), reward="fastpo.demo.arithmetic:right", max_steps=steps,
            batch_size=22, samples=16, max_new_tokens=2, sample_batch_size=64, learning_rate=1e-3,
            logging_steps=10, **shared,
        )
    )  # fmt: skip
    before, after = (results[when]["eval_rewards/mean"] for when in ("before", "after"))
    seconds = time.perf_counter() - started
    print(f"mean reward of samples for {len(rows['train'])} sums: {before:.3f} -> {after:.3f}")
    print(f"{seconds:.0f} s in all")
    torch.set_num_threads(threads)
    return results


if __name__ == "__main__":
    main(*sys.argv[1:2])
