"""Verification, rules 6 to 9: whether what was said holds together. Works on `Facts`, never on raw files."""

from __future__ import annotations

from base64 import b64decode

from privacy.accountant import Release as Spent
from privacy.accountant import epsilon
from privacy.canonical import parse
from privacy.contract import Contract
from privacy.errors import ConsiloError
from privacy.identity import verify_signature
from privacy.ledger import LedgerSummary, check_extract
from privacy.ledger_records import charge, schedule
from privacy.predicates import BEFORE_SUM, Acceptance, Closing, Evaluation, Release, Round, RoundSite
from privacy.secagg import transcript as tr
from privacy.verify_contract import NON_PRIVATE, VISIBLE
from privacy.verify_trust import Facts, Findings, Spending

MAX_PREFIXES = 64  # reserves of a site whose claim is recomputed; between them claims can only grow
Signed = dict[tuple[str, int], RoundSite]  # of one attempt, by site and pass
ULP = 1e-4  # claims are rounded up at 4 decimals; two machines' FFTs may fall on either side of one


def rounds(facts: Facts, found: Findings) -> str:
    agreed = facts.agreed()
    attempts = facts.said(Round)
    signed: dict[tuple[int, int], Signed] = {}
    for s in facts.said(RoundSite):
        at = signed.setdefault((s.round, s.attempt), {})
        found.expect((s.site, s.pass_no) not in at,
                     f"round {s.round}, attempt {s.attempt}: {s.site} signed twice for pass {s.pass_no}")
        at[s.site, s.pass_no] = s
        _mechanism(agreed, s, found)
    _order(attempts, found)
    adapter = attempts[0].adapter_in if attempts else ""
    for r in attempts:
        where = f"round {r.round}, attempt {r.attempt}"
        found.expect(r.adapter_in == adapter, f"{where} starts from another adapter than the one before left")
        sites = signed.pop((r.round, r.attempt), {})
        for s in sites.values():
            found.expect(s.adapter_in == r.adapter_in, f"{where}: {s.site} trained from another adapter")
        _attempt(agreed, r, sites, where, found)
        if r.outcome == "done":
            _sum(agreed, r, sites, where, found)
            for pass_no in range(1, len(r.sums) + 1 if agreed.secagg.enabled else 1):
                _votes(facts, agreed, r, pass_no, sites, f"{where}, pass {pass_no}", found)
            adapter = r.adapter_out
        else:
            found.expect(not (r.adapter_out or r.sites or r.sums) and bool(r.reason),
                         f"{where} is void, yet names a result, or no reason")
    found.expect(not signed, "sites signed an attempt that the coordinator doesn't account for")
    sums = [len(r.sites) for r in attempts if r.outcome == "done"]
    done, fewer = len(sums), sum(n < len(agreed.sites) for n in sums)
    found.expect(done <= agreed.privacy.rounds, "there are more rounds than the contract allows")
    early = "" if done == agreed.privacy.rounds else f" of {agreed.privacy.rounds} planned (the job ended early)"
    notes = [f"; sums over fewer than all sites: {fewer}"] * (fewer > 0) + [f"; {VISIBLE}"] * (not agreed.secagg.enabled)
    return (f"{done} rounds{early}, {len(attempts) - done} void attempts; each starts where the one before ended"
            + "".join(notes))


def _order(attempts: list[Round], found: Findings) -> None:
    """Rounds 1, 2, ..., their attempts 0, 1, ...: a round ends with its one 'done', and then the next begins."""
    expected = (1, 0)
    for r in attempts:
        if not found.expect((r.round, r.attempt) == expected,
                            f"round {expected[0]}, attempt {expected[1]} should come next, but is missing or repeated"):
            return
        expected = (r.round + 1, 0) if r.outcome == "done" else (r.round, r.attempt + 1)


def _attempt(agreed: Contract, r: Round, sites: Signed, where: str, found: Findings) -> None:
    """Done or void: in each pass all who signed saw the same cohort and keys, and who dropped out is named in a way that
    can be."""
    if agreed.secagg.enabled:
        views = {i: x.view for i, x in enumerate(r.sums, 1)}
        for (_, pass_no), s in sites.items():
            views.setdefault(pass_no, s.view)
        for (name, pass_no), s in sites.items():
            found.expect(bool(s.view) and s.view == views[pass_no],
                         f"{where}: {name} signed another view than the others, or none")
        found.expect(len(set(views.values())) == len(views), f"{where}: two passes have one view")
    else:
        found.expect(not any(x.view or x.transcript or x.votes for x in r.sums) and not any(s.view for s in sites.values()),
                     f"{where} names a view, a transcript or a vote, but secure aggregation was off")
    dropped = {(d.site, d.pass_no, d.stage) for d in r.dropped}
    found.expect(len(dropped) == len(r.dropped) and {d.site for d in r.dropped} <= {s.name for s in agreed.sites},
                 f"{where}: a site that dropped out is unknown, or named twice at one stage")


