"""Picture of the speed-up by shared prefixes against prompt length."""

from __future__ import annotations

from collections.abc import Sequence

from .shared_prefix import Row


def draw(rows: Sequence[Row], path: str) -> None:
    """Draws speed-up against prompt length as a PNG, with a line per group size and completion length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    rows_of_line: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        rows_of_line.setdefault((row.group_size, row.completion_length), []).append(row)
    for (group, completion), line in sorted(rows_of_line.items()):
        line.sort(key=lambda row: row.prompt_length)
        label = f"G={group}, S={completion}"
        prompt_lengths = [row.prompt_length for row in line]
        (drawn,) = axes.plot(prompt_lengths, [row.speedup for row in line], "o-", label=f"{label}: shared")
        color = drawn.get_color()
        grouper_speedups = [row.speedup_prefix_grouper for row in line if row.speedup_prefix_grouper is not None]
        if len(grouper_speedups) == len(line):
            axes.plot(prompt_lengths, grouper_speedups, "x--", color=color, label=f"{label}: PrefixGrouper")
        axes.plot(prompt_lengths, [row.token_ratio for row in line], ":", color=color, alpha=0.6)
    axes.set(
        xlabel="prompt tokens", ylabel="times faster than dense", title="Forward and backward of log-probabilities"
    )
    axes.set_xscale("log", base=2)
    lengths = sorted({row.prompt_length for row in rows})
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, title="dotted: ratio of tokens", title_fontsize=8)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
