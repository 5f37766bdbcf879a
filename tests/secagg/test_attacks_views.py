"""Attacks by telling sites different things, with colluders that vouch for all of it. What counts is not that somebody
raised but what the attackers hold in the end: `Liar.exposed`."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from liar import Liar
from secagg_kit import DIM, Scene, added, at, vectors

from privacy.errors import Aborted, Refused
from privacy.secagg import site as site_module
from privacy.secagg import transcript as tr
from privacy.secagg.messages import M1, M2, M4, M6, dump, load
from simulations.adversary import Consortium


def legal(most: int) -> list[tuple[int, int, int]]:
    """(n, smallest t, n_C) that a site accepts."""
    out = []
    for n in range(3, most + 1):
        for n_c in range(1, n - 1):
            if (t := tr.least_threshold(n, n_c)) <= n:
                out.append((n, t, n_c))
    return out


def test_attack_one_survivor_hidden() -> None:
    """One honest survivor, a low t, a small cohort: exactly the safe terms are accepted, for all of n <= 12, n_C < n.

    Safe: two sets of t voters have an honest site in common, also of those that colluders double (or two survivor sets
    could be released); t > 2n/3; every sum keeps two honest sites; enough survivors to unmask."""
    for n in range(13):
        for n_c in range(max(n, 1)):
            for t in range(n + 2):
                for survivors in range(n + 2):
                    safe = (n_c >= 1 and 3 * t > 2 * n and 2 * (t - n_c) > n - n_c and survivors - n_c >= 2
                            and t <= survivors <= n)
                    try:
                        tr.check_cohort(n, t, survivors, n_c)
                    except Refused:
                        assert not safe, (n, t, survivors, n_c)
                    else:
                        assert safe, (n, t, survivors, n_c)


@pytest.mark.parametrize(("n", "t", "survivors", "n_c", "code"), [
    (3, 3, 3, 2, "cohort"), (2, 2, 2, 1, "cohort"), (5, 5, 5, 4, "cohort"), (4, 4, 4, 0, "cohort"),
    (101, 80, 80, 1, "cohort"), (4, 2, 4, 1, "threshold"), (4, 5, 5, 1, "threshold"), (7, 4, 7, 1, "threshold"),
    (7, 5, 7, 3, "threshold"), (6, 5, 4, 1, "survivors"), (4, 3, 5, 1, "survivors"), (7, 7, 6, 4, "survivors")])
def test_attack_low_threshold_or_small_cohort(n: int, t: int, survivors: int, n_c: int, code: str) -> None:
    """Refused at M0, with the term that is wrong; a hundred sites are the most."""
    with pytest.raises(Refused, match=rf"secagg\.{code}:"):
        tr.check_cohort(n, t, survivors, n_c)
    tr.check_cohort(100, 67, 67, 1)


def test_site_counts_the_cohort_itself(consortium: Consortium) -> None:
    """Terms that the site's own policy does not allow never start a session."""
    with pytest.raises(Refused, match=r"secagg\.threshold"):
        consortium.site(consortium.offer(6, 4, DIM), 0)
    with pytest.raises(Refused, match=r"secagg\.cohort"):
        consortium.site(consortium.offer(3, 3, DIM), 0, n_c=2)
    consortium.site(consortium.offer(5, 4, DIM), 0, n_c=2)


def test_largest_n_c_and_dropouts_at_the_smallest_threshold() -> None:
    """The table of the specification."""
    for n, n_c, dropouts in ((3, 1, 0), (4, 1, 1), (5, 2, 1)):
        t = min(tr.least_threshold(n, k) for k in range(1, n - 1))
        assert max(k for m, low, k in legal(n) if (m, low) == (n, t)) == n_c
        assert n - tr.least_survivors(t, n_c) == dropouts


def split_survivors(consortium: Consortium, n: int, t: int, n_c: int, first: int, offer: tr.Offer | None = None) -> Liar:
    """The classic attack on site 0: `first` honest sites, 0 among them, are told that all survived, the others that 0 is
    dead. b_0 comes from those, its pair secrets from these; colluders vote for both."""
    offer = offer or consortium.offer(n, t, DIM)
    colluders, honest = range(n - n_c, n), range(n - n_c)
    liar, everyone = Liar(consortium, offer, colluders, vectors(offer), n_c=n_c), range(n)
    liar.keys(dict.fromkeys(honest, everyone))
    liar.shares(dict.fromkeys(honest, everyone))
    liar.survivors({u: everyone if u < first else everyone[1:] for u in honest})
    liar.votes(dict.fromkeys(honest, everyone))
    return liar


