"""More than a thousand lies about valid bundles, from a fixed seed: none may pass, whoever signs for it.

A lie is told by a stranger (nothing is signed anew), by the coordinator alone (`reseal`: it signs the manifest of what is
there now) or by the coordinator with all sites (`relog`: the log and its witnesses, too). Pure functions that cost time
(signatures, chains, epsilon, digests) are computed once for equal input; what is checked, and where, is the product's.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from base64 import b64decode
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from evidence_fixture import HUB, RUN, SITES, Consortium, contract, sha, write_bundle

import privacy.statements
import privacy.verify_run
from privacy.bundle import LAYOUT, MANIFEST, read_bundle, statement_name
from privacy.canonical import canonical, parse
from privacy.contract import Contract
from privacy.identity import fingerprint
from privacy.statements import make
from privacy.transparency import Entry, Frontier, Head, sign_checkpoint, sign_witness
from privacy.verify import verify_bundle

SEED, LEAST = 20261122, 1000
Files = dict[str, bytes]


@dataclass
class World:
    """Three valid bundles: `a`; `b` of the same consortium, another run; `c` of another consortium, the same run."""

    parties: Consortium
    strangers: Consortium
    a: Files
    b: Files
    c: Files
    folder: Path
    there: Files

    def passes(self, files: Files) -> bool:
        """Bring the folder to exactly these files, and verify it as anyone would."""
        for name in self.there.keys() - files.keys():
            (self.folder / name).unlink()
        for name in [n for n, data in files.items() if self.there.get(n) != data]:
            (self.folder / name).write_bytes(files[name])
        self.there = files
        return verify_bundle(self.folder, self.parties.fingerprint).verdict != "FAIL"

    def sealed(self, files: Files) -> Files:
        """The coordinator signs for these files, in whatever order and number they are."""
        rest = {name: data for name, data in files.items() if name != "manifest.json"}
        digest = hashlib.sha256(rest.get("contract.json", b"")).hexdigest()
        listed = {name: hashlib.sha256(data).hexdigest() for name, data in sorted(rest.items())}
        return rest | {"manifest.json": make(self.parties.signers[HUB], MANIFEST.predicate_type, [
            ("contract.json", digest)], {"run": RUN, "contract": digest, "files": listed})}

    def logged(self, files: Files) -> Files:
        """Coordinator and all sites sign another log: of the statements that are here now."""
        digests = [hashlib.sha256(data).hexdigest() for name, data in sorted(files.items()) if statement_name(name)]
        return self.sealed(files | self.log([Entry(RUN, digest) for digest in digests]))

    def log(self, entries: list[Entry]) -> Files:
        tree, signers = Frontier(), self.parties.signers
        for entry in entries:
            tree.append(entry.leaf)
        head = Head(log=HUB, size=tree.size, root=tree.root.hex())
        old = {name: b"" for name in self.a if name.startswith("log/0")}
        return {name: data for name, data in (old | {
            "log/before.json": canonical({"size": 0, "peaks": []}),
            "log/entries.txt": b"".join(e.line().encode() + b"\n" for e in entries),
            f"log/{tree.size:08d}.json": canonical({
                "checkpoint": sign_checkpoint(signers[HUB], head).decode(),
                "witnesses": {name: sign_witness(signers[name], name, head).decode() for name in SITES}})}).items() if data}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("corpus")
    parties, strangers = Consortium(folder / "one"), Consortium(folder / "two")
    other = contract(parties.signers).model_copy(update={"run": "ee" * 16})
    bundles = [write_bundle(folder / name, who, agreed) for name, who, agreed in (
        ("a", parties, None), ("b", parties, other), ("c", strangers, None))]
    with pytest.MonkeyPatch.context() as patch:
        once(patch)
        a, b, c = (dict(read_bundle(bundle).files) for bundle in bundles)
        yield World(parties, strangers, a, b, c, bundles[0], a)


def once(patch: pytest.MonkeyPatch) -> None:
    """Compute pure functions once for equal input; failures are computed each time."""
    unseal, extract = privacy.statements.unseal, privacy.verify_run.check_extract
    epsilon, digest = privacy.verify_run.epsilon, Contract.digest.fget  # type: ignore[attr-defined]
    known: dict[Any, Any] = {}

    def remember(key: Any, compute: Callable[[], Any]) -> Any:
        if key not in known:
            known[key] = compute()
        return known[key]

    patch.setattr(privacy.statements, "unseal", lambda data, kind, by: remember(
        (data, kind, tuple(by)), lambda: unseal(data, kind, by)))
    patch.setattr(privacy.verify_run, "check_extract", lambda data, by: remember(
        (data, fingerprint(by)), lambda: extract(data, by)))
    patch.setattr(privacy.verify_run, "epsilon", lambda releases, delta: remember(
        (tuple(releases := list(releases)), delta), lambda: epsilon(releases, delta)))
    patch.setattr(Contract, "digest", property(lambda self: remember(self.model_dump_json(), lambda: digest(self))))


# Changes of one file's bytes -----------------------------------------------------------------------------------------

def flipped(rng: random.Random, data: bytes) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1:]


def cut(rng: random.Random, data: bytes) -> bytes:
    return data[:rng.choice([0, len(data) // 2, len(data) - 1, rng.randrange(len(data))])]


def extended(rng: random.Random, data: bytes) -> bytes:
    return rng.choice([data + b"\n", data + b" ", data + b"\0", b"\xef\xbb\xbf" + data, data + data, b"\n" + data,
                       data + rng.randbytes(9)])


def doubled_key(rng: random.Random, data: bytes) -> bytes:
    """The first key of the document once more, with another value; what a lax parser takes as the last or first one."""
    key = data[1:data.index(b'"', 2) + 1]
    return rng.choice([b"{" + key + b":0," + data[1:], data.rstrip(b"\n")[:-1] + b"," + key + b":0}"])


def spaced(rng: random.Random, data: bytes) -> bytes:
    return rng.choice([data.replace(b'":', b'": ', 1), data.replace(b",", b", ", 1), data.replace(b"{", b"{\n", 1),
                       data[:-1] + b" }", data.replace(b'"', b"'", 2), data.replace(b'"p', b'"\\u0070', 1)])


def is_json(name: str) -> bool:
    return name.endswith(".json")


def signed(name: str) -> bool:
    """PEM has more than one form of one certificate; whoever may sign the manifest may choose one of them."""
    return name != "manifest.json" and not name.startswith("certificates/")


# The corpus ----------------------------------------------------------------------------------------------------------

Corpus = Callable[[World, random.Random], Iterator[Files]]
CORPUS: dict[str, Corpus] = {}


def kind(make_it: Corpus) -> Corpus:
    CORPUS[make_it.__name__] = make_it
    return make_it


def edited(w: World, rng: random.Random, names: list[str], edit: Callable[[random.Random, bytes], bytes], n: int) -> (
        Iterator[Files]):
    """n changes over all the files in turn, never none."""
    for name in itertools.islice(itertools.cycle(rng.sample(names, len(names))), n):
        if (new := edit(rng, w.a[name])) != w.a[name]:
            yield w.a | {name: new}


@kind
def bits_by_a_stranger(w: World, rng: random.Random) -> Iterator[Files]:
    return edited(w, rng, list(w.a), flipped, 220)


@kind
def bits_sealed_by_the_coordinator(w: World, rng: random.Random) -> Iterator[Files]:
    return map(w.sealed, edited(w, rng, list(filter(signed, w.a)), flipped, 200))


@kind
def cut_and_extended_by_a_stranger(w: World, rng: random.Random) -> Iterator[Files]:
    yield from edited(w, rng, list(w.a), cut, len(w.a))
    yield from edited(w, rng, list(w.a), extended, len(w.a))


@kind
def cut_and_extended_sealed(w: World, rng: random.Random) -> Iterator[Files]:
    yield from map(w.sealed, edited(w, rng, list(filter(signed, w.a)), cut, len(w.a)))
    yield from map(w.sealed, edited(w, rng, list(filter(signed, w.a)), extended, len(w.a)))


@kind
def keys_doubled(w: World, rng: random.Random) -> Iterator[Files]:
    names = list(filter(is_json, w.a))
    yield from edited(w, rng, names, doubled_key, len(names))
    yield from map(w.sealed, edited(w, rng, list(filter(signed, names)), doubled_key, len(names)))


@kind
def white_space_and_spelling(w: World, rng: random.Random) -> Iterator[Files]:
    names = list(filter(is_json, w.a))
    yield from edited(w, rng, names, spaced, len(names))
    yield from map(w.sealed, edited(w, rng, list(filter(signed, names)), spaced, len(names)))


@kind
def files_missing(w: World, rng: random.Random) -> Iterator[Files]:
    heads = sorted(n for n in w.a if n.startswith("log/0"))
    for name in w.a:
        rest = {n: data for n, data in w.a.items() if n != name}
        yield rest
        if name not in ("manifest.json", *heads[:-1]):  # a head fewer, but for the last, says nothing that isn't true
            yield w.sealed(rest)


@kind
def files_renamed(w: World, rng: random.Random) -> Iterator[Files]:
    """To another's name, so that the two change places, and to a name that was free."""
    for name in w.a:
        other = rng.choice([n for n in w.a if w.a[n] != w.a[name]])
        swapped = w.a | {name: w.a[other], other: w.a[name]}
        yield swapped
        if signed(name) and signed(other):
            yield w.sealed(swapped)
        free = rng.choice(["ledgers/clinic-x.jsonl", "certificates/clinic-x.pem", "statements/000099-round-hub.json",
                           "log/00000099.json"])
        assert LAYOUT.names.fullmatch(free)
        yield {n: data for n, data in w.a.items() if n != name} | {free: w.a[name]}
        yield w.sealed(w.a | {free: w.a[name]})


