"""The picture of a run: a panel for every reward, for their sum and for the length."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .log_metrics import is_evaluation, is_training, shown

_TRAINING, _HELD_OUT, _INK = "#2f6db5", "#d9641e", "#333333"


def draw(history: Sequence[Mapping[str, Any]], title: str) -> bytes | None:
    """Draws a PNG of the shown metrics of a log history over the steps. Returns None where there is nothing to draw."""
    training = _series(entry for entry in history if is_training(entry))
    held_out = _series((entry for entry in history if is_evaluation(entry)), "eval_")
    names = [name for name, points in training.items() if len(points) > 1]
    if not names:
        return None
    columns = len(names) if len(names) <= 4 else math.ceil(math.sqrt(len(names)))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(3.6 * columns + 0.4, 2.9 * rows + 0.9), dpi=130, layout="constrained")
    figure.suptitle(title, fontsize=11, color=_INK, parse_math=False)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel, name in zip(axes, names, strict=False):
        _panel(panel, name, training[name], held_out.get(name, []))
    for panel in axes[len(names) :]:
        panel.axis("off")
    legends = [panel.get_legend_handles_labels() for panel in axes[: len(names)]]
    handles, labels = max(legends, key=lambda legend: len(legend[1]))
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()


def smooth(values: Sequence[float]) -> list[float]:
    """Averages over a centred window of about a fifth of the run, shorter at the ends so that no value is invented."""
    half = len(values) // 10
    means = []
    for index in range(len(values)):
        reach = min(half, index, len(values) - 1 - index)
        window = values[index - reach : index + reach + 1]
        means.append(sum(window) / len(window))
    return means


def _series(entries: Any, prefix: str = "") -> dict[str, list[tuple[int, float]]]:
    """Returns label -> (step, value) of the finite values."""
    series: dict[str, list[tuple[int, float]]] = {}
    for entry in entries:
        for name, value in shown(entry, prefix).items():
            if math.isfinite(value):
                series.setdefault(name, []).append((entry.get("step", 0), value))
    return series


def _panel(panel: Any, name: str, training: list[tuple[int, float]], held_out: list[tuple[int, float]]) -> None:
    """Draws a metric: the training steps, their smoothed curve, and the held-out evaluations."""
    steps, values = [step for step, _ in training], [value for _, value in training]
    panel.plot(steps, values, color=_TRAINING, alpha=0.3, linewidth=1, marker=".", markersize=4, label="training step")
    panel.plot(steps, smooth(values), color=_TRAINING, linewidth=2, label="smoothed")
    if held_out:
        places, results = [step for step, _ in held_out], [value for _, value in held_out]
        panel.plot(
            places,
            results,
            color=_HELD_OUT,
            linestyle=":" if len(held_out) > 2 else "none",
            linewidth=1.2,
            marker="D",
            markersize=6,
            label="held-out",
            zorder=3,
            clip_on=False,
        )
        for step, value in (held_out[0], held_out[-1]):
            panel.annotate(
                f"{value:.2f}",
                (step, value),
                xytext=(0, 8),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color=_HELD_OUT,
                fontweight="bold",
            )
    panel.set_title(f"{name} (tokens)" if name == "length" else name, fontsize=10, color=_INK, parse_math=False)
    panel.set_xlabel("step", fontsize=9, color=_INK)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    everything = values + [value for _, value in held_out]
    if name not in ("length", "loss") and min(everything) >= 0 and max(everything) <= 1:
        panel.set_ylim(-0.04, 1.12)
    else:
        panel.margins(y=0.18)
    panel.margins(x=0.06)
    panel.grid(axis="y", color="#dddddd", linewidth=0.7)
    panel.set_axisbelow(True)
    panel.tick_params(labelsize=8, colors=_INK, length=3)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
