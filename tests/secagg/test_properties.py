"""Whatever falls out, and whatever a coordinator says: the sum is exact or there is none, and no site is bared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import product
from random import Random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from liar import Liar
from secagg_kit import added, vectors

from privacy.secagg import transcript as tr
from simulations.adversary import Consortium, play

STAGES = ("m1", "m3", "m5", "m7", "m9")
NEVER = len(STAGES)
INBOUND = ("m2", "m4", "m6", "m8")
SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]


def outcome(drops: tuple[int, ...], t: int, survivors: int) -> tuple[tuple[int, ...], int]:
    """Who is in the sum, or (), and how many stages there are until then. drops: for each site the place of the message
    that is the first to stay out."""
    for stage, least in enumerate((survivors, survivors, survivors, t, t)):
        if sum(d > stage for d in drops) < least:
            return (), stage + 1
    return tuple(u for u, d in enumerate(drops) if d > 2), NEVER


def check_dropouts(consortium: Consortium, offer: tr.Offer, drops: tuple[int, ...], inbound: tuple[bool, ...]) -> None:
    """inbound: whether the site gets what it then does not answer."""
    def hook(message: str, u: int, data: bytes) -> bytes | None:
        stage = (int(message[1:]) + 1) // 2 - (message in STAGES)
        lost = drops[u] <= stage and (message in STAGES or not inbound[u])
        return None if lost else data

    xs = vectors(offer)
    played = play(consortium, offer, xs, hook)
    members, _ = outcome(drops, offer.threshold, offer.survivors)
    assert not played.refused
    if members:
        assert played.void == "" and played.coordinator.survivors == members
        assert played.total is not None and np.array_equal(played.total, added(xs, members))
    else:
        assert played.total is None and played.void == "secagg.too_few"


@pytest.mark.parametrize(("n", "t", "ring", "bits"), [
    (3, 3, 32, 24), (4, 3, 16, 14), (5, 5, 16, 13), pytest.param(5, 4, 32, 24, marks=pytest.mark.long)])
def test_sum_is_exact_for_every_dropout_pattern(consortium: Consortium, n: int, t: int, ring: int, bits: int) -> None:
    """Each site falls out before any of its messages, or never. Patterns that differ only after the attempt is void count
    once; of five sites those where exactly one site is missing then."""
    patterns = set[tuple[int, ...]]()
    for drops in product(range(NEVER + 1), repeat=n):
        members, end = outcome(drops, t, t)
        if members or n < 5 or sum(d >= end for d in drops) == t - 1:
            patterns.add(drops if members else tuple(min(d, end) for d in drops))
    assert sum(bool(outcome(p, t, t)[0]) for p in patterns) == {(3, 3): 1, (4, 3): 21, (5, 4): 26, (5, 5): 1}[n, t]
    offer = consortium.offer(n, t, 5, ring=ring, bits=bits)
    for k, drops in enumerate(sorted(patterns)):
        check_dropouts(consortium, offer, drops, tuple((k >> u) % 2 == 0 for u in range(n)))


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=SLOW)
@given(data=st.data())
def test_sum_is_exact_for_random_dropouts(consortium: Consortium, data: st.DataObject) -> None:
    """Up to twelve sites, legal thresholds and minima, both rings; two thirds of the patterns leave enough."""
    n = data.draw(st.integers(5, 12))
    t = data.draw(st.integers(tr.least_threshold(n, 1), n))
    survivors = data.draw(st.integers(tr.least_survivors(t, 1), n))
    ring, bits = data.draw(st.sampled_from([(16, 12), (32, 28)]))
    room = n - survivors if data.draw(st.integers(0, 2)) else n
    lost = data.draw(st.lists(st.integers(0, n - 1), max_size=room, unique=True))
    drops = tuple(data.draw(st.integers(0, NEVER)) if u in lost else NEVER for u in range(n))
    inbound = tuple(data.draw(st.booleans()) for _ in range(n))
    offer = consortium.offer(n, t, data.draw(st.integers(1, 40)), survivors=survivors, ring=ring, bits=bits)
    check_dropouts(consortium, offer, drops, inbound)


def members(random: Random, n: int, survivors: int) -> Sequence[int]:
    """A list as a clever coordinator makes it: mostly as short as is allowed, at times anything."""
    size = random.randint(0, n) if random.random() < 0.1 else random.randint(survivors, n)
    return sorted(random.sample(range(n), size))


def test_random_coordinator_never_bares_a_site(consortium: Consortium) -> None:
    """At some stages each honest site is told one of up to three lists; a message may be another one of the attempt,
    or doubled. Whatever they answer, coordinator and n_C sites hold at most one sum, over all honest survivors of one
    agreed set (of at least two). At times they must get that far, or the test would test nothing."""
    seen = Counter[str]()

    @settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=SLOW)
    @given(random=st.randoms(use_true_random=True))
    def attempt(random: Random) -> None:
        n = random.choice([7, 7, 7, 6, 5, 4, 3])
        n_c = random.choice([k for k in range(1, n - 1) if tr.least_threshold(n, k) <= n])
        t = min(n, tr.least_threshold(n, n_c) + random.choice([0, 0, 0, 1]))
        survivors = min(n, tr.least_survivors(t, n_c) + random.choice([0, 0, 0, 1]))
        colluders = random.sample(range(n), n_c)
        replaced = random.choice(INBOUND), random.randrange(3 * n)
        kept = dict[tuple[str, int], bytes]()

        def tamper(message: str, u: int, sent: bytes) -> bytes:
            kept[message, u] = sent
            return random.choice([*kept.values(), sent + sent]) if (message, u) == replaced else sent

        offer = consortium.offer(n, t, 4, survivors=survivors)
        liar = Liar(consortium, offer, colluders, vectors(offer), n_c=n_c, tamper=tamper)
        for stage in (liar.keys, liar.shares, liar.survivors, liar.votes):
            pool: list[Sequence[int]] = [range(n)]
            if random.random() < (0.8 if stage == liar.survivors else 0.4):
                pool = [members(random, n, survivors) for _ in range(random.randint(1, 3))]
            views = {u: random.choice(pool) for u in liar.sites}
            stage({u: sorted({*view, u}) if random.random() < 0.9 else view for u, view in views.items()})
        size = liar.check_promise(n_c)
        seen.update({"runs": 1, "votes": bool(liar.m7), "shares": bool(liar.m9), "sums": size > 0,
                     "two views": len({site.view for site in liar.sites.values()} - {b""}) > 1,
                     "two sets": len({site.transcript for site in liar.sites.values()} - {b""}) > 1})

    attempt()
    assert all(seen[what] for what in ("votes", "shares", "sums", "two views", "two sets")), seen
