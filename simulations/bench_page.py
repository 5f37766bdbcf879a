"""The results of `bench all` as one page: goals, comparisons with other systems, and each bench as it speaks to people.

Guarantees: the page is a function of the results alone, byte for byte; text from them is escaped; no other resource is
asked for; a figure that wasn't measured is a reason in words.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import jinja2

import privacy
from simulations.bench_growth_plot import figure as growth_figure
from simulations.bench_plot import bars

_RENDERERS = {"secagg": "bench_secagg", "round": "bench_round", "dp-step": "bench_dp_step", "scale": "bench_scale",
              "strategies": "bench_strategies", "growth": "bench_growth", "nvflare": "bench_nvflare"}
NOT_INSTALLED = "not installed: pip install 'consilo[bench]'"
Results = Mapping[str, dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """value, or why there is none."""

    name: str
    value: float | None
    why: str = ""


@dataclass(frozen=True)
class Comparison:
    """The same thing done by this project, which comes first, and by others. Less is better."""

    title: str
    rows: tuple[Row, ...]

    @property
    def figure(self) -> str:
        return _data(bars(self.title, [(row.name, row.value) for row in self.rows if row.value is not None]))


def page(done: dict[str, Any]) -> str:
    """HTML of what `bench_all.run` made."""
    folders = [Path(__file__).with_name("templates"), Path(privacy.__file__).with_name("templates")]
    templates = jinja2.Environment(loader=jinja2.FileSystemLoader(folders), autoescape=True, trim_blocks=True,
                                   undefined=jinja2.StrictUndefined, lstrip_blocks=True, keep_trailing_newline=True)
    results = {part["name"]: part["result"] for part in done["parts"] if part["result"]}
    growth = results.get("growth")
    return templates.get_template("bench.html.j2").render(
        d=done, goals=_goals(done), comparisons=[one for make in _COMPARISONS for one in make(results)], text=_text,
        growth=_data(growth_figure(growth)) if growth else None, number=lambda value: f"{value:.4g}", dump=_dump)


def _goals(done: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"part": part["name"], "name": name, **goal} for part in done["parts"] if part["result"]
            for name, goal in part["result"].get("goals", {}).items()]


def _text(result: dict[str, Any]) -> str:
    """What the bench's command prints for people."""
    return str(import_module(f"simulations.{_RENDERERS[result['bench']]}").render(result))


def _dump(result: dict[str, Any]) -> str:
    return json.dumps({name: value for name, value in result.items() if name != "samples"}, indent=1, sort_keys=True)


def _data(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def _secagg(results: Results) -> list[Comparison]:
    if (found := results.get("secagg")) is None:
        return []
    flower, ckks = found["secaggplus"], found["tenseal"] or {}
    size = f"{found['sites']} sites"

    def three(own: float, name: str) -> tuple[Row, ...]:
        return (Row("Consilo", own), Row("Flower SecAgg+", flower[name]),
                Row("TenSEAL CKKS, as NVFlare uses it", ckks.get(name), NOT_INSTALLED))

    return [Comparison(f"Client's data path, CPU ns a value, {size}", three(found["client_ns"], "client_ns")),
            Comparison(f"Upload, bytes to those of float32, {size}", three(found["upload_ratio_fp32"], "upload_ratio_fp32")),
            Comparison(f"Server's arithmetic, CPU s, {size}, {found['dim']} values", (
                Row("Consilo, masked", found["server_cpu_s"]), Row("Flower FedAvg, no masks", found["flower_cpu_s"])))]


def _round(results: Results) -> list[Comparison]:
    if (found := results.get("round")) is None:
        return []
    why = found["ratio_stock_flower_why"] or "unknown: this isn't Linux"
    return [Comparison(f"A round without training, {unit}, {found['sites']} sites, {found['dim']} values", (
        Row("Consilo, masked", found["overhead" + key], why), Row("Consilo, masks off", found["plain" + key], why),
        Row("stock Flower", found["stock_flower" + key], why)))
        for unit, key in (("wall s", "_s"), ("CPU s of all processes", "_cpu_s"))]


def _steps(results: Results) -> list[Comparison]:
    return [Comparison(f"A training step to one without privacy, CPU, {found['model']}", (
        Row("Consilo, fused", found["ratio_plain"]), *(Row(name, value) for name, value in found["to_plain"].items()
                                                       if name.startswith("opacus"))))
            for found in results.values() if found["bench"] == "dp-step"]


def _coordinator(results: Results) -> list[Comparison]:
    own, other = results.get("scale network"), results.get("nvflare")
    if own is None or other is None:
        return []
    base, size = own["baseline"], f"{other['sites']} sites, {other['dim']} values"
    why = other["why"] or "unknown: this isn't Linux"
    same = (base["sites"], own["dim"]) == (other["sites"], other["dim"])
    return [Comparison(f"{what}, {size}", (
        Row("Consilo: masks, signatures, mutual TLS", base[key], why), Row("NVFlare simulator: plain", other.get(key), why)))
        for what, key in (("Coordinator, CPU s a site and round", "cpu_s_per_site"),
                          ("Coordinator, peak memory, MiB", "peak_rss_mib")) if same]


_COMPARISONS: tuple[Callable[[Results], list[Comparison]], ...] = (_secagg, _round, _steps, _coordinator)
