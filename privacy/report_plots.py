"""The report's figures, as SVG to be put inside an HTML page.

Guarantees: the same data gives the same bytes (fixed ids, no date, no user style); text stays text; no address of
another resource is left in the markup.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

MAX_BARS = 40  # sites that the figure per site shows, those that spent most
LABELLED_SITES = 8  # more sites are drawn in grey, without a label
MAX_EPSILON = 700.0  # exp() of it is finite; beyond it nothing is hidden anyway
_COLOURS = ("#1f4e79", "#b45f06", "#38761d", "#7b2d8b", "#a61c00", "#0b7285", "#6b5900", "#5f3dc4")
_INK, _GREY = "#222222", "#9a9a9a"
_STYLE = {"svg.fonttype": "none", "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 9.0,
          "axes.edgecolor": "#666666", "axes.linewidth": 0.8, "text.color": _INK, "axes.labelcolor": _INK}
_STRIP = re.compile(r"\A.*?(?=<svg\b)|<metadata>.*?</metadata>| xmlns(?::\w+)?=\"[^\"]*\"|"
                    r" id=\"[a-z0-9.]*_\d+\"", re.S)  # such ids are never referred to


@dataclass(frozen=True)
class Charge:
    """One reserve in a site's ledger: its cumulative epsilon, and whether the attempt became a round."""

    epsilon: float
    done: bool


@dataclass(frozen=True)
class Bar:
    """One site: epsilon of this run, of its data in all, the cap of its data, and whether it shows a ledger."""

    site: str
    run: float
    total: float
    cap: float
    ledger: bool


def spending_plot(charges: Mapping[str, Sequence[Charge]], caps: Mapping[str, float]) -> str:
    """Cumulative epsilon of each site after each charge, against its budget lines (label -> epsilon). SVG markup."""
    with _style("spending"):
        figure, axes = _axes(6.4, 3.2)
        for i, (site, line) in enumerate(charges.items()):
            colour, label = (_COLOURS[i], site) if i < LABELLED_SITES else (_GREY, "_")
            axes.step(range(1, len(line) + 1), [c.epsilon for c in line], where="post", color=colour, label=label,
                      linewidth=max(1.3, 3.0 - 0.6 * i), zorder=3)  # lines that coincide stay visible, thick below thin
            for done, fill in ((True, colour), (False, "white")):
                points = [(j, c.epsilon) for j, c in enumerate(line, 1) if c.done is done]
                axes.plot([x for x, _ in points], [y for _, y in points], "o", markersize=4, zorder=4, color=colour,
                          markerfacecolor=fill, label="_")
        for (label, cap), dash in zip(caps.items(), ((6, 2), (2, 2)), strict=False):
            axes.axhline(cap, color=_INK, linewidth=1.1, dashes=dash, label=f"{label} {cap:g}")
        longest = max((len(line) for line in charges.values()), default=1)
        axes.set_xlim(0.7, longest + 0.3)
        axes.set_ylim(0, 1.12 * max([*caps.values(), *(c.epsilon for line in charges.values() for c in line), 1e-9]))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("charges in this run (hollow: void attempt)")
        axes.set_ylabel("cumulative epsilon")
        figure.legend(loc="outside upper left", fontsize=8, frameon=False, ncols=3)
        return _svg(figure)


def sites_plot(bars: Sequence[Bar], budget: float) -> str:
    """Epsilon of each site's data, this run's part dark, and its cap; the MAX_BARS that spent most. SVG markup."""
    shown = sorted(bars, key=lambda bar: -bar.total)[:MAX_BARS] if len(bars) > MAX_BARS else bars
    with _style("sites"):
        figure, axes = _axes(6.4, 1.1 + 0.3 * len(shown))
        axes.grid(visible=False, axis="y")
        rows = range(len(shown), 0, -1)
        axes.barh(rows, [bar.total for bar in shown], height=0.55, color="#b9cbdd", label="all jobs on the data")
        axes.barh(rows, [bar.run for bar in shown], height=0.55, color=_COLOURS[0], label="this run")
        axes.plot([bar.cap for bar in shown], rows, "|", markersize=13, markeredgewidth=2, color=_COLOURS[4],
                  label="cap of the data")
        axes.axvline(budget, color=_INK, linewidth=1.1, dashes=(6, 2), label=f"budget of the run {budget:g}")
        axes.set_yticks(rows, [bar.site[:24] + ("" if bar.ledger else " (no ledger)") for bar in shown])
        axes.set_ylim(0.4, len(shown) + 0.6)
        axes.set_xlim(0, 1.06 * max(budget, *(max(bar.total, bar.cap) for bar in shown)))
        axes.set_xlabel("epsilon")
        figure.legend(loc="outside upper left", fontsize=8, frameon=False, ncols=4)
        return _svg(figure)


def metric_plot(points: Sequence[tuple[int, float, str]]) -> str:
    """A public metric by round: (round, value, name of the metric). SVG markup."""
    with _style("metric"):
        figure, axes = _axes(4.6, 2.6)
        for i, name in enumerate(dict.fromkeys(name for *_, name in points)):
            line = [(at, value) for at, value, called in points if called == name]
            axes.plot([at for at, _ in line], [value for _, value in line], "o-", markersize=4, linewidth=1.6,
                      color=_COLOURS[i % len(_COLOURS)], label=name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("round (0: before training)")
        axes.legend(loc="best", fontsize=8, framealpha=0.9)
        return _svg(figure)


def trade_off(epsilons: Sequence[float], deltas: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """The attacker's best trade-off from a privacy profile: (false alarms, misses), both shape (201,), in [0, 1].

    f(a) = max over (epsilon, delta) of 1 - delta - e^eps a and e^-eps (1 - delta - a), and 0: Dong, Roth and Su,
    "Gaussian differential privacy", proposition 2.5; every point of the profile only raises f."""
    alarm = np.linspace(0.0, 1.0, 201)
    miss = np.zeros_like(alarm)
    for eps, delta in zip(np.minimum(epsilons, MAX_EPSILON), deltas, strict=True):
        np.maximum(miss, 1.0 - delta - np.exp(eps) * alarm, out=miss)
        np.maximum(miss, np.exp(-eps) * (1.0 - delta - alarm), out=miss)
    return alarm, miss


def trade_off_plot(alarm: np.ndarray, miss: np.ndarray) -> str:
    """Miss rate against false-alarm rate of the best attacker, with guessing as the diagonal. SVG markup."""
    with _style("trade-off"):
        figure, axes = _axes(3.6, 3.2)
        axes.plot([0, 1], [1, 0], color=_GREY, linewidth=1.1, dashes=(3, 2), label="guessing")
        axes.plot(alarm, miss, color=_COLOURS[0], linewidth=1.6, label="best attacker")
        axes.fill_between(alarm, miss, 1 - alarm, color=_COLOURS[0], alpha=0.08, linewidth=0)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        axes.set_xlabel("false alarms (record wasn't used)")
        axes.set_ylabel("misses (record was used)")
        axes.legend(loc="upper right", fontsize=8, framealpha=0.9)
        return _svg(figure)


def _style(salt: str) -> AbstractContextManager[None]:
    """Our settings on top of matplotlib's own, whatever the user has set. Two figures get different ids by salt."""
    return mpl.rc_context({**mpl.rcParamsDefault, **_STYLE, "svg.hashsalt": salt})


def _axes(width: float, height: float) -> tuple[Figure, mpl.axes.Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    axes.grid(True, color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Figure) -> str:
    """Markup for inside HTML: no prolog, metadata, name spaces or ids that two figures would share."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _STRIP.sub("", out.getvalue())
