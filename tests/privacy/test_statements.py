"""A statement's signature covers every byte of it, and is verified before anything is read."""

import json
from base64 import b64decode, b64encode

import pytest
from cryptography import x509
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy import ca, canonical, statements
from privacy.errors import CheckFailed, UsageError
from privacy.identity import FileSigner, Role, create_request
from privacy.statements import PAYLOAD_TYPE, STATEMENT_TYPE, make, open_envelope, pae, seal

SHA = "ab" * 32
TYPE = "urn:consilo:acceptance:1"
CANARY = "CANARY-77e0a1"


@pytest.fixture(scope="module")
def signers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ca")
    ca.init(folder / "ca", "Consortium")

    def signer(name):
        issued = ca.issue(folder / "ca", create_request(folder / name, name, name), Role.SITE)
        return FileSigner(folder / name / "sign.key", issued.folder / "sign.pem")

    return signer("alice"), signer("bob")


@pytest.fixture(scope="module")
def alice(signers):
    return signers[0]


@pytest.fixture(scope="module")
def known(alice) -> dict[str, x509.Certificate]:
    return {alice.fingerprint: alice.certificate}


def code(call, *args) -> str:
    with pytest.raises(CheckFailed) as caught:
        call(*args)
    assert CANARY not in str(caught.value) and caught.value.exit_code == 1
    return caught.value.code


def signed(alice, body) -> bytes:
    """An envelope with a good signature over any payload."""
    return seal(alice, PAYLOAD_TYPE, body if isinstance(body, bytes) else canonical.canonical(body))


def body(**changes):
    return {"_type": STATEMENT_TYPE, "predicateType": TYPE, "predicate": {"note": CANARY},
            "subject": [{"name": "contract", "digest": {"sha256": SHA}}], **changes}


def test_round_trip(alice, known):
    predicate = {"site": "alice", "epsilon": "1.554", "records": 3, "sites": ["a", "b"], "done": True, "reason": None}
    data = make(alice, TYPE, [("contract", SHA)], predicate)
    statement = open_envelope(data, known)
    assert statement == statements.Statement(TYPE, (("contract", SHA),), predicate, alice.fingerprint)
    assert data == make(alice, TYPE, [("contract", SHA)], dict(reversed(predicate.items())))


def test_pae_is_that_of_the_dsse_specification():
    assert pae("http://example.com/HelloWorld", b"hello world") == \
        b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    assert pae("é", b"") == b"DSSEv1 2 \xc3\xa9 0 "


def test_format_is_that_of_the_documentation(alice):
    envelope = json.loads(make(alice, TYPE, [("contract", SHA)], {"site": "alice"}))
    assert envelope["payloadType"] == "application/vnd.in-toto+json"
    assert json.loads(b64decode(envelope["payload"])) == {
        "_type": "https://in-toto.io/Statement/v1", "predicateType": TYPE, "predicate": {"site": "alice"},
        "subject": [{"name": "contract", "digest": {"sha256": SHA}}]}
    assert [s["keyid"] for s in envelope["signatures"]] == [alice.fingerprint]


@pytest.mark.case(29)
def test_attack_every_flipped_bit_fails(alice, known):
    data = make(alice, TYPE, [("c", SHA)], {"note": CANARY})
    for at in range(len(data)):
        for bit in range(8):
            code(open_envelope, data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1:], known)


def test_attack_every_dropped_or_inserted_byte_fails(alice, known):
    data = make(alice, TYPE, [("c", SHA)], {})
    for at in range(len(data)):
        for insert in (b" ", b"\n", b"=", b"A", b'"', data[at:at + 1]):
            code(open_envelope, data[:at] + insert + data[at:], known)
        code(open_envelope, data[:at] + data[at + 1:], known)
        code(open_envelope, data[:at], known)
    code(open_envelope, data + b"\n", known)


@given(st.binary(max_size=200) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["payload", "payloadType", "signatures", "keyid", "sig", "x"]), inner, max_size=3),
    max_leaves=8).map(lambda value: json.dumps(value).encode()))
@settings(max_examples=150, deadline=None)
def test_junk_is_refused_with_a_code(known, data):
    assert code(open_envelope, data, known).startswith("statement.")


@pytest.mark.case(29)
def test_attack_wrong_payload_type(alice, known):
    good = body()
    data = seal(alice, "application/vnd.consilo.other+json", canonical.canonical(good))
    assert code(open_envelope, data, known) == "statement.type"
    relabelled = canonical.canonical({**json.loads(data), "payloadType": PAYLOAD_TYPE})
    assert code(open_envelope, relabelled, known) == "statement.signature"


@pytest.mark.case(29)
def test_attack_wrong_key_id(signers, known):
    alice, bob = signers
    data = signed(bob, body())
    assert code(open_envelope, data, known) == "statement.key"
    envelope = json.loads(data)
    envelope["signatures"][0]["keyid"] = alice.fingerprint
    assert code(open_envelope, canonical.canonical(envelope), known) == "statement.signature"
    envelope["signatures"][0]["keyid"] = [alice.fingerprint]
    assert code(open_envelope, canonical.canonical(envelope), known) == "statement.key"


