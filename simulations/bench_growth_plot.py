"""The figure of `bench growth`: memory, CPU and files of the coordinator against sites, parameters and rounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from privacy.errors import UsageError
from simulations.bench_plot import BLUE, BROWN, GREEN, GREY, RED, TEAL, VIOLET, drawing, grid, svg

_COLOURS = (BLUE, BROWN, GREEN, VIOLET, TEAL, GREY)


def figure(found: dict[str, Any]) -> str:
    """SVG of a result of `bench growth`. Raises UsageError `bench.no_sweep`."""
    if found.get("bench") != "growth":
        raise UsageError("bench.no_sweep", "The result isn't one of `bench growth`, so there is nothing to draw.",
                         "Run `fl-simulate bench growth --json` and give its last line.")
    rounds = found["rounds"]
    with drawing("growth", 11.2, 4.6) as made:
        axes = made.subplot_mosaic([["ms", "mp", "mr", "disk"], ["cs", "cp", "cr", "disk"]], width_ratios=(1, 1, 1, 1.25))
        for at in axes.values():
            grid(at)
        for column, what, label in (("s", "sites", "sites"), ("p", "parameters", "values in an update")):
            points = found[what]
            x = [point["sites" if what == "sites" else "dim"] for point in points]
            _line(axes["m" + column], x, [point["peak_rss_mib"] for point in points])
            _line(axes["c" + column], x, [1e3 * point["cpu_s_per_site"] for point in points])
            for row in "mc":
                axes[row + column].set_xscale("log", base=2 if what == "sites" else 10)
            if what == "sites":
                for row in "mc":
                    axes[row + column].set_xticks(x, [str(n) for n in x])
                    axes[row + column].axvline(found["group"], color=RED, linestyle="--", linewidth=0.8)
            axes["c" + column].set_xlabel(label)
        points = rounds["points"]
        x = [point["round"] for point in points]
        _line(axes["mr"], x, [point["peak_rss_mib"] for point in points], marker="")
        axes["cr"].plot(x, [1e3 * point["cpu_s"] / rounds["sites"] for point in points], color=BLUE, linewidth=1.2)
        axes["cr"].set_xlabel("rounds")
        for colour, what in zip(_COLOURS, sorted(points[0]["bytes"]), strict=True):
            axes["disk"].plot(x, [point["bytes"][what] / 2**10 for point in points], color=colour, linewidth=1.5, label=what)
        axes["disk"].set_xlabel("rounds")
        axes["disk"].set_title(f"files, KiB ({rounds['sites']} sites)", fontsize=9.0, loc="left")
        axes["disk"].legend(fontsize=7.5, frameon=False)
        axes["ms"].set_ylabel("peak memory, MiB")
        axes["cs"].set_ylabel("CPU ms, a site and round")
        for at in axes.values():
            at.set_ylim(bottom=0)
        return svg(made)


def _line(axes: Any, x: Sequence[float], y: Sequence[float | None], marker: str = "o") -> None:
    axes.plot(x, [float("nan") if value is None else value for value in y], color=BLUE, linewidth=1.7, marker=marker,
              markersize=3.5)