def _sum(agreed: Contract, r: Round, sites: Signed, where: str, found: Findings) -> None:
    """A done round: enough sites, each with a statement of its own; who isn't in the sum dropped out before it."""
    names, counted = [s.name for s in agreed.sites], set(r.sites)
    found.expect(bool(r.adapter_out) and not r.reason, f"{where} is done, yet has no result or a reason")
    found.expect(bool(counted) and r.sites == [name for name in names if name in counted],
                 f"{where} names a site twice, out of order, an unknown one, or none")
    found.expect(len(counted) >= agreed.secagg.survivors, f"{where} sums fewer sites than the contract allows")
    found.expect(bool(r.sums), f"{where} is done, yet names no sum")
    passes = range(1, len(r.sums) + 1)
    found.expect({pass_no for _, pass_no in sites} <= set(passes), f"{where}: a site signed a pass that names no sum")
    for name in r.sites:
        found.expect(all((name, pass_no) in sites for pass_no in passes),
                     f"{where}: {name} is in the sum without a signed statement of its own")
    early = {d.site for d in r.dropped if d.stage in BEFORE_SUM}
    late = {d.site for d in r.dropped if d.stage not in BEFORE_SUM}
    for name in names:
        found.expect(name in counted | early, f"{where}: {name} is neither in the sum nor dropped out before it")
    found.expect(not counted & early and late <= counted,
                 f"{where}: a site in the sum dropped out before it, or one that isn't dropped out after it")


def _votes(facts: Facts, agreed: Contract, r: Round, pass_no: int, sites: Signed, where: str, found: Findings) -> None:
    """T3 of a done round's sum, recomputed from what each site signed by itself, is what enough of those in the sum voted
    for. The cohort of the second pass is the sites of the first sum."""
    said, cohort = r.sums[pass_no - 1], [s.name for s in agreed.sites] if pass_no == 1 else r.sites
    index = {name: i for i, name in enumerate(cohort)}
    vectors = [(index[name], bytes.fromhex(sites[name, pass_no].masked)) for name in r.sites
               if (name, pass_no) in sites and name in index]
    found.expect(bool(said.view) and tr.t3(bytes.fromhex(said.view), vectors).hex() == said.transcript,
                 f"{where}: the transcript is not that of the vectors that its sites signed")
    voters = {v.site for v in said.votes}
    found.expect(len(voters) == len(said.votes) and voters <= set(r.sites),
                 f"{where}: a vote is repeated, or of a site that isn't in the sum")
    for vote in said.votes:
        try:
            signed = tr.signed_m7(bytes.fromhex(said.transcript), index[vote.site])
            verify_signature(facts.peers[vote.site].certificate, b64decode(vote.signature), signed)
        except (ConsiloError, KeyError):
            voters.discard(vote.site)
            found.append(f"{where}: a vote is not a site's signature on this sum")
    found.expect(len(voters) >= agreed.secagg.threshold, f"{where}: fewer sites voted for the sum than the threshold")
    silent = {d.site for d in r.dropped if (d.pass_no, d.stage) == (pass_no, "vote")}
    found.expect(silent == set(r.sites) - {v.site for v in said.votes},
                 f"{where}: those in the sum without a vote are not those that dropped out at the vote")


def _mechanism(agreed: Contract, s: RoundSite, found: Findings) -> None:
    if s.site in {site.name for site in agreed.sites}:
        m = agreed.mechanism(s.site, s.round)
        said = (float(s.q), float(s.clip), float(s.sigma), s.steps, s.n_decl)
        found.expect(said == (m.q, m.clip, m.sigma, m.steps, m.n_decl),
                     f"round {s.round}: {s.site} used another mechanism than the contract's")


def ledgers(facts: Facts, found: Findings) -> str:
    agreed = facts.agreed()
    extracts = facts.raw.under("ledgers")
    closings = {c.site: c for c in facts.said(Closing)}
    found.expect(len(closings) == len(facts.said(Closing)), "a site closed the run twice")
    if agreed.privacy.trust == "none":
        found.expect(not extracts and not closings, "there is a ledger, but the contract is non-private")
        return NON_PRIVATE
    trained = {s.site for s in facts.said(RoundSite)}
    known = {s.name for s in agreed.sites}
    found.expect(extracts.keys() == closings.keys() and extracts.keys() <= known,
                 "the ledgers are not those of the sites that closed the run")
    facts.unaccounted = sorted(trained & known - extracts.keys() - facts.witnesses)
    found.expect(trained <= extracts.keys() | set(facts.unaccounted),
                 "a site that trained, and that signed the log's last head, shows no ledger")
    for site in sorted(known & closings.keys() & extracts.keys()):
        _ledger(facts, agreed, closings[site], extracts[site], found)
    silent = known - extracts.keys() - trained
    note = f"; {len(silent)} sites never trained and show none" if silent else ""
    note += f"; WITHOUT A LEDGER, which never came: {', '.join(facts.unaccounted)}" if facts.unaccounted else ""
    return f"{len(facts.ledgers)} ledgers: chain, signatures, mechanism and every signed attempt hold{note}"


