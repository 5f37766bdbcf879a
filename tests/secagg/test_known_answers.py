"""Known answers (vectors.json) pin the wire format. Product and reference code each have to give them."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
from reference import labelled_hash as h

from privacy.canonical import labelled_hash
from privacy.secagg import prg, shamir
from privacy.secagg import transcript as tr
from privacy.secagg.encoding import Encoding, rounded_weight

VECTORS: dict[str, Any] = json.loads((Path(__file__).parent / "vectors.json").read_text())
SIZES = {"uint32": 4, "uint16": 2}


def cases(part: str) -> Any:
    return pytest.mark.parametrize("case", VECTORS[part]["cases"], ids=str)


def keystream(key: bytes, dtype: str, *, size: int, threads: int = 1) -> np.ndarray[Any, Any]:
    vector = np.zeros(size, dtype)
    prg.add_masks(vector, [(key, 1)], threads=threads)
    return vector


@cases("rfc8439")
def test_keystream_is_the_one_of_the_rfc(case: dict[str, Any]) -> None:
    key, block, stream = bytes.fromhex(case["key"]), case["block"], bytes.fromhex(case["stream"])
    assert reference.chacha20(key, block) == stream
    for dtype, size in SIZES.items():
        words = keystream(key, dtype, size=3 * 64 // size)
        assert words.astype(f"<u{size}").tobytes()[64 * block:64 * block + 64] == stream


@cases("keystream")
@pytest.mark.parametrize("threads", [1, 3])
def test_mask_words(case: dict[str, Any], threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second thread starts at the end of the first chunk."""
    monkeypatch.setattr(prg, "THREAD_WORK", prg.CHUNK)
    key = bytes.fromhex(case["key"])
    for dtype, size in SIZES.items():
        got = keystream(key, dtype, size=3 * prg.CHUNK // size, threads=threads)
        late = prg.CHUNK // size - 4
        assert got[:8].tolist() == case[dtype] == reference.words(key, size, first=0, count=8)
        assert got[late:late + 8].tolist() == case[f"{dtype} from {late}"] == reference.words(key, size, first=late, count=8)


@cases("hkdf")
def test_mask_keys(case: dict[str, Any]) -> None:
    secret, info = bytes.fromhex(case["secret"]), bytes.fromhex(case["info"])
    assert prg.derive_key(secret, info).hex() == case["key"] == reference.hkdf(secret, info, 32).hex()


def test_pair_mask_key_is_under_its_info() -> None:
    assert VECTORS["hkdf"]["cases"][1]["info"] == tr.pair_mask_info(bytes([2]) * 32, 0, 1).hex()


def test_shares() -> None:
    case = VECTORS["shamir"]
    secret, drawn, t = bytes.fromhex(case["secret"]), bytes.fromhex(case["coefficients"]), case["threshold"]
    want = {int(x): bytes.fromhex(share) for x, share in case["shares"].items()}
    assert shamir.split(secret, threshold=t, points=list(want), random=lambda n: drawn[:n]) == want
    rows = [secret, *(drawn[i:i + len(secret)] for i in range(0, len(drawn), len(secret)))]
    assert {x: bytes(reference.polynomial(c, x) for c in zip(*rows, strict=True)) for x in want} == want
    assert shamir.combine(dict(list(want.items())[-t:])) == secret


@cases("encoding")
def test_encoded_words(case: dict[str, Any]) -> None:
    part = VECTORS["encoding"]
    update, key = [float(x) for x in part["update"]], bytes.fromhex(part["rounding_key"])
    ranges = tuple((count, float(c)) for count, c in part["ranges"])
    bits, ring, weight = case["bits"], case["ring"], float(case["weight"])
    encoding = Encoding(bits=bits, ring=ring, cohort=2, ranges=ranges)
    got = encoding._encode(np.array(update, np.float32), weight, key, np.empty(encoding.dim, encoding.dtype))
    lattice = Fraction(round(weight * 2**16), 2**16)
    assert rounded_weight(weight) == lattice
    bounds = [c for count, c in ranges for _ in range(count)]
    words = reference.words(key, 2, first=0, count=len(update))
    want = [reference.encoded(x, bits=bits, c=c, weight=lattice, word=k) % 2**ring
            for x, c, k in zip(update, bounds, words, strict=True)]
    assert got.tolist() == case["words"] == want


def test_transcript() -> None:
    ctx, b, s, vectors = bytes([0x0C]) * 32, bytes([0x0B]) * 32, bytes([5]) * 32, [(0, b"\xa0" * 32), (2, b"\xa2" * 32)]
    keys, bodies = [(u, f"key of {u}".encode()) for u in range(3)], [(u, f"body of {u}".encode()) for u in range(3)]
    t1 = tr.t1(ctx, keys)
    t2 = tr.t2(t1, bodies)
    t3 = tr.t3(t2, vectors)
    product = {
        "t1": t1, "t2": t2, "t3": t3, "commit_b": tr.commit_b(t1, 1, b), "commit_s": tr.commit_s(t1, 1, 2, s),
        "share_info": tr.share_info(t1, 1, 2), "self_mask_info": tr.self_mask_info(t2, 1),
        "pair_mask_info": tr.pair_mask_info(t2, 1, 2), "signed_m1": tr.signed_m1(ctx, 1, b"key of 1"),
        "signed_m3": tr.signed_m3(t1, b"body of 1"), "signed_m5": tr.signed_m5(t2, 0, vectors[0][1]),
        "signed_m7": tr.signed_m7(t3, 1), "signed_m9": tr.signed_m9(t3, 0, b"all shares"),
    }
    by_hand = {
        "t1": h("consilo secagg T1", ctx, 0, b"key of 0", 1, b"key of 1", 2, b"key of 2"),
        "t2": h("consilo secagg T2", t1, 0, h("M3", b"body of 0"), 1, h("M3", b"body of 1"), 2, h("M3", b"body of 2")),
        "t3": h("consilo secagg T3", t2, 0, vectors[0][1], 2, vectors[1][1]),
        "commit_b": h("consilo secagg com b", t1, 1, b), "commit_s": h("consilo secagg com s", t1, 1, 2, s),
        "share_info": h("consilo secagg share", t1, 1, 2), "self_mask_info": h("consilo secagg self mask", t2, 1),
        "pair_mask_info": h("consilo secagg pair mask", t2, 1, 2),
        "signed_m1": b"consilo secagg M1\n" + h("s1", ctx, 1, b"key of 1"),
        "signed_m3": b"consilo secagg M3\n" + h("s3", t1, b"body of 1"),
        "signed_m5": b"consilo secagg M5\n" + h("s5", t2, 0, vectors[0][1]),
        "signed_m7": b"consilo secagg M7\n" + h("s7", t3, 1),
        "signed_m9": b"consilo secagg M9\n" + h("s9", t3, 0, b"all shares"),
    }
    assert labelled_hash("label", b"part", 7, b"") == h("label", b"part", 7, b"")
    want = {name: value for name, value in VECTORS["transcript"].items() if name != "how"}
    assert {name: value.hex() for name, value in product.items()} == want
    assert {name: value.hex() for name, value in by_hand.items()} == want
