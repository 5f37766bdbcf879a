"""The Merkle log against the vectors of Certificate Transparency, a naive tree, and forgers; its signed statements."""

from __future__ import annotations

import hashlib
import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ledger_fixture import SelfSigner

from privacy.errors import CheckFailed, ConsiloError
from privacy.statements import make, seal
from privacy.transparency import (
    CHECKPOINT,
    EMPTY,
    WITNESS,
    Entry,
    Frontier,
    Head,
    MerkleTree,
    check_consistency,
    check_inclusion,
    least_witnesses,
    open_checkpoint,
    open_witness,
    sign_checkpoint,
    sign_witness,
)

# The 8-leaf test tree of Certificate Transparency (github.com/google/certificate-transparency, merkle_tree_test.cc).
INPUTS = [bytes.fromhex(text) for text in (
    "", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f")]
ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328"]
PATHS = {  # (index, size)
    (0, 1): [],
    (0, 8): ["96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
             "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
             "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4"],
    (5, 8): ["bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
             "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
             "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7"],
    (2, 3): ["fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125"],
    (1, 5): ["6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
             "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
             "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b"]}
PROOFS = {  # (old size, new size)
    (1, 1): [],
    (1, 8): PATHS[0, 8],
    (6, 8): ["0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a",
             "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
             "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7"],
    (2, 5): ["5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
             "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b"]}
SIZE = 41  # enough for every shape: above and below powers of two, six levels


def leaf(data: bytes) -> bytes:
    return hashlib.sha256(b"\0" + data).digest()


def naive_root(leaves: list[bytes]) -> bytes:
    """RFC 6962, 2.1, word for word."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return leaves[0]
    k = 1
    while 2 * k < len(leaves):
        k *= 2
    return hashlib.sha256(b"\1" + naive_root(leaves[:k]) + naive_root(leaves[k:])).digest()


def made(seed: int, size: int = SIZE) -> list[bytes]:
    return [leaf(b"%d %d" % (seed, i)) for i in range(size)]


TREE, LEAVES = MerkleTree(made(0)), made(0)


# Reference vectors ---------------------------------------------------------------------------------------------------

def test_reference_roots() -> None:
    tree, frontier = MerkleTree(), Frontier()
    assert tree.root(0) == frontier.root == EMPTY
    assert EMPTY.hex() == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    for size, (data, root) in enumerate(zip(INPUTS, ROOTS, strict=True), 1):
        tree.append(leaf(data))
        frontier.append(leaf(data))
        assert (tree.root(size).hex(), frontier.root.hex(), frontier.size) == (root, root, size)
    assert [tree.root(size).hex() for size in range(1, 9)] == ROOTS, "an older root stays what it was"


def test_reference_proofs() -> None:
    tree = MerkleTree(map(leaf, INPUTS))
    roots = [EMPTY, *map(bytes.fromhex, ROOTS)]
    for (index, size), path in PATHS.items():
        found = tree.inclusion(index, size)
        assert [part.hex() for part in found] == path
        assert check_inclusion(leaf(INPUTS[index]), index, size, found, roots[size])
    for (old, new), proof in PROOFS.items():
        found = tree.consistency(old, new)
        assert [part.hex() for part in found] == proof
        assert check_consistency(old, roots[old], new, roots[new], found)


def test_entry_is_a_line_and_its_leaf_is_not_a_node() -> None:
    entry = Entry("ab" * 16, "cd" * 32)
    assert entry.line() == "ab" * 16 + " " + "cd" * 32
    assert entry.leaf == hashlib.sha256(b"\0" + entry.line().encode()).digest()
    assert entry.leaf != hashlib.sha256(b"\1" + entry.line().encode()).digest()


# All sizes -----------------------------------------------------------------------------------------------------------

def test_roots_of_all_sizes_three_ways() -> None:
    frontier = Frontier()
    for size in range(SIZE + 1):
        assert TREE.root(size) == frontier.root == naive_root(LEAVES[:size])
        assert (len(frontier.peaks), frontier.holds_together()) == (size.bit_count(), True)
        if size < SIZE:
            frontier.append(LEAVES[size])
    assert len(TREE) == SIZE


def test_a_frontier_goes_on_from_any_size() -> None:
    for size in range(SIZE):
        first = Frontier()
        for each in LEAVES[:size]:
            first.append(each)
        second = Frontier(first.size, list(first.peaks))
        for each in LEAVES[size:]:
            second.append(each)
        assert second.root == TREE.root(SIZE)


@pytest.mark.parametrize(("size", "peaks"), [
    (0, [b"x" * 32]), (1, []), (3, [b"x" * 32]), (2, [b"x" * 32] * 2), (1, [b"x" * 31]), (-1, [b"x" * 32])])
def test_frontier_that_cannot_be(size: int, peaks: list[bytes]) -> None:
    assert not Frontier(size, peaks).holds_together()


def test_all_inclusion_proofs_hold_for_their_leaf_alone() -> None:
    for size in range(1, SIZE + 1):
        root = TREE.root(size)
        for index in range(size):
            path = TREE.inclusion(index, size)
            assert check_inclusion(LEAVES[index], index, size, path, root)
            assert [i for i in range(-1, size + 2) if check_inclusion(LEAVES[index], i, size, path, root)] == [index]
            assert not check_inclusion(LEAVES[index - 1], index, size, path, root) or size == 1


def test_all_consistency_proofs_hold_between_their_sizes_alone() -> None:
    roots = [TREE.root(size) for size in range(SIZE + 1)]
    for old, new in itertools.combinations_with_replacement(range(SIZE + 1), 2):
        proof = TREE.consistency(old, new)
        assert check_consistency(old, roots[old], new, roots[new], proof)
        assert not check_consistency(new, roots[new], old, roots[old], proof) or old == new
        for other in (old - 1, old + 1):
            if 0 < other < new:
                assert not check_consistency(other, roots[other], new, roots[new], proof)
        for other in (new - 1, new + 1):
            if 0 < old < other <= SIZE:
                assert not check_consistency(old, roots[old], other, roots[other], proof)


def test_sizes_that_are_nothing() -> None:
    root = TREE.root(1)
    assert not check_inclusion(LEAVES[0], 0, 0, [], LEAVES[0])
    assert not check_inclusion(LEAVES[0], -1, 1, [], root)
    assert not check_inclusion(LEAVES[0], 1, 1, [], root)
    assert not check_consistency(-1, root, 1, root, [])
    assert not check_consistency(-1, root, -1, root, [])
    assert not check_consistency(2, TREE.root(2), 1, root, [])
    assert not check_consistency(0, EMPTY, -1, root, [])
    assert not check_consistency(3, root, 1, root, [root]), "it would go on with fewer entries"
    assert not check_consistency(-1, root, 1, root, [root])
    for size in (16, 17, 2**40):
        assert not check_consistency(1, root, size, TREE.root(8), TREE.consistency(1, 8)), "the proof ends below the root"
    assert not check_consistency(0, EMPTY, 4, TREE.root(4), [root]), "nothing needs no proof"
    assert not check_consistency(0, root, 4, TREE.root(4), []), "the root of nothing is known"
    assert not check_consistency(0, EMPTY, 0, root, [])
    assert not check_consistency(3, TREE.root(3), 3, TREE.root(3), [root])
    assert not check_consistency(3, TREE.root(3), 3, TREE.root(4), [])
    assert not check_consistency(2, TREE.root(2), 4, TREE.root(2), []), "a power of two that only seems to have grown"


def test_a_proof_that_goes_on_above_the_root() -> None:
    """The hashes beyond the root must not be taken, or any later root could be made up."""
    extra = leaf(b"extra")
    grown = hashlib.sha256(b"\1" + TREE.root(8) + extra).digest()
    assert not check_inclusion(LEAVES[3], 3, 8, [*TREE.inclusion(3, 8), extra], grown)
    grown = hashlib.sha256(b"\1" + extra + TREE.root(8)).digest()
    assert not check_inclusion(LEAVES[3], 3, 8, [*TREE.inclusion(3, 8), extra], grown)
    first = hashlib.sha256(b"\1" + extra + TREE.root(7)).digest()
    assert not check_consistency(7, first, 8, grown, [*TREE.consistency(7, 8), extra])


sizes = st.integers(1, SIZE)
CHANGES = ("flip", "drop", "add", "double", "swap", "reverse", "root", "other root")


def _changed(draw: Any, proof: list[bytes], root: bytes) -> tuple[list[bytes], bytes]:
    """One change to a proof or to its root; the same again if it has no place to change."""
    what = draw(st.sampled_from(CHANGES))
    at = draw(st.integers(0, max(0, len(proof) - 1)))
    bit = draw(st.integers(0, 255))
    flipped = lambda h: bytes(b ^ (1 << bit % 8 if i == bit // 8 else 0) for i, b in enumerate(h))  # noqa: E731
    match what:
        case "flip" if proof:
            return [*proof[:at], flipped(proof[at]), *proof[at + 1:]], root
        case "drop" if proof:
            return [*proof[:at], *proof[at + 1:]], root
        case "add":
            return [*proof[:at], draw(st.sampled_from([root, *proof, *LEAVES])), *proof[at:]], root
        case "double" if proof:
            return [*proof[:at], proof[at], *proof[at:]], root
        case "swap" if proof:
            return [proof[at], *proof[1:at], proof[0], *proof[at + 1:]] if at else proof, root
        case "reverse":
            return proof[::-1], root
        case "root":
            return proof, flipped(root)
        case _:
            return proof, TREE.root(draw(sizes))


@settings(max_examples=1500, derandomize=True, deadline=None)
@given(st.data())
def test_changed_inclusion_proof_fails(data: st.DataObject) -> None:
    size = data.draw(sizes)
    index = data.draw(st.integers(0, size - 1))
    path, root = TREE.inclusion(index, size), TREE.root(size)
    changed = _changed(data.draw, path, root)
    assert check_inclusion(LEAVES[index], index, size, *changed) == (changed == (path, root))


@settings(max_examples=1500, derandomize=True, deadline=None)
@given(st.data())
def test_changed_consistency_proof_fails(data: st.DataObject) -> None:
    new = data.draw(sizes)
    old = data.draw(st.integers(1, new))
    proof, root = TREE.consistency(old, new), TREE.root(new)
    changed, changed_root = _changed(data.draw, proof, root)
    same = (changed, changed_root) == (proof, root)
    assert check_consistency(old, TREE.root(old), new, changed_root, changed) == same
    old_changed, old_root = _changed(data.draw, proof, TREE.root(old))
    same = (old_changed, old_root) == (proof, TREE.root(old))
    assert check_consistency(old, old_root, new, root, old_changed) == same


@settings(max_examples=400, derandomize=True, deadline=None)
@given(old=sizes, more=st.integers(0, 9), at=st.integers(0, SIZE), seed=st.integers(1, 5))
def test_a_fork_has_no_consistency_proof(old: int, more: int, at: int, seed: int) -> None:
    """Two logs that differ before `old` entries: no proof that either of them makes is taken for the other."""
    at, new = at % old, old + more
    fork = MerkleTree([*LEAVES[:at], *made(seed, new - at)])
    tree = MerkleTree([*LEAVES, *made(9, 9)])
    for proof in (fork.consistency(old, new), tree.consistency(old, new), []):
        assert not check_consistency(old, tree.root(old), new, fork.root(new), proof)
        assert not check_consistency(old, fork.root(old), new, tree.root(new), proof)


def test_a_fork_has_no_consistency_proof_made_of_any_hashes_of_both() -> None:
    tree, fork = MerkleTree(LEAVES[:5]), MerkleTree([*LEAVES[:1], *made(3, 4)])
    spans = [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (0, 2), (2, 4), (0, 4), (0, 3), (0, 5)]
    pool = {t._hash(*span) for t in (tree, fork) for span in spans}
    for old, new in itertools.combinations(range(2, 6), 2):
        for length in range(4):
            for proof in itertools.product(pool, repeat=length):
                assert not check_consistency(old, tree.root(old), new, fork.root(new), proof)


def test_proofs_of_a_long_log_are_short_and_cost_few_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each entry costs a logarithm, not the whole log again."""
    import privacy.transparency as module

    calls, real = [0], module._node
    monkeypatch.setattr(module, "_node", lambda a, b: (calls.__setitem__(0, calls[0] + 1), real(a, b))[1])
    tree, leaves = MerkleTree(), made(0, 2000)
    for size, each in enumerate(leaves, 1):
        tree.append(each)
        root = tree.root(size)
        assert check_inclusion(each, size - 1, size, tree.inclusion(size - 1, size), root)
        tree.consistency(max(0, size - 3), size)
    assert calls[0] < 2000 * 150


# How many witnesses are enough ---------------------------------------------------------------------------------------

def test_two_sets_of_witnesses_share_an_honest_one() -> None:
    for n in range(1, 101):
        for n_c in range(1, n):
            least = least_witnesses(n, n_c)
            assert least <= n
            assert 2 * least - n > n_c or least == n, "they share more sites than lie, or are all sites"
            assert 2 * (least - 1) - n <= n_c, "and no fewer would do"
    assert [least_witnesses(n) for n in range(1, 7)] == [1, 2, 3, 3, 4, 4]


# Signed statements ---------------------------------------------------------------------------------------------------

HUB, SITE = SelfSigner(b"h" * 32), SelfSigner(b"s" * 32)
HUBS, SITES = {HUB.fingerprint: HUB.certificate}, {SITE.fingerprint: SITE.certificate}
HEAD = Head(log="hub", size=3, root="ab" * 32)
SAID = HEAD.model_dump()


def code(act: Any, *args: Any) -> str:
    with pytest.raises(ConsiloError) as caught:
        act(*args)
    return caught.value.code


def test_signed_heads_are_what_was_signed() -> None:
    assert open_checkpoint(sign_checkpoint(HUB, HEAD), HUBS) == HEAD
    seen = open_witness(sign_witness(SITE, "clinic-a", HEAD), SITES)
    assert seen.model_dump() == {"site": "clinic-a", **SAID}


def test_a_witness_is_no_checkpoint_and_the_other_way_round() -> None:
    assert code(open_checkpoint, sign_witness(SITE, "clinic-a", HEAD), SITES) == "log.form"
    assert code(open_witness, sign_checkpoint(HUB, HEAD), HUBS) == "log.form"


def test_signed_by_another_role() -> None:
    assert code(open_checkpoint, sign_checkpoint(SITE, HEAD), HUBS) == "statement.key"
    assert code(open_witness, sign_witness(HUB, "clinic-a", HEAD), SITES) == "statement.key"


@pytest.mark.parametrize(("kind", "subject", "said", "expected"), [
    ("urn:consilo:round:2", [("root", "ab" * 32)], SAID, "log.form"),
    ("urn:consilo:checkpoint:2", [("root", "ab" * 32)], SAID, "log.form"),
    (CHECKPOINT, [("root", "cd" * 32)], SAID, "log.form"),
    (CHECKPOINT, [("head", "ab" * 32)], SAID, "log.form"),
    (CHECKPOINT, [], SAID, "log.form"),
    (CHECKPOINT, [("root", "ab" * 32)] * 2, SAID, "log.form"),
    (CHECKPOINT, [("root", "ab" * 32)], {}, "log.form"),
    (CHECKPOINT, [("root", "ab" * 32)], {**SAID, "site": "clinic-a"}, "config.unknown_key"),
    (CHECKPOINT, [("root", "ab" * 32)], {**SAID, "size": -1}, "config.invalid"),
    (CHECKPOINT, [("root", "ab" * 32)], {**SAID, "size": 2**53}, "json.not_canonical"),
    (CHECKPOINT, [("root", "ab" * 32)], {**SAID, "size": True}, "config.invalid"),
    (CHECKPOINT, [("root", "ab" * 32)], {**SAID, "size": "3"}, "config.invalid"),
    (CHECKPOINT, [("root", "ab" * 32)], {**SAID, "log": "Hub\n"}, "config.invalid")])
def test_signed_head_of_another_form(kind: str, subject: Any, said: dict[str, Any], expected: str) -> None:
    assert code(lambda: open_checkpoint(make(HUB, kind, subject, said), HUBS)) == expected


def test_witness_of_another_form() -> None:
    for said, expected in ((SAID, "config.invalid"), ({**SAID, "site": "../x"}, "config.invalid")):
        assert code(open_witness, make(SITE, WITNESS, [("root", "ab" * 32)], said), SITES) == expected


def test_any_changed_byte_of_a_signed_head() -> None:
    data = sign_checkpoint(HUB, HEAD)
    for at in range(len(data)):
        with pytest.raises(CheckFailed, match=r"statement\."):
            open_checkpoint(data[:at] + bytes([data[at] ^ 1]) + data[at + 1:], HUBS)
    assert code(open_checkpoint, seal(HUB, "text/plain", b"{}"), HUBS) == "statement.type"
