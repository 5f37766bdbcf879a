"""Verification of sums: who is in them, what their sites signed and voted for, and who dropped out."""

from __future__ import annotations

import dataclasses
import json
from base64 import b64decode
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evidence_fixture import DROPS, SITES, Consortium, Sum, contract, relog, sha, sum_of, vote, write_bundle
from test_verify import CANARY, assert_fails, change, failed

from fl_client.statements import SiteStatements
from privacy.contract import Contract
from privacy.identity import FileSigner, Peer, Role, fingerprint, load_certificate
from privacy.predicates import KINDS
from privacy.secagg import transcript as tr
from privacy.secagg.coordinator import CoordinatorSession
from privacy.secagg.site import SiteSession
from privacy.verify import verify_bundle

NOT_THEIRS = "the transcript is not that of the vectors that its sites signed"


def drop(site: str, stage: str) -> dict[str, Any]:
    return {"site": site, "pass_no": 1, "stage": stage, "code": "site.unreachable"}


@pytest.fixture(scope="module")
def parties(tmp_path_factory: pytest.TempPathFactory) -> Consortium:
    return Consortium(tmp_path_factory.mktemp("consortium"))


# What holds ----------------------------------------------------------------------------------------------------------

def test_sums_over_fewer_than_all_sites_hold_and_are_counted(parties: Consortium, tmp_path: Path) -> None:
    verdict = verify_bundle(write_bundle(tmp_path / "b", parties), parties.fingerprint)
    assert verdict.verdict == "PASS" and any(
        "sums over fewer than all sites: 2" in s.detail for s in verdict.steps if s.name == "rounds")


def test_no_dropouts(parties: Consortium, tmp_path: Path) -> None:
    verdict = verify_bundle(write_bundle(tmp_path / "b", parties, drops={}), parties.fingerprint)
    assert verdict.verdict == "PASS" and "fewer" not in next(s.detail for s in verdict.steps if s.name == "rounds")


def test_void_attempt_that_ended_before_there_was_a_view(parties: Consortium, tmp_path: Path) -> None:
    alone = dict.fromkeys(SITES[1:], ("update", "site.failed"))
    void = write_bundle(tmp_path / "b", parties, drops={**DROPS, (2, 0): alone},
                        edit=lambda kind, p: None if kind == "round-site" and (p["round"], p["attempt"]) == (2, 0) else (
                            {**p, "view": ""} if p.get("outcome") == "void" else p))
    assert verify_bundle(void, parties.fingerprint).verdict == "PASS"


def test_what_real_sessions_leave_holds(parties: Consortium, tmp_path: Path) -> None:
    """T2, H(y), T3 and the votes of the protocol itself, with sites that drop out at each stage."""
    bundle = write_bundle(tmp_path / "b", parties, summed=session_sum)
    assert verify_bundle(bundle, parties.fingerprint).verdict == "PASS"
    mixed = write_bundle(tmp_path / "c", parties, summed=lambda *at: dataclasses.replace(
        session_sum(*at), masked=session_sum(*at).masked))  # vectors of another session
    assert_fails(verify_bundle(mixed, parties.fingerprint), "rounds", NOT_THEIRS)


def session_sum(agreed: Contract, signers: Mapping[str, FileSigner], round_no: int, attempt: int,
                drops: Mapping[str, tuple[str, str]]) -> Sum:
    """`sum_of`, by the sessions of all four sites and the coordinator over vectors of 3 values."""
    peers = {s.fingerprint: Peer(n, f"Organisation of {n}", Role.SITE, s.fingerprint, s.certificate)
             for n, s in signers.items()}
    offer = tr.offer(agreed, round_no=round_no, attempt=attempt, ranges=[(3, 1.0)], adapter=sha("adapter"))

    def check(pem: bytes) -> Peer:
        return peers[fingerprint(load_certificate(pem))]

    def until(stage: str) -> list[int]:
        """Sites that answer at that stage."""
        order = ("update", "shares", "masked", "vote", "unmask")
        return [u for u, n in enumerate(SITES) if n not in drops or order.index(drops[n][0]) > order.index(stage)]

    class NoJournal:
        def __getattr__(self, _: str) -> Callable[..., None]:
            return lambda *_: None

    hub = CoordinatorSession(offer, check)
    sites = [SiteSession(offer, index=u, n_c=1, signer=signers[n], check_certificate=check, journal=NoJournal())
             for u, n in enumerate(SITES)]
    for u in until("update"):
        hub.take_m1(u, sites[u].m1())
    m2 = hub.m2()
    for u in until("shares"):
        hub.take_m3(u, sites[u].m3(m2))
    for u, m4 in hub.m4().items():
        m5, y = sites[u].m5(m4, np.zeros(3, np.uint32))
        if u in until("masked"):
            hub.take_m5(u, m5, y)
    m6 = hub.m6()
    for u in hub.survivors:
        m7 = sites[u].m7(m6)
        if u in until("vote"):
            hub.take_m7(u, m7)
    return Sum(hub.view.hex(), {SITES[u]: s.masked for u, s in enumerate(sites) if s.masked},
               [SITES[u] for u in hub.survivors], hub.transcript.hex(), {SITES[u]: s for u, s in hub.votes.items()})


