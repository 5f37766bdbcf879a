"""Figures of the benches as SVG. Guarantees: the same result gives the same bytes (fixed ids, no date, no user style); text
stays text."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

_STYLE = {"svg.fonttype": "none", "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 9.0,
          "axes.edgecolor": "#666666", "axes.linewidth": 0.8, "text.color": "#222222", "axes.labelcolor": "#222222"}
BLUE, BROWN, GREEN, RED, VIOLET, TEAL, GREY = "#1f4e79", "#b45f06", "#38761d", "#a61c00", "#7b2d8b", "#0b7285", "#9a9a9a"


@contextmanager
def drawing(salt: str, width: float, height: float) -> Iterator[Any]:
    """A figure of so many inches. salt: sets its ids apart from other figures'."""
    with mpl.rc_context({**mpl.rcParamsDefault, **_STYLE, "svg.hashsalt": salt}):
        made = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(made)
        yield made


def svg(made: Any) -> str:
    """Call it inside `drawing`."""
    out = io.StringIO()
    made.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def grid(axes: Any) -> None:
    """Faint lines behind the data, and no frame above and to the right."""
    axes.grid(True, color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def bars(title: str, rows: Sequence[tuple[str, float]], limit: float | None = None) -> str:
    """Horizontal bars, the first one ours; a dashed line at `limit`."""
    with drawing(title, 7.2, 0.62 + 0.3 * len(rows)) as made:
        axes = made.subplots()
        places = range(len(rows))
        axes.barh(places, [value for _, value in rows], color=[BLUE, *[GREY] * (len(rows) - 1)], height=0.62)
        axes.set_yticks(places, [name for name, _ in rows])
        axes.invert_yaxis()
        for place, (_, value) in zip(places, rows, strict=True):
            axes.annotate(f"{value:.3g}", (value, place), xytext=(4, 0), textcoords="offset points", va="center")
        if limit is not None:
            axes.axvline(limit, color=RED, linestyle="--", linewidth=1)
        axes.set_xlim(0, 1.12 * max(*(value for _, value in rows), limit or 0.0))
        axes.set_title(title, fontsize=9.0, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        return svg(made)