def _ledger(facts: Facts, agreed: Contract, closing: Closing, data: bytes, found: Findings) -> None:
    """One site's extract against its own closing statement, its acceptance, its round statements and the contract."""
    site = closing.site
    try:
        ledger = check_extract(data, facts.peers[site].certificate)
    except ConsiloError as e:
        found.append(f"{site}: the ledger is refused ({e.code})")
        return
    before = len(found)
    hashes = [parse(line)["hash"] for line in data.splitlines()]
    budget = (ledger.lineage, ledger.cap, ledger.delta)
    found.expect((closing.records, closing.ledger_seq, closing.ledger_head) == (len(hashes), *ledger.head),
                 f"{site}: the closing statement names another head than the ledger's last record")
    found.expect((closing.lineage, float(closing.cap), float(closing.delta)) == budget,
                 f"{site}: the closing statement names another lineage, cap or delta than the ledger")
    for a in facts.said(Acceptance):
        found.expect(a.site != site or (a.lineage, float(a.cap or 0), float(a.delta)) == budget,
                     f"{site}: the acceptance names another lineage, cap or delta than the ledger")
    m = agreed.mechanism(site)
    found.expect((ledger.unit, ledger.adjacency, ledger.delta) == (m.unit, m.adjacency, m.delta),
                 f"{site}: the lineage has another unit, adjacency or delta than the contract")
    found.expect([c.run for c in ledger.closes if c.run == agreed.run] == [agreed.run], f"{site}: the run isn't closed")
    reserves = {(r.round, r.attempt): r for r in ledger.reserves if r.run == agreed.run}
    commits = {(c.round, c.attempt): c for c in ledger.commits if c.run == agreed.run}
    digest, approvers = agreed.digest, {a.approver for a in facts.said(Acceptance) if a.site == site}
    attempts = {(r.round, r.attempt) for r in facts.said(Round)}
    found.expect(reserves.keys() <= attempts, f"{site}: an attempt was charged that the coordinator doesn't account for")
    for r in reserves.values():
        found.expect(r.charge == charge(agreed.mechanism(site, r.round)),
                     f"{site}: record {r.seq} reserved another mechanism than the contract's")
        found.expect((r.contract, r.code) == (digest, agreed.code_version) and r.approver in approvers,
                     f"{site}: record {r.seq} names another contract, code or approver")
    for held in (held for held in ledger.encumbrances if held.run == agreed.run):
        found.expect(held.schedule == schedule(agreed.plans(site)),
                     f"{site}: record {held.seq} encumbered other rounds than the contract's")
        found.expect(held.contract == agreed.digest and held.approver in approvers,
                     f"{site}: record {held.seq} encumbered for another contract or approver")
    for s in (s for s in facts.said(RoundSite) if s.site == site):
        found.expect(s.lineage == ledger.lineage, f"{site}: round {s.round}, attempt {s.attempt} names another lineage")
        where = f"{site}: round {s.round}, attempt {s.attempt}"
        if found.expect((s.round, s.attempt) in reserves and (s.round, s.attempt) in commits,
                        f"{where} was signed, but never charged"):
            inside = commits[s.round, s.attempt].seq <= s.ledger_seq < len(hashes)
            found.expect(inside and hashes[s.ledger_seq] == s.ledger_head,
                         f"{where} names a ledger head that the ledger doesn't hold")
    if len(found) == before:
        facts.ledgers[site] = ledger


def epsilons(facts: Facts, found: Findings) -> str:
    agreed = facts.agreed()
    stated = [(s.site, s.epsilon) for s in facts.said(RoundSite)]
    if agreed.privacy.trust == "none":
        found.expect(not any(claim for _, claim in stated), "a site claims an epsilon, but the contract is non-private")
        return NON_PRIVATE
    found.expect(all(claim for _, claim in stated), "a site's statement names no epsilon")
    found.expect(facts.ledgers.keys() >= {site for site, _ in stated} - set(facts.unaccounted),
                 "a site that trained has no valid ledger")
    for site in facts.unaccounted:
        facts.spending[site] = _unaccounted(facts, agreed, site, found)
    for site, ledger in facts.ledgers.items():
        facts.spending[site] = _spending(facts, agreed, site, ledger, found)
    hidden = sum(ledger.commitments > 0 for ledger in facts.ledgers.values())
    whole = (f"; at {hidden} sites the ledger holds other runs as commitments: recomputed is this run alone, their "
             "part is what the site's ledger claims" if hidden else "")
    lost = (f"; from its statements alone, for want of a ledger: {', '.join(facts.unaccounted)}"
            if facts.unaccounted else "")
    return f"recomputed for {len(facts.spending)} sites: no claim is below it, none above the cap{whole}{lost}"


