"""The PNG of a comparison: a panel per metric with the mean of every arm and its band over seeds."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .curves import COLORS, levels, limits
from .records import write_file

_INK = "#333333"


def draw(found: Mapping[str, Any], file: Path) -> None:
    """Draws what a comparison found; without any finished run the picture says so."""
    names = list(found["curves"])
    columns = 2 if len(names) == 4 else min(max(len(names), 1), 3)
    rows = math.ceil(max(len(names), 1) / columns)
    figure = Figure(figsize=(4.2 * columns, 3.0 * rows + 0.9), dpi=130, layout="constrained")
    seeds = len(found["seeds"])
    legend = f"mean of {seeds} seeds, band: its 95% interval" if seeds > 1 else "one seed"
    figure.suptitle(f"{found['claim'] or found['recipe']}\n{legend}", fontsize=11, color=_INK)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    colors = dict(zip(found["arms"], COLORS * len(found["arms"]), strict=False))
    for panel, name in zip(panels, names, strict=False):
        _panel(panel, name, found["curves"][name], colors, levels(found).get(name))
    for panel in panels[len(names) :]:
        panel.axis("off")
    if not names:
        panels[0].text(0.5, 0.5, "no run has finished", ha="center", color=_INK)
    handles, labels = panels[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    write_file(file, content.getvalue())


def _panel(
    panel: Any, name: str, arms: Mapping[str, Mapping[str, Any]], colors: Mapping[str, str], level: float | None
) -> None:
    for arm, curve in arms.items():
        panel.plot(curve["steps"], curve["mean"], color=colors[arm], linewidth=1.8, label=arm)
        if "low" in curve:
            panel.fill_between(curve["steps"], curve["low"], curve["high"], color=colors[arm], alpha=0.2, linewidth=0)
    if level is not None:
        panel.axhline(level, color=_INK, linewidth=0.8, linestyle=":")
    panel.set_title(name, fontsize=10, color=_INK)
    panel.set_xlabel("step", fontsize=9, color=_INK)
    panel.set_ylim(*limits(arms, level))
    panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    panel.margins(x=0.02)
    panel.grid(axis="y", color="#dddddd", linewidth=0.7)
    panel.set_axisbelow(True)
    panel.tick_params(labelsize=8, colors=_INK, length=3)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
