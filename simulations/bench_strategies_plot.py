"""The figure of `bench strategies`: accuracy of the rules against skew, rank and epsilon, as an SVG file."""

from __future__ import annotations

from statistics import mean
from typing import Any

from privacy.errors import UsageError
from simulations.bench_plot import drawing, svg

_COLOURS = {"ffa": "#1f4e79", "fedit": "#b45f06", "rolora": "#38761d", "exact": "#a61c00", "fedsb": "#7b2d8b",
            "hetero": "#0b7285"}
_DASHED = {"flora": "#a61c00", "flexlora": "#b45f06", "krum": "#9a9a9a", "trimmed_mean": "#777777", "median": "#555555"}
PANELS = (("classes", "classes at a silo, of 8 (8: all alike)"), ("rank", "rank of LoRA"), ("epsilon", "epsilon"))


def figure(found: dict[str, Any]) -> str:
    """SVG of a result with its sweep. Whiskers: least and most of the seeds. Raises UsageError `bench.no_sweep`."""
    if "sweep" not in found:
        raise UsageError("bench.no_sweep", "The result holds no sweep, so there is nothing to draw.",
                         "Run `fl-simulate bench strategies --sweep --json` and give that result.")
    with drawing("strategies", 9.6, 3.9) as made:
        axes = made.subplots(1, len(PANELS), sharey=True)
        for at, (name, label) in zip(axes, PANELS, strict=True):
            cells = found["sweep"][name]
            if name == "epsilon":
                cells = sorted(cells, key=lambda cell: cell["at"] or float("inf"))
            _panel(at, cells, label)
        axes[0].set_ylabel("accuracy, held-out sentences")
        made.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", fontsize=8, frameon=False, ncols=6)
        return svg(made)


def _panel(axes: Any, cells: list[dict[str, Any]], label: str) -> None:
    """One line for each rule over evenly spaced points."""
    places = range(len(cells))
    axes.grid(True, color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    for rule in cells[0]["accuracy"]:
        taken = [cell["accuracy"][rule] for cell in cells]
        middle = [mean(one) for one in taken]
        spread = ([m - min(t) for m, t in zip(middle, taken, strict=True)],
                  [max(t) - m for m, t in zip(middle, taken, strict=True)])
        dashed = rule in _DASHED
        axes.errorbar(places, middle, yerr=spread, label=rule, color=_DASHED.get(rule) or _COLOURS.get(rule, "#222222"),
                      linewidth=1.2 if dashed else 1.7, linestyle="--" if dashed else "-", marker="o", markersize=3.5,
                      elinewidth=0.7, capsize=2)
    axes.set_xticks(places, ["none" if cell["at"] is None else f"{cell['at']:g}" for cell in cells])
    axes.set_xlabel(label)