def _unaccounted(facts: Facts, agreed: Contract, site: str, found: Findings) -> Spending:
    """A site that was lost for good: what it signed is what it spent at least, and its claims must not be below that."""
    said = facts.trained(site)
    used = [agreed.mechanism(site, s.round) for s in said]
    alone = epsilon([Spent(m.q, m.sigma, m.steps, m.group) for m in used], agreed.site(site).delta)
    claimed = max(float(s.epsilon or 0) for s in said)
    cap = next((float(a.cap or 0) for a in facts.said(Acceptance) if a.site == site), 0.0)
    found.expect(claimed >= alone - ULP, f"{site}: its statements claim less epsilon than was spent until then")
    found.expect(max(claimed, alone - ULP) <= cap, f"{site}: more was spent than the cap")
    found.expect(agreed.privacy.epsilon is not None and alone <= agreed.privacy.epsilon + ULP,
                 f"{site}: this run alone spent more than the contract's epsilon")
    return Spending(alone, claimed)


def _spending(facts: Facts, agreed: Contract, site: str, ledger: LedgerSummary, found: Findings) -> Spending:
    """One site's claims (each reserve, the closing record, its statements) against what its reserves spent."""
    mine = [r for r in ledger.reserves if r.run == agreed.run]
    claimed = {(r.round, r.attempt): float(r.epsilon) for r in mine}
    stride = max(1, len(mine) // MAX_PREFIXES)
    for last in mine[::-stride]:
        spent = epsilon([r.release for r in ledger.reserves if r.seq <= last.seq], ledger.delta)
        found.expect(float(last.epsilon) >= spent - ULP,
                     f"{site}: record {last.seq} claims less epsilon than was spent until then")
    found.expect(list(claimed.values()) == sorted(claimed.values()), f"{site}: the ledger's cumulative epsilon falls")
    alone = epsilon([r.release for r in mine], ledger.delta)
    found.expect(agreed.privacy.epsilon is not None and alone <= agreed.privacy.epsilon + ULP,
                 f"{site}: this run alone spent more than the contract's epsilon")
    ends = [float(c.head_epsilon) for c in ledger.closes if c.run == agreed.run]
    ends += [float(c.epsilon) for c in facts.said(Closing) if c.site == site]
    total = max([*claimed.values(), *ends])
    found.expect(min(ends) >= max([*claimed.values(), 0.0]), f"{site}: the closing statement understates epsilon")
    found.expect(max(total, alone - ULP) <= ledger.cap, f"{site}: more was spent than the cap")
    said = [s for s in facts.said(RoundSite) if s.site == site]
    found.expect(all(float(s.epsilon or 0) >= claimed[s.round, s.attempt] for s in said),
                 f"{site}: a round's statement understates epsilon")
    return Spending(alone, total)


def release(facts: Facts, found: Findings) -> str:
    agreed = facts.agreed()
    done = [r for r in facts.said(Round) if r.outcome == "done"]
    released, measured = facts.said(Release), facts.said(Evaluation)
    adapters = {r.round: r.adapter_out for r in done}
    found.expect(len({(e.round, e.metric_name) for e in measured}) == len(measured), "an adapter is evaluated twice")
    for e in measured:
        found.expect(e.adapter == adapters.get(e.round, e.adapter if e.round == 0 else ""),
                     "an evaluation is of another adapter than its round left")
        found.expect(e.metric_name in agreed.metrics, "an evaluation is of a metric that the contract doesn't name")
    if not done:
        found.expect(not released, "an adapter was released, but no round was done")
        return "no round was done, so nothing was released"
    if found.expect(len(released) == 1, "there is not exactly one release"):
        found.expect(released[0].adapter == done[-1].adapter_out, "the released adapter is not the last round's")
        found.expect(released[0].rounds == len(done), "the release counts another number of rounds")
        found.expect(released[0].metric_name in agreed.metrics,
                     "the release publishes a metric that the contract doesn't name, so no site agreed to it")
        r = released[0]
        ends = [(e.metric, e.metric_name, e.split, e.units) for e in sorted(measured, key=lambda e: e.round)
                if e.metric_name == r.metric_name]
        found.expect(bool(ends) and ends[0][0] == r.metric_before and ends[-1] == (
            r.metric_after, r.metric_name, r.split, r.units), "the release names other figures than were stated before")
    return f"the adapter is the one that round {done[-1].round} left"
