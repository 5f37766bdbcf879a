"""The demo's data: patients' own words for phenotypes -> organ system, split over four skewed hospitals.

From the Human Phenotype Ontology (hp.obo, "layperson" synonyms). A phrase's class is the one child of "Phenotypic
abnormality" above its term; phrases with several, and classes with fewer than 80 phrases, are left out. The public
split holds out a fifth of the terms; every term lies in one place only. Everything is decided by hashes of term ids.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

Row = tuple[str, str, str]  # phrase, term, organ system
ROOT = "HP:0000118"
LEAST = 80
PUBLIC_SHARE, HOME_SHARE = 0.2, 0.7
HOSPITALS = ("hospital-a", "hospital-b", "hospital-c", "hospital-d")
# The hospital that specialises in a class, by the class's rank in size: it gets 70 % of its terms.
HOME = (0, 1, 2, 3, 1, 2, 3, 2, 3, 1, 1)
CHAT_PUBLIC = 400  # answers are generated for each of them, which takes a while
_ORGAN = re.compile(r"^Abnormality of (the )?")
_SYNONYM = re.compile(r'synonym: "((?:[^"\\]|\\.)*)" \w+ layperson')


def prepare(obo: Path, folder: Path) -> dict[str, Path]:
    """Write one CSV (text, label) per hospital and public.csv, unless they are there. Returns name -> file."""
    files = {name: folder / f"{name}.csv" for name in (*HOSPITALS, "public")}
    if not all(f.is_file() for f in files.values()):
        split = _split(phrases(obo))
        for name, file in files.items():
            _write(file, split[name])
    return files


def prepare_chat(obo: Path, folder: Path) -> dict[str, Path]:
    """The same split as instructions: one JSONL (prompt, completion) per hospital, and 400 held-out phrases in public.
    A completion is "organ system: clinical term", such as "eye: Cataract"."""
    files = {name: folder / f"{name}-chat.jsonl" for name in (*HOSPITALS, "public")}
    if not all(f.is_file() for f in files.values()):
        split, names = _split(phrases(obo)), dict(_names(obo))
        split["public"] = sorted(split["public"], key=lambda row: _unit("chat", row[0]))[:CHAT_PUBLIC]
        for name, file in files.items():
            lines = [{"prompt": text, "completion": f"{_ORGAN.sub('', label)}: {names[term]}"}
                     for text, term, label in split[name]]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return files


def _split(rows: list[Row]) -> dict[str, list[Row]]:
    ranked = [name for name, _ in Counter(label for _, _, label in rows).most_common()]
    home = dict(zip(ranked, HOME, strict=True))
    split: dict[str, list[Row]] = {name: [] for name in (*HOSPITALS, "public")}
    for row in rows:
        _, term, label = row
        if _unit("public", term) < PUBLIC_SHARE:
            split["public"].append(row)
        elif _unit("home", term) < HOME_SHARE:
            split[HOSPITALS[home[label]]].append(row)
        else:
            split[HOSPITALS[int(_unit("other", term) * len(HOSPITALS))]].append(row)
    return split


def phrases(obo: Path) -> list[Row]:
    """Every lay phrase that has exactly one organ system, sorted; classes of at least 80 phrases."""
    names: dict[str, str] = {}
    parents: dict[str, list[str]] = {}
    spoken: list[tuple[str, str]] = []
    term = ""
    with obo.open(encoding="utf-8") as f:
        for line in map(str.rstrip, f):
            if line.startswith("["):
                term = ""
            elif line.startswith("id: HP:"):
                term = line[4:]
                parents[term] = []
            elif term and line.startswith("name: "):
                names[term] = line[6:]
            elif term and line.startswith("is_a: "):
                parents[term].append(line[6:].split(" ")[0])
            elif term and (match := _SYNONYM.match(line)):
                spoken.append((match.group(1), term))

    @functools.cache
    def organs(at: str) -> frozenset[str]:
        if ROOT in parents[at]:
            return frozenset({at})
        return frozenset().union(*(organs(p) for p in parents[at]))

    rows = sorted({(text, t, names[next(iter(organs(t)))]) for text, t in spoken if len(organs(t)) == 1})
    sizes = Counter(label for _, _, label in rows)
    return [row for row in rows if sizes[row[2]] >= LEAST]


def _names(obo: Path) -> Iterator[tuple[str, str]]:
    """Term and its clinical name."""
    term = ""
    with obo.open(encoding="utf-8") as f:
        for line in map(str.rstrip, f):
            if line.startswith("id: HP:"):
                term = line[4:]
            elif term and line.startswith("name: "):
                yield term, line[6:]
                term = ""


def _unit(salt: str, term: str) -> float:
    """A fixed number in [0, 1) for a term."""
    return int.from_bytes(hashlib.sha256(f"{salt} {term}".encode()).digest()[:8], "big") / 2**64


def _write(file: Path, rows: Iterable[Row]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f)
        writer.writerow(("text", "label"))
        writer.writerows((text, label) for text, _, label in rows)
