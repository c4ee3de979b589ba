"""One picture of a demo run: held-out pairs, training curves and the cost of the loss end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_BEFORE, _AFTER, _TORCH, _FASTPO = "#9aa5b1", "#1f6f8b", "#c9a227", "#1f6f8b"


def _bars(axes, names: list[str], values: list[float], colors: list[str], form: str) -> None:
    bars = axes.bar(names, values, color=colors, width=0.6)
    axes.bar_label(bars, [form.format(v) for v in values], padding=3, fontsize=11)
    axes.margins(y=0.18)
    axes.spines[["top", "right"]].set_visible(False)


def draw(results: dict[str, Any], history: list[dict[str, float]], path: Path) -> None:
    """Write a PNG.

    Args:
        results: of :func:`fastpo.demo.main`.
        history: the log of the preference training, ``trainer_state.json``'s ``log_history``.
        path: of the PNG.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(13, 7.4), layout="constrained")
    before, after = results["dpo"]["before"], results["dpo"]["after"]
    names, colors = ["before DPO", "after DPO"], [_BEFORE, _AFTER]
    runs = [m["eval_logps/accuracies"] for m in (before, after)]
    _bars(axes[0, 0], names, [100 * r for r in runs], colors, "{:.1f} %")
    axes[0, 0].set(title="Held-out pair accuracy", ylabel="pairs with the chosen one likelier, %")
    axes[0, 0].axhline(50, color="0.5", linewidth=0.8, linestyle=":")
    margins = [m["eval_logps/margins"] for m in (before, after)]
    _bars(axes[0, 1], names, margins, colors, "{:.1f}")
    axes[0, 1].set(title="Held-out margin", ylabel="log p(chosen) - log p(rejected), nats")

    evaluated = [log for log in history if "eval_logps/accuracies" in log]
    curve = axes[0, 2]
    steps = [0] + [log["step"] for log in evaluated if log["step"]]
    logs = [before] + [log for log in evaluated if log["step"]]
    accuracies = [100 * log["eval_logps/accuracies"] for log in logs]
    curve.plot(steps, accuracies, "o-", color=_AFTER, label="accuracy, %")
    curve.set(title="Held-out pairs during DPO", xlabel="step", ylabel="accuracy, %")
    right = curve.twinx()
    right.plot(steps, [log["eval_logps/margins"] for log in logs], "s--", color=_TORCH)
    right.set_ylabel("margin, nats (dashed)", color=_TORCH)
    curve.spines["top"].set_visible(False)
    right.spines["top"].set_visible(False)

    cost, sizes = results["loss_end"], results["loss_end_sizes"]
    names, colors = ["plain torch", "fastpo"], [_TORCH, _FASTPO]
    both = [cost["torch"], cost["fastpo"]]
    _bars(axes[1, 0], names, [1000 * c["seconds"] for c in both], colors, "{:.0f} ms")
    axes[1, 0].set(title="Loss end: time, forward + backward", ylabel="ms (median)")
    if all(c["peak_bytes"] is not None for c in both):
        _bars(axes[1, 1], names, [c["peak_bytes"] / 2**20 for c in both], colors, "{:.0f} MiB")
        axes[1, 1].set(title="Loss end: peak memory beyond inputs", ylabel="MiB")
    else:
        axes[1, 1].axis("off")
    losses = [(log["step"], log["loss"]) for log in history if "loss" in log]
    axes[1, 2].plot(*zip(*losses, strict=True), color=_AFTER)
    axes[1, 2].set(title="DPO loss (training pairs)", xlabel="step", ylabel="loss, nats")
    axes[1, 2].axhline(0.6931, color="0.5", linewidth=0.8, linestyle=":")
    axes[1, 2].spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"fastpo demo: {results['parameters'] / 1e6:.1f} M parameters on Python's documentation; "
        f"loss end at N = {sizes['tokens']}, H = {sizes['hidden']}, V = {sizes['vocab']}, fp32, CPU"
    )
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