@pytest.mark.parametrize("secagg", [True, False])
def test_what_a_site_signs_holds(secagg: bool, parties: Consortium, tmp_path: Path) -> None:
    """Statements of the site's own software, without a ledger, in the place of those made here."""
    agreed = contract(parties.signers, secagg=secagg, trust="none", epsilon=None)
    bundle = write_bundle(tmp_path / "b", parties, agreed)
    said = SiteStatements(agreed, "clinic-a", parties.signers["clinic-a"], None,
                          lambda kind, envelope: None)
    for path in sorted((bundle / "statements").glob("*-round-site-clinic-a.json")):
        p = json.loads(b64decode(json.loads(path.read_bytes())["payload"]))["predicate"]
        offer = tr.offer(agreed, round_no=p["round"], attempt=p["attempt"], ranges=[(3, 1.0)], adapter=p["adapter_in"])
        path.write_text(said.round(offer, bytes.fromhex(p["view"]), p["masked"]))
    assert verify_bundle(relog(bundle, parties), parties.fingerprint).verdict == "PASS"
    path.write_text(said.round(offer, bytes(32), p["masked"]))
    assert failed(verify_bundle(relog(bundle, parties), parties.fingerprint)) == {"rounds"}


# Lies told before signing --------------------------------------------------------------------------------------------