@pytest.mark.parametrize(("n", "t", "n_c"), legal(8))
def test_attack_different_survivor_sets_to_different_sites(consortium: Consortium, n: int, t: int, n_c: int) -> None:
    """Two survivor sets to two groups of every size, all colluders voting for both: at most one group releases shares, and
    the sum it gives hides every honest site."""
    for first in range(1, n - n_c):
        liar = split_survivors(consortium, n, t, n_c, first)
        assert set(liar.refused.values()) <= {"secagg.too_few"}
        voted = {liar.sites[u].transcript for u in liar.m9}
        assert len(voted) <= 1
        assert liar.check_promise(n_c) in (0, n - n_c, n - n_c - 1)


def every_site_another(consortium: Consortium) -> Liar:
    """Seven sites, t = 5, one colluder (6): each honest site is told of another five survivors, so that 3, 4 and 5 are
    dead for four sites each. No two sets meet in fewer than t, yet together they would bare the sum of 0, 1 and 2."""
    dead = {0: (3, 5), 1: (3, 4), 2: (4, 5), 3: (4, 5), 4: (3, 5), 5: (3, 4)}
    offer, everyone = consortium.offer(7, 5, DIM), range(7)
    liar = Liar(consortium, offer, [6], vectors(offer))
    liar.keys(dict.fromkeys(range(6), everyone))
    liar.shares(dict.fromkeys(range(6), everyone))
    liar.survivors({u: [v for v in everyone if v not in gone] for u, gone in dead.items()})
    liar.votes(dict.fromkeys(range(6), everyone))
    return liar


def test_attack_every_site_another_survivor_set(consortium: Consortium) -> None:
    """Each list is well formed and large enough: no set finds t voters, and nothing is released."""
    liar = every_site_another(consortium)
    assert liar.refused == {("m8", u): "secagg.too_few" for u in range(6)}
    assert not liar.m9 and liar.check_promise(1) == 0