@kind
def parts_of_another_run(w: World, rng: random.Random) -> Iterator[Files]:
    """Both bundles are valid, of one consortium: single files, then kinds of files, then all but one kind."""
    theirs = [name for name in w.b if w.b[name] != w.a.get(name)]
    for name in theirs:
        yield w.a | {name: w.b[name]}
        if name != "manifest.json":
            yield w.sealed(w.a | {name: w.b[name]})
        if statement_name(name):
            yield w.logged(w.a | {name: w.b[name]})
    for folder in ("log", "statements", "ledgers", "contract", "certificates", "manifest"):
        part = {n: data for n, data in w.b.items() if n.startswith(folder)}
        rest = {n: data for n, data in w.a.items() if not n.startswith(folder)}
        if folder != "certificates":  # those are the same
            yield rest | part
            yield {n: data for n, data in w.b.items() if n not in part} | {n: w.a[n] for n in w.a if n.startswith(folder)}
            if folder != "manifest":
                yield w.sealed(rest | part)


@kind
def parts_of_another_consortium(w: World, rng: random.Random) -> Iterator[Files]:
    """The same run, names and figures, everything signed under another CA."""
    for name in [n for n in w.c if w.c[n] != w.a.get(n)]:
        yield w.a | {name: w.c[name]}
        if name != "manifest.json":
            yield w.sealed(w.a | {name: w.c[name]})
    for folder in ("log", "statements", "ledgers", "certificates"):
        part = {n: data for n, data in w.c.items() if n.startswith(folder)}
        yield {n: data for n, data in w.a.items() if n not in part} | part
        yield w.sealed({n: data for n, data in w.a.items() if n not in part} | part)
    yield w.c
    yield w.c | {"certificates/root.pem": w.a["certificates/root.pem"]}