def test_zero_or_several_signatures(signers, known):
    alice, bob = signers
    envelope = json.loads(signed(alice, body()))
    own, other = envelope["signatures"], json.loads(signed(bob, body()))["signatures"]
    for signatures in ([], own + other, other + own, own * 2, {}, None):
        data = canonical.canonical({**envelope, "signatures": signatures})
        assert code(open_envelope, data, known) == "statement.signatures"


def test_attack_signature_over_the_bare_payload(alice, known):
    """Without the encoding that names the type, a signature made for another protocol would fit."""
    envelope = json.loads(signed(alice, body()))
    bare = alice.sign(b64decode(envelope["payload"]))
    envelope["signatures"][0]["sig"] = b64encode(bare).decode()
    assert code(open_envelope, canonical.canonical(envelope), known) == "statement.signature"


def test_case_29_duplicated_key_in_the_payload(alice, known):
    text = canonical.canonical(body())
    twice = text.replace(b'"predicateType":', b'"predicate":{},"predicateType":')
    assert twice != text and json.loads(twice)["predicate"] == {}
    assert code(open_envelope, signed(alice, twice), known) == "statement.payload"


def test_case_29_duplicated_key_in_the_envelope(alice, known):
    data = signed(alice, body())
    twice = data.replace(b'{"payload":', b'{"payload":"eHg=","payload":')
    assert code(open_envelope, twice, known) == "statement.envelope"


def test_payload_that_is_not_canonical(alice, known):
    text = canonical.canonical(body())
    for payload in (text + b"\n", b" " + text, json.dumps(body()).encode(), b"\xff", b"{", b"NaN",
                    text.replace(CANARY.encode(), rb"\u0043ANARY-77e0a1"), b"[" * 100 + b"]" * 100):
        assert code(open_envelope, signed(alice, payload), known) == "statement.payload"


@pytest.mark.parametrize("predicate", [{"epsilon": 1.5}, {"a": [{"b": 0.1}]}, {"a": 1e300}])
def test_floats_are_refused_by_both_sides(alice, known, predicate):
    assert code(make, alice, TYPE, [("c", SHA)], predicate) == "statement.number"
    assert code(open_envelope, signed(alice, body(predicate=predicate)), known) == "statement.number"


@pytest.mark.parametrize("change", [
    {"_type": "https://in-toto.io/Statement/v0.1"}, {"predicate": []}, {"predicateType": 1}, {"subject": {}},
    {"subject": [{"name": "c"}]}, {"subject": [{"name": "c", "digest": {"sha256": SHA.upper()}}]},
    {"subject": [{"name": "c", "digest": {"sha256": SHA, "md5": ""}}]}, {"subject": [{"name": 1, "digest": {}}]},
    {"subject": [{"name": "c", "digest": {"sha256": SHA + "\n"}}]}, {"subject": [7]}, {"more": 1}])
def test_payload_that_is_no_statement(alice, known, change):
    assert code(open_envelope, signed(alice, body(**change)), known) == "statement.form"


def test_payload_that_is_no_object(alice, known):
    for value in ([], "text", 7, None):
        assert code(open_envelope, signed(alice, value), known) == "statement.form"


def test_make_refuses_what_open_would(alice):
    assert code(make, alice, TYPE, [("c", "")], {}) == "statement.form"
    with pytest.raises(UsageError):
        make(alice, TYPE, [("c", SHA)], {"big": 2**60})


@pytest.mark.case(29)
def test_signature_is_verified_before_the_payload_is_parsed(alice, known, monkeypatch):
    seen = []
    verify, parse = statements.verify_signature, statements.parse
    monkeypatch.setattr(statements, "verify_signature", lambda *a: (seen.append("verify"), verify(*a))[1])
    monkeypatch.setattr(statements, "parse", lambda d: (seen.append("parse"), parse(d))[1])
    data = signed(alice, body())
    open_envelope(data, known)
    assert seen == ["parse", "verify", "parse"]
    seen.clear()
    envelope = json.loads(data)
    envelope["payload"] = b64encode(b"[" * 1000).decode()
    assert code(open_envelope, canonical.canonical(envelope), known) == "statement.signature"
    assert seen == ["parse", "verify"]


@pytest.mark.parametrize("missing", ["verify_signature", "_base64"])
def test_planted_missing_check_is_seen(alice, known, monkeypatch, missing):
    """Without the signature check an edit passes; without strict base64 one statement has several encodings."""
    envelope = json.loads(make(alice, TYPE, [("c", SHA)], {"note": "xx"}))
    if missing == "verify_signature":
        edited = b64decode(envelope["payload"]).replace(b'"xx"', b'"yy"')
        envelope["payload"] = b64encode(edited).decode()
        monkeypatch.setattr(statements, "verify_signature", lambda *_: None)
    else:
        signature = envelope["signatures"][0]["sig"]
        assert signature.endswith("==")
        last = chr(ord(signature[-3]) + 1)
        envelope["signatures"][0]["sig"] = signature[:-3] + last + "=="
        assert code(open_envelope, canonical.canonical(envelope), known) == "statement.envelope"
        monkeypatch.setattr(statements, "_base64", lambda text: b64decode(text))
    open_envelope(canonical.canonical(envelope), known)
