"""The demonstration behind ``fastpo demo``: from nothing to a preference-trained model on a CPU.

A tokenizer and a small Llama are made on the spot, fitted to Python's own documentation, and
trained on pairs of a true continuation and one with stuttered words. The loss end is measured
against plain torch in the same run. Nothing is downloaded.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

MAX_LENGTH = 96
FIT_STEPS = 240
DPO_STEPS = 120
HELD_PAIRS = 256


def _write(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def _prepare(folder: Path) -> dict[str, Any]:
    """Data files and a model with random weights; returns paths and the number of parameters."""
    from fastpo.demo import texts
    from fastpo.trainers import scratch

    rows = texts.task()
    rows["held"] = rows["held"][:HELD_PAIRS]
    paths = {part: _write(folder / f"{part}.jsonl", found) for part, found in rows.items()}
    corpus = (row["completion"] for row in rows["fit"])
    model = scratch.init_model(folder / "init", corpus, hidden_size=128, layers=4, heads=2)
    counts = ", ".join(f"{part} {len(found)}" for part, found in rows.items())
    print(f"rows: {counts}; model: {model.num_parameters():,} parameters", flush=True)
    return {**paths, "parameters": model.num_parameters()}


def _train(folder: Path, prepared: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    from fastpo.trainers import run
    from fastpo.trainers.config import DPOConfig, SFTConfig

    shared = {"max_length": MAX_LENGTH, "save_steps": 1000, "logging_steps": 10}
    fitted = run.train_sft(
        SFTConfig(
            model=str(folder / "init"), data=prepared["fit"], output=str(folder / "sft"),
            eval_share=0.02, max_steps=FIT_STEPS, batch_size=16, learning_rate=3e-3,
            schedule="cosine", **shared,
        )
    )  # fmt: skip
    trained = run.train_dpo(
        DPOConfig(
            model=str(folder / "sft"), data=prepared["train"], eval_data=prepared["held"],
            output=str(folder / "dpo"), max_steps=DPO_STEPS, batch_size=8, learning_rate=1e-3,
            beta=0.1, eval_steps=30, trainer={"per_device_eval_batch_size": 32}, **shared,
        )
    )  # fmt: skip
    return fitted, trained


def _table(results: dict[str, Any]) -> str:
    before, after = results["dpo"]["before"], results["dpo"]["after"]
    torch_cost, cost = results["loss_end"]["torch"], results["loss_end"]["fastpo"]
    lines = [
        ("held-out pairs", "before DPO", "after DPO"),
        ("accuracy", *(f"{m['eval_logps/accuracies']:.1%}" for m in (before, after))),
        ("margin, nats", *(f"{m['eval_logps/margins']:.2f}" for m in (before, after))),
        ("reward accuracy", "-", f"{after['eval_rewards/accuracies']:.1%}"),
        ("reward margin", "-", f"{after['eval_rewards/margins']:.2f}"),
        ("", "", ""),
        ("loss end, fwd + bwd", "plain torch", "fastpo"),
        ("time, ms", *(f"{c['seconds'] * 1000:.0f}" for c in (torch_cost, cost))),
    ]
    if cost["peak_bytes"] is not None:
        mebibytes = (f"{c['peak_bytes'] / 2**20:.0f}" for c in (torch_cost, cost))
        lines.append(("peak memory, MiB", *mebibytes))
    return "\n".join(f"{a:20} {b:>12} {c:>12}" for a, b, c in lines)


def main(output: str = "demo_output") -> dict[str, Any]:
    """Run the demonstration; writes ``demo.json`` and ``demo.png`` into ``output``.

    Args:
        output: folder to write; the runs of an earlier demonstration in it are removed.

    Returns:
        What ``demo.json`` holds: the metrics of both trainings, and per method the seconds and the
        peak bytes of the loss end.
    """
    from fastpo.demo import measure, picture

    started = time.perf_counter()
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("init", "sft", "dpo"):
        shutil.rmtree(folder / part, ignore_errors=True)
    loss_end = measure.compare()
    prepared = _prepare(folder)
    fitted, trained = _train(folder, prepared)
    results = {
        "parameters": prepared["parameters"],
        "fit": fitted,
        "dpo": trained,
        "loss_end": loss_end,
        "loss_end_sizes": measure.SIZES,
    }
    state = folder / "dpo" / f"checkpoint-{trained['steps']}" / "trainer_state.json"
    history = json.loads(state.read_text(encoding="utf-8"))["log_history"]
    picture.draw(results, history, folder / "demo.png")
    results["seconds"] = time.perf_counter() - started
    (folder / "demo.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
    print(f"\n{_table(results)}\n")
    print(f"{folder / 'demo.png'}, {folder / 'demo.json'}: {results['seconds']:.0f} s in all")
    return results