LIES: dict[str, tuple[Callable[..., Any], str, str]] = {
    "contributor left out of the sum": (change("round", {"round": 3}, sites=["clinic-a", "clinic-b", "clinic-d"]),
                                        "rounds", "clinic-c is neither in the sum"),
    "site counted twice": (change("round", {"round": 1}, sites=["clinic-a", "clinic-b", "clinic-b", "clinic-d"]),
                           "rounds", "twice"),
    "sum out of order": (change("round", {"round": 3}, sites=list(SITES[::-1])), "rounds", "out of order"),
    "done without a transcript": (change("round", {"round": 1}, transcript=""), "rounds", NOT_THEIRS),
    "done without a view": (change("round", {"round": 1}, view=""), "rounds", NOT_THEIRS),
    "another transcript": (change("round", {"round": 1}, transcript=sha("T3")), "rounds", NOT_THEIRS),
    "void with a transcript": (change("round", {"outcome": "void"}, transcript=sha("T3")), "rounds", "is void, yet"),
    "void with a vote": (change("round", {"outcome": "void"}, votes=[vote("clinic-a", b"s" * 64)]), "rounds",
                         "is void, yet"),
    "unknown site in the sum": (change("round", {"round": 1}, sites=["clinic-a", "clinic-b", "clinic-x"]), "rounds",
                                "unknown"),
    "another view shown to one site": (change("round-site", {"round": 3, "site": "clinic-c"}, view=sha("x")), "rounds",
                                       "clinic-c signed another view"),
    "another view shown to a site that is not in the sum": (
        change("round-site", {"round": 1, "site": "clinic-c"}, view=sha("x")), "rounds", "clinic-c signed another view"),
    "another view shown to one site of a void attempt": (
        lambda kind, p: {**p, "view": sha("x") if p.get("site") == "clinic-d" else ""}
        if (p.get("round"), p.get("attempt")) == (2, 0) and (kind == "round" or p["site"] == "clinic-d") else p,
        "rounds", "clinic-d signed another view"),
    "a statement of no view": (change("round-site", {"round": 2, "attempt": 0}, view=""), "rounds",
                               "clinic-a signed another view than the others, or none"),
    "dropout unmentioned": (change("round", {"round": 1}, dropped=[]), "rounds", "clinic-c is neither in the sum"),
    "dropout of an unknown site": (change("round", {"round": 2}, dropped=[drop("clinic-x", "shares")]), "rounds",
                                   "dropped out is unknown"),
    "dropout named twice": (change("round", {"round": 2}, dropped=[drop("clinic-d", "shares")] * 2), "rounds",
                            "twice at one stage"),
    "dropout in the sum": (change("round", {"round": 3}, dropped=[drop("clinic-a", "vote"), drop("clinic-b", "masked")]),
                           "rounds", "in the sum dropped out before it"),
    "dropout after a sum that it is not in": (
        change("round", {"round": 1}, dropped=[drop("clinic-c", "masked"), drop("clinic-c", "unmask")]), "rounds",
        "one that isn't dropped out after it"),
    "silent at the vote, unmentioned": (change("round", {"round": 3}, dropped=[]), "rounds", "without a vote"),
    "voted, yet named as silent": (change("round", {"round": 1}, dropped=[drop("clinic-a", "vote"),
                                                                         drop("clinic-c", "masked")]),
                                   "rounds", "without a vote"),
    "dropout at no stage": (change("round", {"round": 1}, dropped=[drop("clinic-c", "lunch")]), "statements",
                            "config.invalid"),
    "dropout with a remark": (change("round", {"round": 1}, dropped=[{**drop("clinic-c", "masked"), CANARY: ""}]),
                              "statements", "config.unknown_key"),
    "vote of 61 bytes": (change("round", {"round": 1}, votes=[vote("clinic-a", b"s" * 61)]), "statements",
                         "config.invalid"),
    "vote in two encodings": (change("round", {"round": 1}, votes=[{**vote("clinic-a", b"s" * 64),
                                                                    "signature": "c3Nz" * 21 + "cx=="}]),
                              "statements", "config.invalid"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lie(lie: str, parties: Consortium, tmp_path: Path) -> None:
    edit, step, words = LIES[lie]
    assert_fails(verify_bundle(write_bundle(tmp_path / "b", parties, edit=edit), parties.fingerprint), step, words)


def cast(site: str, where: Callable[[dict[str, Any]], tuple[str, int]], signer: str = "") -> Callable[..., Any]:
    """An edit that puts, in round 1, a vote of `site` in the place of its own: a signature on (T3, index) by `signer`."""
    def lie(parties: Consortium, p: dict[str, Any]) -> list[dict[str, str]]:
        t3, index = where(p)
        signature = parties.signers[signer or site].sign(tr.signed_m7(bytes.fromhex(t3), index))
        return [*(v for v in p["votes"] if v["site"] != site), vote(site, signature)]

    return lie


VOTES: dict[str, tuple[Callable[[Consortium, dict[str, Any]], list[dict[str, str]]], str]] = {
    "of a site that is not in the sum": (cast("clinic-c", lambda p: (p["transcript"], 2)), "isn't in the sum"),
    "repeated": (lambda _, p: [*p["votes"], p["votes"][0]], "a vote is repeated"),
    "on another transcript": (cast("clinic-a", lambda p: (sha("T3"), 0)), "not a site's signature"),
    "on the view": (cast("clinic-a", lambda p: (p["view"], 0)), "not a site's signature"),
    "under another index": (cast("clinic-a", lambda p: (p["transcript"], 1)), "not a site's signature"),
    "signed by another site": (cast("clinic-a", lambda p: (p["transcript"], 0), "clinic-b"), "not a site's signature"),
    "of a stranger": (lambda _, p: [*p["votes"], vote("clinic-x", b"s" * 64)], "not a site's signature"),
    "of the coordinator": (cast("hub", lambda p: (p["transcript"], 0)), "not a site's signature"),
    "too few": (lambda _, p: p["votes"][:2], "fewer sites voted"),
    "too few valid ones": (cast("clinic-b", lambda p: (sha("T3"), 1)), "fewer sites voted"),
    "too few, one of them twice": (lambda _, p: [p["votes"][0], *p["votes"][:2]], "fewer sites voted"),
    "none": (lambda *_: [], "fewer sites voted"),
}


@pytest.mark.parametrize("lie", VOTES)
def test_vote(lie: str, parties: Consortium, tmp_path: Path) -> None:
    votes, words = VOTES[lie]
    bundle = write_bundle(tmp_path / "b", parties, edit=lambda kind, p: {**p, "votes": votes(parties, p)}
                          if (kind, p.get("round")) == ("round", 1) else p)
    assert_fails(verify_bundle(bundle, parties.fingerprint), "rounds", words)


@pytest.mark.parametrize("outcome", ["done", "void"])
def test_attempt_without_a_view(outcome: str, parties: Consortium, tmp_path: Path) -> None:
    """Of a done one, votes and T3 fit the empty view; of a void one, all agree on it."""
    def summed(*at: Any) -> Sum:
        got = sum_of(*at)
        t3 = tr.t3(b"", [(SITES.index(n), bytes.fromhex(got.masked[n])) for n in got.sites])
        votes = {n: parties.signers[n].sign(tr.signed_m7(t3, SITES.index(n))) for n in got.votes}
        return dataclasses.replace(got, transcript=t3.hex(), votes=votes)

    kinds = ("round",) if outcome == "done" else ("round", "round-site")
    bundle = write_bundle(tmp_path / "b", parties, summed=summed if outcome == "done" else sum_of, edit=lambda kind, p: {
        **p, "view": ""} if kind in kinds and (outcome == "done" or (p["round"], p["attempt"]) == (2, 0)) else p)
    assert_fails(verify_bundle(bundle, parties.fingerprint), "rounds", NOT_THEIRS if outcome == "done" else "or none")


def test_votes_of_another_round(parties: Consortium, tmp_path: Path) -> None:
    seen: list[Any] = []

    def edit(kind: str, p: dict[str, Any]) -> dict[str, Any]:
        if kind == "round" and p["outcome"] == "done":
            seen.append(p["votes"])
            return {**p, "votes": seen[0]}
        return p

    bundle = write_bundle(tmp_path / "b", parties, drops={}, edit=edit)
    assert_fails(verify_bundle(bundle, parties.fingerprint), "rounds", "round 3, attempt 0, pass 1: a vote is not")


def test_vectors_of_two_sites_swapped(parties: Consortium, tmp_path: Path) -> None:
    swap = {"clinic-a": "clinic-b", "clinic-b": "clinic-a"}

    def edit(kind: str, p: dict[str, Any]) -> dict[str, Any]:
        if kind == "round-site" and p["round"] == 3 and p["site"] in swap:
            return {**p, "masked": sum_of(contract(parties.signers), parties.signers, 3, 0, {}).masked[swap[p["site"]]]}
        return p

    bundle = write_bundle(tmp_path / "b", parties, edit=edit)
    verdict = verify_bundle(bundle, parties.fingerprint)
    assert_fails(verdict, "rounds", NOT_THEIRS)
    assert failed(verdict) == {"rounds"}


@pytest.mark.parametrize("secagg", [True, False])
def test_sum_of_fewer_sites_than_agreed(secagg: bool, parties: Consortium, tmp_path: Path) -> None:
    few = {(3, 0): {"clinic-b": ("masked", "site.unreachable")}}
    for survivors, words in ((3, ""), (4, "round 3, attempt 0 sums fewer sites")):
        agreed = contract(parties.signers, survivors=survivors, secagg=secagg)
        verdict = verify_bundle(write_bundle(tmp_path / f"{survivors}", parties, agreed, drops=few), parties.fingerprint)
        assert failed(verdict) == ({"rounds"} if words else set())
        assert words in next(s.detail for s in verdict.steps if s.name == "rounds")


@pytest.mark.parametrize(("terms", "code"), [({"threshold": 2}, "threshold"), ({"survivors": 2}, "survivors"),
                                             ({"threshold": 4, "survivors": 3}, "survivors")])
def test_contract_whose_sums_hide_nobody(terms: dict[str, int], code: str, parties: Consortium, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "b", parties, contract(parties.signers, **terms), drops={})
    assert_fails(verify_bundle(bundle, parties.fingerprint), "contract", f"secagg.{code}")
    seen = write_bundle(tmp_path / "c", parties, contract(parties.signers, secagg=False, **terms), drops={})
    assert "contract" not in failed(verify_bundle(seen, parties.fingerprint))  # there is no sum to hide in


@pytest.mark.parametrize("secret", [("round", {"transcript": sha("T3")}), ("round", {"view": sha("T2")}),
                                    ("round", {"votes": [vote("clinic-a", b"s" * 64)]}),
                                    ("round-site", {"view": sha("T2")})])
def test_secure_sum_claimed_without_secure_aggregation(secret: tuple[str, Any], parties: Consortium,
                                                       tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "b", parties, contract(parties.signers, secagg=False),
                          edit=change(secret[0], {"round": 1}, **secret[1]))
    assert_fails(verify_bundle(bundle, parties.fingerprint), "rounds", "was off")


@pytest.mark.parametrize("kind", ["round", "round-site"])
def test_statement_of_the_first_version(kind: str, parties: Consortium, tmp_path: Path,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as old:
        old.setitem(KINDS, kind, dataclasses.replace(KINDS[kind], predicate_type=f"urn:consilo:{kind}:1"))
        bundle = write_bundle(tmp_path / "b", parties)
    assert_fails(verify_bundle(bundle, parties.fingerprint), "statements", "verify.type")
