"""attack.json as one page that explains itself, English and Chinese side by side, in the style of the privacy report.

Guarantees: the page is a function of the document alone, byte for byte; text from it is escaped; no other resource is
asked for.
"""

from __future__ import annotations

import html
import math
from pathlib import Path
from typing import Any

import jinja2

import privacy

BLUE, RED, GREY, INK = "#1f4e79", "#a61c00", "#9a9a9a", "#222222"
LEFT, RIGHT, TOP, ROW = 110, 600, 26, 22  # of the figure of ranks, pixels
CURVE = (64, 600, 16, 190)  # left, right, top, bottom of the figure of noise


def page(document: dict[str, Any]) -> str:
    """HTML of a document that `simulations.attack.attack` made."""
    folders = [Path(__file__).with_name("templates"), Path(privacy.__file__).with_name("templates")]
    templates = jinja2.Environment(loader=jinja2.FileSystemLoader(folders), autoescape=True, trim_blocks=True,
                                   undefined=jinja2.StrictUndefined, lstrip_blocks=True, keep_trailing_newline=True)
    plain, noisy = document["scenarios"]["plain"], document["scenarios"]["noise"]
    stops = [s["sigma"] for s in document["sweep"] if s["rate"] < 0.5 * plain["rate"]]
    figures = {"ranks": _ranks(document), "noise": _noise(document)}
    return templates.get_template("attack.html.j2").render(
        d=document, plain=plain, noisy=noisy, figures=figures, percent=_percent, sigma=_power,
        weakest=min(stops, default=None))


def _percent(rate: float) -> str:
    """Whole percents; a share that isn't 0 or 1 never reads 0 % or 100 %."""
    if 0 < rate < 0.01:
        return "< 1 %"
    return f"{min(99, round(100 * rate)) if rate < 1 else 100} %"


def _power(value: float) -> str:
    """A noise multiplier: powers of ten in words that print, others with three decimals."""
    return f"{value:g}" if value >= 1e-3 else f"1e{round(math.log10(value))}"


def _text(x: float, y: float, words: str, *, anchor: str = "middle", colour: str = INK) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{html.escape(words)}</text>'


def _svg(width: float, height: float, parts: list[str]) -> str:
    return (f'<svg viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}" '
            f'font-family="inherit" font-size="12">{"".join(parts)}</svg>')


def _ranks(document: dict[str, Any]) -> str:
    """Place of each true token in the attacker's list, without and with noise, on a logarithmic axis."""
    size, parts = document["model"]["vocabulary"], []
    bottom = TOP + ROW * len(document["without_dp"])

    def at(rank: float) -> float:
        return LEFT + (RIGHT - LEFT) * math.log10(rank) / math.log10(size)

    for tick in [10**i for i in range(int(math.log10(size)) + 1)]:
        parts += [f'<line x1="{at(tick):.1f}" x2="{at(tick):.1f}" y1="{TOP - 8}" y2="{bottom}" stroke="#e4e4e4"/>',
                  _text(at(tick), bottom + 16, f"{tick:,}")]
    chance = at((size + 1) / 2)
    parts += [f'<line x1="{chance:.1f}" x2="{chance:.1f}" y1="{TOP - 8}" y2="{bottom}" stroke="{GREY}" '
              'stroke-dasharray="4 3"/>', _text(chance, TOP - 12, "guessing · 猜测", colour="#59626d")]
    for i, (plain, noisy) in enumerate(zip(document["without_dp"], document["with_dp"], strict=True)):
        y = TOP + ROW * (i + 0.5)
        parts.append(_text(LEFT - 12, y + 4, plain["token"], anchor="end"))
        parts += [f'<circle cx="{at(r):.1f}" cy="{y:.1f}" r="3.5" fill="none" stroke="{RED}"/>' for r in noisy["ranks"]]
        parts += [f'<circle cx="{at(r):.1f}" cy="{y:.1f}" r="5" fill="{BLUE}"/>' for r in plain["ranks"]]
    parts.append(_text((LEFT + RIGHT) / 2, bottom + 34,
                       "place of the true word in the attacker's list · 真实词在攻击者列表中的名次"))
    return _svg(RIGHT + 30, bottom + 44, parts)


def _noise(document: dict[str, Any]) -> str:
    """Share of tokens recovered over the noise multiplier, the setting under test marked."""
    left, right, top, bottom = CURVE
    points = [(math.log10(s["sigma"]), s["rate"]) for s in document["sweep"]]
    low, high = math.floor(points[0][0]), math.ceil(points[-1][0])
    spots = [(left + (right - left) * (x - low) / (high - low), bottom - (bottom - top) * rate) for x, rate in points]
    parts = []
    for share in (0, 0.5, 1):
        y = bottom - (bottom - top) * share
        parts += [f'<line x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e4e4e4"/>',
                  _text(left - 8, y + 4, f"{share:.0%}", anchor="end")]
    parts += [_text(x, bottom + 16, _power(s["sigma"]), colour=RED if s is document["sweep"][-1] else INK)
              for (x, _), s in zip(spots, document["sweep"], strict=True)]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
    parts.append(f'<polyline points="{line}" fill="none" stroke="{BLUE}" stroke-width="1.6"/>')
    parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{BLUE}"/>' for x, y in spots[:-1]]
    x, y = spots[-1]
    parts += [f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}" stroke="{RED}" stroke-dasharray="4 3"/>',
              f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{RED}"/>',
              _text(x - 8, top + 12, "the setting · 本设置", anchor="end", colour=RED),
              _text((left + right) / 2, bottom + 34, "noise, as a multiple of the clip norm · 噪声（裁剪范数的倍数）")]
    return _svg(right + 30, bottom + 44, parts)