@kind
def signed_by_others(w: World, rng: random.Random) -> Iterator[Files]:
    """Each statement as it is, signed by its namesake under another CA, and by someone else of this consortium."""
    for name in w.a:
        parts = statement_name(name)
        if parts is None:
            continue
        body = parse(b64decode(parse(w.a[name])["payload"]))
        subject = [(s["name"], s["digest"]["sha256"]) for s in body["subject"]]
        someone = rng.choice([n for n in (*SITES, HUB, "lab") if n != parts[2]])
        for signer in (w.strangers.signers[parts[2]], w.parties.signers[someone]):
            lie = w.a | {name: make(signer, body["predicateType"], subject, body["predicate"])}
            yield rng.choice([w.sealed, w.logged])(lie)


def numbered(files: Files, order: list[str]) -> Files:
    """These statements, numbered in this order."""
    return {n: data for n, data in files.items() if not statement_name(n)} | {
        f"statements/{i:06d}{name[17:]}": files[name] for i, name in enumerate(order, 1)}


@kind
def statements_dropped_doubled_reordered(w: World, rng: random.Random) -> Iterator[Files]:
    order = sorted(filter(statement_name, w.a))
    for i in range(len(order)):
        yield w.sealed(numbered(w.a, order[:i] + order[i + 1:]))
        yield w.sealed(numbered(w.a, [*order[:i + 1], *order[i:]]))
        j = rng.choice([k for k in range(len(order)) if k != i])
        swapped = list(order)
        swapped[i], swapped[j] = order[j], order[i]
        yield w.sealed(numbered(w.a, swapped))


@kind
def statements_that_all_deny(w: World, rng: random.Random) -> Iterator[Files]:
    """Coordinator and all sites agree on a log without a statement that the rest of the bundle needs."""
    order = sorted(filter(statement_name, w.a))
    needed = ("contract", "acceptance", "round", "closing", "release")
    for name in order:
        if (statement_name(name) or (0, "", ""))[1] in needed:
            yield w.logged(numbered(w.a, [n for n in order if n != name]))
            yield w.logged(numbered(w.a, [*order, name]))