def test_planted_without_the_vote_three_sites_are_bared(consortium: Consortium, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the vote is for; and the measure sees it: the sum of three honest sites where five are agreed."""
    real = site_module.check_members

    def no_vote(members: object, among: object, least: int, what: str) -> None:
        if what != "votes":
            real(members, among, least, what)  # type: ignore[arg-type]

    monkeypatch.setattr(site_module, "check_members", no_vote)
    liar = every_site_another(consortium)
    assert liar.exposed() == [frozenset({0, 1, 2})]
    assert np.array_equal(liar.sum_of({0, 1, 2}), added(liar.vectors, (0, 1, 2)))
    with pytest.raises(AssertionError):
        liar.check_promise(1)


def test_planted_low_threshold_bares_a_site(consortium: Consortium, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the bound on t is for: with t = 2 of 4, both groups of the classic attack have their voters."""
    monkeypatch.setattr(tr, "check_cohort", lambda n, t, survivors, n_c: None)
    liar = split_survivors(consortium, 4, 2, 1, 1, consortium.offer(4, 2, DIM, survivors=3))
    assert frozenset({0}) in liar.exposed()
    assert np.array_equal(liar.sum_of({0}), liar.vectors[0])
    with pytest.raises(AssertionError):
        liar.check_promise(1)


def test_planted_shares_of_all_pairs_bare_every_site(consortium: Consortium, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the rule of M9 is for."""
    monkeypatch.setattr(tr, "released_pairs", lambda u2, u3: list(combinations(u2, 2)))
    liar = split_survivors(consortium, 4, 3, 1, 3)
    assert liar.exposed() == [frozenset({0}), frozenset({1}), frozenset({2})]
    assert all(np.array_equal(liar.sum_of({u}), liar.vectors[u]) for u in range(3))


def test_attack_second_survivor_set_to_one_site(consortium: Consortium) -> None:
    """After its vote, and after its shares, site 0 gets a smaller list: refused, whatever votes come with it."""
    for n, t, n_c in legal(6):
        if t == n:
            continue
        for after in ("vote", "shares"):
            offer = consortium.offer(n, t, DIM)
            honest, everyone = range(n - n_c), range(n)
            liar = Liar(consortium, offer, range(n - n_c, n), vectors(offer), n_c=n_c)
            liar.keys(dict.fromkeys(honest, everyone))
            liar.shares(dict.fromkeys(honest, everyone))
            liar.survivors(dict.fromkeys(honest, everyone))
            if after == "shares":
                liar.votes(dict.fromkeys(honest, everyone))
            liar.survivors({0: [u for u in everyone if u != 1]})
            assert liar.refused == {("m6", 0): "secagg.stage"}
            liar.votes(dict.fromkeys(honest, everyone))
            liar.check_promise(n_c)


def test_attack_understated_n(consortium: Consortium) -> None:
    """A cohort of 4 in M0 (t = 3), and 8 certified sites in M2, of which two survivor sets could be made: no site goes on,
    whether the other four bring new indices or the cohort's own."""
    for indices in (range(8), (0, 1, 2, 3, 0, 1, 2, 3), (0, 0, 1, 1, 2, 2, 3, 3)):
        scene = Scene.of(consortium)
        keys = tuple(scene.m1(u % 4, load(M1, scene.sites[u % 4].m1()).public, index=i, certificate=scene.pem(u))
                     if u != i else load(M1, scene.sites[u].m1()) if u < 4 else scene.m1(u, bytes(1216))
                     for u, i in enumerate(indices))
        for u in range(4):
            with pytest.raises(Aborted, match=r"secagg\.key_list"):
                scene.sites[u].m3(dump(M2(keys=keys)))


def test_attack_understated_n_by_two_cohorts(consortium: Consortium) -> None:
    """Sites 0 to 3 get an M0 of these four, 4 to 7 another, 2 and 3 being in both by their colluding signers: a key that was
    signed for one cohort counts in no other, so that neither set can borrow from the other."""
    low = consortium.offer(4, 3, DIM)
    members = tuple(tr.Member(index=i, name=f"site{u}", certificate=consortium.signers[u].fingerprint)
                    for i, u in enumerate((4, 5, 2, 3)))
    high = consortium.offer(4, 3, DIM, cohort=members)
    first = [load(M1, consortium.site(low, i).m1()) for i in range(4)]
    sites = [consortium.site(high, i, signer=consortium.signers[u]) for i, u in enumerate((4, 5, 2, 3))]
    second = [load(M1, site.m1()) for site in sites]
    for keys in ((*second[:2], *first[2:]), (first[0], *second[1:])):
        site = consortium.site(high, 1, signer=consortium.signers[5])
        own = load(M1, site.m1())
        with pytest.raises(Aborted, match=r"secagg\.(identity|peer)"):
            site.m3(dump(M2(keys=(keys[0], own, *keys[2:]))))
    assert low.ctx != high.ctx


def test_attack_cross_view_m5(consortium: Consortium) -> None:
    """Site 1 saw another list of shares than the rest (each well formed and large enough), so its vector has other masks.
    Its M5 counts in no sum: the coordinator leaves it out, and sites refuse it as a survivor."""
    scene = Scene.of(consortium, 5, 4)
    shorter = at(scene, "m4", 1, lambda s, data: dump(load(M4, data).model_copy(update={
        "bodies": load(M4, data).bodies[:4], "inbound": load(M4, data).inbound[:3]})))
    kept = dict[int, bytes]()

    def hook(m: str, u: int, data: bytes) -> bytes | None:
        if m == "m6":
            kept[u] = data
            return None
        return shorter(m, u, data)

    played = scene.play(hook)
    assert played.refused == {("m5", 1): "identity.signature"} and scene.sites[1].view != scene.sites[0].view
    other = played.sent["m5", 1]
    for u in (0, 2, 3, 4):
        value = load(M6, kept[u]).survivors
        m6 = M6.model_validate_json(b'{"survivors":[%s]}' % b",".join([dump(value[0]), other, *map(dump, value[1:])]))
        with pytest.raises(Aborted, match=r"secagg\.identity"):
            scene.sites[u].m7(dump(m6))


@pytest.mark.parametrize(("n", "t", "n_c"), [(4, 3, 1), (5, 4, 2), (7, 5, 2)])
def test_attack_members_of_u1_but_not_u2_named_as_survivors(consortium: Consortium, n: int, t: int, n_c: int) -> None:
    """The last colluder sent no M3, yet signs a vector for T2 and stands among the survivors, to fill a set or to make
    pairs whose shares nobody dealt: all honest sites refuse."""
    offer, honest, everyone = consortium.offer(n, t, DIM), range(n - n_c), range(n)
    liar = Liar(consortium, offer, range(n - n_c, n), vectors(offer), n_c=n_c)
    liar.keys(dict.fromkeys(honest, everyone))
    liar.shares(dict.fromkeys(honest, everyone[:-1]))
    liar.survivors(dict.fromkeys(honest, everyone))
    assert liar.refused == {("m6", u): "secagg.survivors" for u in honest}
    liar.votes(dict.fromkeys(honest, everyone))
    assert not liar.m9 and liar.check_promise(n_c) == 0


@pytest.mark.parametrize("stage", ["keys", "shares"])
@pytest.mark.parametrize(("n", "t", "n_c"), legal(7))
def test_attack_two_views_of_keys_or_shares(consortium: Consortium, stage: str, n: int, t: int, n_c: int) -> None:
    """Two groups of honest sites get different lists of keys, or of shares, colluders being in both: at most one group
    comes to a sum, and it hides all its honest sites."""
    for first in range(1, n - n_c):
        offer, honest, everyone = consortium.offer(n, t, DIM), range(n - n_c), range(n)
        liar = Liar(consortium, offer, range(n - n_c, n), vectors(offer), n_c=n_c)
        views = {u: everyone if u < first else everyone[1:] for u in honest}
        liar.keys(views if stage == "keys" else dict.fromkeys(honest, everyone))
        liar.shares(views if stage == "shares" else dict.fromkeys(honest, everyone))
        liar.survivors(dict.fromkeys(honest, everyone))
        liar.votes(dict.fromkeys(honest, everyone))
        liar.check_promise(n_c)
