"""What is signed and derived from: no two different things have one encoding, and a contract implies one offer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from secagg_kit import DIM

from privacy.contract import SecAggTerms
from privacy.secagg import transcript as tr
from simulations.adversary import Consortium

SHORT = st.text("ab", max_size=3).map(str.encode)  # few values, so that different inputs often look alike
PAIRS = st.lists(st.tuples(st.integers(0, 2), SHORT), max_size=3)
LISTS = {"T1": tr.t1, "T2": tr.t2, "T3": tr.t3}
ITEMS: dict[str, Any] = {
    "com b": tr.commit_b, "self mask": tr.self_mask_info, "com s": tr.commit_s, "share": tr.share_info,
    "pair mask": tr.pair_mask_info, "s1": tr.signed_m1, "s3": tr.signed_m3, "s5": tr.signed_m5, "s7": tr.signed_m7,
    "s9": tr.signed_m9}
ARGUMENTS = {"com b": (int, bytes), "self mask": (int,), "com s": (int, int, bytes), "share": (int, int),
             "pair mask": (int, int), "s1": (int, bytes), "s3": (bytes,), "s5": (int, bytes), "s7": (int,),
             "s9": (int, bytes)}


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.sampled_from(list(LISTS)), SHORT, PAIRS, st.sampled_from(list(LISTS)), SHORT, PAIRS)
def test_lists_are_encoded_injectively(one: str, before: bytes, pairs: Any, other: str, after: bytes, others: Any) -> None:
    same = (one, before, pairs) == (other, after, others)
    assert (LISTS[one](before, pairs) == LISTS[other](after, others)) == same


@pytest.mark.parametrize("label", LISTS)
def test_lists_that_collide_when_joined(label: str) -> None:
    """Bytes moved over every border that a plain concatenation would lose."""
    eight = (1).to_bytes(8, "little")
    groups = [(b"x", [(1, b"ab"), (2, b"c")]), (b"x", [(1, b"a"), (2, b"bc")]), (b"x", [(1, b"ab" + (2).to_bytes(8, "little")
               + b"c")]), (b"x" + eight, [(1, b"ab")]), (b"x", [(1, eight + b"ab")]), (b"", [(1, b"ab"), (2, b"c")]),
              (b"x", []), (b"x", [(1, b"")]), (b"x", [(1, b""), (1, b"")]), (b"x", [(2, b"c"), (1, b"ab")]),
              (b"x", [(1, b"\0")]), (b"x", [(0, b"")]), (b"x\0", [])]
    assert len({LISTS[label](before, pairs) for before, pairs in groups}) == len(groups)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(data=st.data())
def test_what_is_signed_or_derived_is_encoded_injectively(data: st.DataObject) -> None:
    """Over all kinds at once: a commitment is never a mask's context, nor one message's signature another's."""
    def one() -> tuple[Any, ...]:
        kind = data.draw(st.sampled_from(list(ITEMS)))
        rest = [data.draw(SHORT if a is bytes else st.integers(0, 2)) for a in ARGUMENTS[kind]]
        return (kind, data.draw(SHORT), *rest)

    a, b = one(), one()
    assert (ITEMS[a[0]](*a[1:]) == ITEMS[b[0]](*b[1:])) == (a == b)


def test_signed_bytes_begin_with_their_stage() -> None:
    """No prefix begins another, and none can be mistaken for a statement's."""
    signed = {"M1": tr.signed_m1(b"", 0, b""), "M3": tr.signed_m3(b"", b""), "M5": tr.signed_m5(b"", 0, b""),
              "M7": tr.signed_m7(b"", 0), "M9": tr.signed_m9(b"", 0, b"")}
    for stage, data in signed.items():
        assert data.startswith(b"consilo secagg %s\n" % stage.encode()) and len(data) == len("consilo secagg M1\n") + 32