@kind
def entries_dropped_doubled_reordered(w: World, rng: random.Random) -> Iterator[Files]:
    rows = w.a["log/entries.txt"].splitlines(keepends=True)
    for i, row in enumerate(rows):
        j = rng.choice([k for k in range(len(rows)) if k != i])
        swapped = list(rows)
        swapped[i], swapped[j] = rows[j], row
        for lie in (rows[:i] + rows[i + 1:], [*rows[:i], row, *rows[i:]], swapped,
                    [*rows[:i], row.replace(RUN.encode(), b"ee" * 16), *rows[i + 1:]]):
            yield w.sealed(w.a | {"log/entries.txt": b"".join(lie)})


@kind
def heads_older_and_of_others(w: World, rng: random.Random) -> Iterator[Files]:
    """Each signed head in the place of each other, of this run and of others; and cosigned by other sites' hands."""
    heads = sorted(n for n in w.a if n.startswith("log/0"))
    for here, there in itertools.permutations(heads, 2):
        yield w.sealed(w.a | {here: w.a[there]})
        mixed = parse(w.a[here]) | {"witnesses": parse(w.a[there])["witnesses"]}
        yield w.sealed(w.a | {here: canonical(mixed)})
    for here, files in itertools.product(heads, (w.b, w.c)):
        for there in (n for n in files if n.startswith("log/0")):
            yield w.sealed(w.a | {here: files[there]})
    for here in heads:
        said = parse(w.a[here])
        for one, other in itertools.permutations(SITES, 2):
            yield w.sealed(w.a | {here: canonical(said | {"witnesses": said["witnesses"] | {
                one: said["witnesses"][other]}})})


@pytest.mark.parametrize("name", CORPUS)
def test_no_lie_passes(name: str, world: World) -> None:
    assert world.passes(world.a)
    passed = [i for i, lie in enumerate(CORPUS[name](world, random.Random(f"{SEED} {name}"))) if world.passes(lie)]
    assert passed == [], f"lies of this kind that pass, by number: {passed}"
    assert world.passes(world.a)


def test_there_are_enough_lies_and_no_two_alike(world: World) -> None:
    lies = {name: [tuple(sorted((n, hashlib.sha256(data).digest()) for n, data in lie.items()))
                   for lie in make_all(world, random.Random(f"{SEED} {name}"))] for name, make_all in CORPUS.items()}
    truth = tuple(sorted((n, hashlib.sha256(data).digest()) for n, data in world.a.items()))
    every = [lie for kind_of in lies.values() for lie in kind_of]
    assert truth not in every
    assert all(lies.values())
    assert len(set(every)) >= LEAST


# Lies that are planted by name ---------------------------------------------------------------------------------------

def planted(world: World, tmp_path: Path, edit: Callable[[str, dict[str, Any]], dict[str, Any] | None], step: str,
            words: str) -> None:
    """Told before anything is signed: every signature, the log and its witnesses are good."""
    verdict = verify_bundle(write_bundle(tmp_path / "b", world.parties, edit=edit), world.parties.fingerprint)
    assert verdict.verdict == "FAIL"
    details = {s.name: s.detail for s in verdict.steps if not s.ok}
    assert words in details[step], details


def test_planted_epsilon_understated(world: World, tmp_path: Path) -> None:
    planted(world, tmp_path, lambda kind, p: {**p, "epsilon": "0.5"} if kind == "closing" else p, "epsilon", "understates")


def test_planted_sigma_differs_from_the_contract(world: World, tmp_path: Path) -> None:
    planted(world, tmp_path, lambda kind, p: {**p, "sigma": "2.9"} if kind == "round-site" else p, "rounds",
            "another mechanism than the contract's")


def test_planted_event_missing_between_two_rounds(world: World, tmp_path: Path) -> None:
    planted(world, tmp_path, lambda kind, p: None if kind == "round" and p["round"] == 2 and p["attempt"] == 0 else p,
            "rounds", "round 2, attempt 0 should come next, but is missing")


def test_planted_two_histories(world: World) -> None:
    """Two heads, each signed by the coordinator and all sites, of logs that are no beginning of each other."""
    digests = [hashlib.sha256(data).hexdigest() for name, data in sorted(world.a.items()) if statement_name(name)]
    entries = [Entry(RUN, digest) for digest in digests]
    kept = {n: data for n, data in world.a.items() if not n.startswith("log/")}
    assert world.passes(world.sealed(kept | world.log(entries)))
    other = world.log([Entry(RUN, sha("another history")), *entries[1:-1]])
    head = f"log/{len(entries) - 1:08d}.json"
    lie = world.sealed(kept | world.log(entries) | {head: other[head]})
    assert not world.passes(lie)
    details = {s.name: s.detail for s in verify_bundle(world.folder, world.parties.fingerprint).steps if not s.ok}
    assert set(details) == {"consistency"}
    assert "another history" in details["consistency"]