CHANGES: list[dict[str, Any]] = [
    {"run": "ac" * 16}, {"round": 2}, {"attempt": 1}, {"pass_no": 2}, {"after": "4" * 64}, {"shared": "4" * 64},
    {"threshold": 4}, {"survivors": 4}, {"ring": 16}, {"bits": 23},
    {"ranges": ((DIM, "1.5"),)}, {"ranges": ((DIM - 1, "1.0"), (1, "1.0"))}, {"ranges": ((DIM, "1.00"),)}, {"w_cap": "2.0"},
    {"base_model": "3" * 64}, {"adapter": "0" * 64}, {"contract": "0" * 64}, {"base_model": "1" * 64, "adapter": "0" * 64}]


def test_ctx_binds_every_field_of_m0(consortium: Consortium) -> None:
    """And every field of every member."""
    offer = consortium.offer(4, 3, DIM)
    assert {key for change in CHANGES for key in change} | {"suite", "cohort"} == set(tr.Offer.model_fields)
    offers = [offer, *(consortium.offer(4, 3, DIM, **change) for change in CHANGES), consortium.offer(3, 3, DIM),
              offer.model_copy(update={"suite": "another"})]
    for changed in ({"name": "x"}, {"certificate": "4" * 64}, {"index": 7}):
        cohort = (*offer.cohort[:3], offer.cohort[3].model_copy(update=changed))
        offers.append(consortium.offer(4, 3, DIM, cohort=cohort))
    offers.append(consortium.offer(4, 3, DIM, cohort=offer.cohort[::-1]))
    assert len({o.ctx for o in offers}) == len(offers)
    assert consortium.offer(4, 3, DIM).ctx == offer.ctx


RANGES = [(8, 0.5), (4, 2.0), (4, 0.5)]


def implied(second: tr.Second | None = None, **secagg: Any) -> tr.Offer:
    """Of a contract's terms that an offer is made of."""
    contract: Any = SimpleNamespace(
        run="ab" * 16, digest="d" * 64, model=SimpleNamespace(weights="5" * 64),
        secagg=SecAggTerms.model_validate({"threshold": 3, "survivors": 4, "range": 0.5} | secagg),
        sites=[SimpleNamespace(name=f"s{i}", signer=f"{i}" * 64) for i in range(4)])
    return tr.offer(contract, round_no=3, attempt=1, ranges=RANGES, adapter="9" * 64, second=second)


def test_the_offer_that_a_contract_implies() -> None:
    offer = implied(bits=17)
    assert offer.ranges == ((8, "0.5"), (4, "2.0"), (4, "0.5")) and offer.dim == 16
    assert [(m.index, m.name, m.certificate) for m in offer.cohort] == [(i, f"s{i}", f"{i}" * 64) for i in range(4)]
    assert (offer.run, offer.round, offer.attempt, offer.threshold, offer.survivors) == ("ab" * 16, 3, 1, 3, 4)
    assert (offer.ring, offer.bits, offer.w_cap) == (32, 17, "1.0") and implied(ring=16, bits=9).ring == 16
    assert (offer.base_model, offer.adapter, offer.contract) == ("5" * 64, "9" * 64, "d" * 64)
    assert offer.encoding.ranges == ((8, 0.5), (4, 2.0), (4, 0.5)) and offer.encoding.cohort == 4


def test_the_second_pass_is_over_the_sites_of_the_first_and_needs_them_all() -> None:
    offer = implied(tr.Second(("s3", "s0", "s1"), "6" * 64, "7" * 64))
    assert [(m.index, m.name, m.certificate) for m in offer.cohort] == [(0, "s0", "0" * 64), (1, "s1", "1" * 64),
                                                                      (2, "s3", "3" * 64)]
    assert (offer.slot, offer.threshold, offer.survivors) == ((3, 1, 2), 3, 3)
    assert (offer.after, offer.shared, implied().slot, implied().after) == ("6" * 64, "7" * 64, (3, 1, 1), "")
