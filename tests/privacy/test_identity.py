"""Keys stay private; a certificate is accepted only through every check of its chain."""

import shutil
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from privacy import ca, identity
from privacy.errors import ConsiloError, Refused, UsageError
from privacy.identity import FileSigner, Role, create_request, fingerprint, load_certificate, load_key
from privacy.trust import TrustStore

NOW = datetime.now(UTC) + timedelta(hours=1)  # of collection: what the CA makes later must be valid by then
PEM = serialization.Encoding.PEM
P = 2**255 - 19


class Consortium:
    """A CA with one identity per role, and the means to forge with its keys."""

    def __init__(self, folder: Path, organisation: str = "Consortium") -> None:
        self.folder, self.ca = folder, folder / "ca"
        ca.init(self.ca, organisation)
        self.files = {role: ca.issue(self.ca, create_request(folder / role, f"the-{role}", f"Org {role}"), role,
                                     hosts=["localhost"] if role is Role.COORDINATOR else []) for role in Role}

    def trust(self) -> TrustStore:
        return TrustStore.load(self.ca)

    def cert(self, role: Role, file: str = "sign.pem") -> x509.Certificate:
        return load_certificate((self.files[role].folder / file).read_bytes())

    def pem(self, name: str) -> bytes:
        return (self.ca / name).read_bytes()

    def forge(self, issuer: str = "issuing-site", public=None, *, ca_flag=False, path_length=None, signs=True,
              cert_sign=False, crl_sign=None, ekus=(), extra=(), days=30, names=None,
              issuer_key=None) -> x509.Certificate:
        """A certificate that the CA's key signs although `ca.issue` never would."""
        public = public or ed25519.Ed25519PrivateKey.generate().public_key()
        issuer_cert = load_certificate(self.pem(f"{issuer}.pem"))
        builder = (x509.CertificateBuilder().subject_name(names or identity.subject("the-site", "Org site"))
                   .issuer_name(issuer_cert.subject).public_key(public).serial_number(x509.random_serial_number())
                   .not_valid_before(NOW - timedelta(days=60)).not_valid_after(NOW + timedelta(days=days))
                   .add_extension(x509.BasicConstraints(ca_flag, path_length), True)
                   .add_extension(x509.KeyUsage(signs, False, False, False, False, cert_sign,
                                                cert_sign if crl_sign is None else crl_sign, False, False), True))
        for extension in ([x509.ExtendedKeyUsage(ekus)] if ekus else []):
            builder = builder.add_extension(extension, False)
        for extension in extra:
            builder = builder.add_extension(extension, True)
        return builder.sign(issuer_key or load_key(self.ca / "keys" / f"{issuer}.key"), hashes.SHA256())


@pytest.fixture(scope="module")
def consortium(tmp_path_factory):
    return Consortium(tmp_path_factory.mktemp("consortium"))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Another consortium that gave itself the same names throughout."""
    return Consortium(tmp_path_factory.mktemp("other"))


def code(error: type[ConsiloError], call, *args, **kwargs) -> str:
    with pytest.raises(error) as caught:
        call(*args, **kwargs)
    return caught.value.code


def refusal(trust: TrustStore, cert, role=Role.SITE, usage="signing", at=NOW) -> str:
    return code(Refused, trust.check, cert, role, usage=usage, at=at)


def p256():
    return ec.generate_private_key(ec.SECP256R1())


# --- keys ---------------------------------------------------------------------------------------------------------

def test_keys_are_made_0600_and_never_leave(tmp_path):
    request = create_request(tmp_path / "site", "hospital-a", "Hospital A")
    for name in ("tls.key", "sign.key"):
        key = tmp_path / "site" / name
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
        secret = key.read_text().splitlines()[1]
        assert secret.encode() not in request
    assert (tmp_path / "site" / "request.json").read_bytes() == request
    assert stat.S_IMODE((tmp_path / "site").stat().st_mode) == 0o700


def test_keys_are_never_overwritten(tmp_path):
    create_request(tmp_path, "hospital-a", "Hospital A")
    before = (tmp_path / "sign.key").read_bytes()
    assert code(Refused, create_request, tmp_path, "hospital-a", "Hospital A") == "key.exists"
    assert (tmp_path / "sign.key").read_bytes() == before


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o610])
def test_case_30_key_open_to_others_is_refused(consortium, tmp_path, mode):
    key = tmp_path / "sign.key"
    shutil.copy(consortium.folder / "site" / "sign.key", key)
    cert = consortium.files[Role.SITE].folder / "sign.pem"
    key.chmod(0o600)
    assert FileSigner(key, cert).fingerprint == consortium.files[Role.SITE].sign_fingerprint
    key.chmod(mode)
    assert code(Refused, FileSigner, key, cert) == "key.permissions"


def test_signer_needs_the_key_of_its_certificate(consortium):
    site, engineer = consortium.folder / "site", consortium.folder / "engineer"
    issued = consortium.files[Role.SITE].folder
    assert code(Refused, FileSigner, engineer / "sign.key", issued / "sign.pem") == "identity.key_mismatch"
    assert code(Refused, FileSigner, site / "tls.key", issued / "tls.pem") == "identity.key_mismatch"


def test_signature_round_trip_and_its_refusals(consortium):
    signer = FileSigner(consortium.folder / "site" / "sign.key", consortium.files[Role.SITE].folder / "sign.pem")
    signature = signer.sign(b"data")
    identity.verify_signature(signer.certificate, signature, b"data")
    for cert, sig, data in ((signer.certificate, signature, b"date"), (signer.certificate, signature[:-1], b"data"),
                            (signer.certificate, b"", b"data"), (consortium.cert(Role.AUDITOR), signature, b"data"),
                            (consortium.cert(Role.SITE, "tls.pem"), signature, b"data")):
        assert code(Refused, identity.verify_signature, cert, sig, data) == "identity.signature"


def test_damaged_key_file_is_refused_without_quoting_it(tmp_path):
    canary = "CANARY-4f1d9e"
    for text in (canary, f"-----BEGIN PRIVATE KEY-----\n{canary}\n-----END PRIVATE KEY-----\n"):
        key = tmp_path / "sign.key"
        key.unlink(missing_ok=True)
        identity.write_private(key, text.encode())
        with pytest.raises(UsageError) as caught:
            load_key(key)
        assert caught.value.code == "identity.malformed"
        assert canary not in str(caught.value) and caught.value.__suppress_context__


@pytest.mark.parametrize("name", ["", "Hospital", "-a", "../a", "a/b", "a b", "a\n", "a" * 64, "ä"])
def test_names_that_could_mislead_are_refused(tmp_path, name):
    assert code(UsageError, create_request, tmp_path / "x", name, "Org") == "identity.name"
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("organisation", ["", "  ", "a" * 65, "A\nroot", "A\x1b[31m"])
def test_organisations_that_could_mislead_are_refused(tmp_path, organisation):
    assert code(UsageError, create_request, tmp_path, "a", organisation) == "identity.name"


# --- weak keys ----------------------------------------------------------------------------------------------------

Y8 = int.from_bytes(bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"), "little")
WEAK = [y | sign << 255 for y in (0, 1, P - 1, Y8, P - Y8, P, P + 1, P + 2, 2**255 - 1) for sign in (0, 1)]


def test_y_of_order_8_is_a_root_of_its_equation():
    d = -121665 * pow(121666, -1, P) % P
    x2 = (Y8**2 - 1) * pow(d * Y8**2 + 1, -1, P) % P
    # 2Q has y = (y^2 + x^2) / (2 + x^2 - y^2), and a point of order 4 has y = 0
    assert (Y8**2 + x2) % P == 0


@pytest.mark.parametrize("encoded", WEAK, ids=lambda e: f"{e:064x}"[:8] + f"..{e & 255:02x}")
def test_attack_weak_ed25519_key(consortium, encoded):
    key = ed25519.Ed25519PublicKey.from_public_bytes(encoded.to_bytes(32, "little"))
    cert = consortium.forge(public=key)
    assert refusal(consortium.trust(), cert) == "identity.weak_key"
    assert code(Refused, identity.verify_signature, cert, bytes(64), b"any") == "identity.weak_key"


def test_planted_without_the_weak_key_check_one_signature_fits_all_messages(consortium, monkeypatch):
    identity_point = (1).to_bytes(32, "little")
    cert = consortium.forge(public=ed25519.Ed25519PublicKey.from_public_bytes(identity_point))
    forged = identity_point + bytes(32)  # R = identity, S = 0: valid under A = identity whatever the message
    for message in (b"yes", b"no"):
        assert code(Refused, identity.verify_signature, cert, forged, message) == "identity.weak_key"
    monkeypatch.setattr(identity, "_SMALL_ORDER", set())
    for message in (b"yes", b"no"):
        identity.verify_signature(cert, forged, message)


@pytest.mark.parametrize("public", [ec.generate_private_key(ec.SECP384R1()).public_key()])
def test_other_kinds_of_key_are_refused(consortium, public):
    assert refusal(consortium.trust(), consortium.forge(public=public)) == "identity.weak_key"


# --- chain --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("role", list(Role))
@pytest.mark.parametrize(("usage", "file"), [("tls", "tls.pem"), ("signing", "sign.pem")])
def test_issued_certificates_are_accepted(consortium, role, usage, file):
    cert = consortium.cert(role, file)
    peer = consortium.trust().check(cert, role, usage=usage, at=NOW)
    assert (peer.name, peer.organisation, peer.role) == (f"the-{role}", f"Org {role}", role)
    assert peer.fingerprint == fingerprint(cert) and len(peer.fingerprint) == 64
    assert peer.certificate == cert


def test_attack_wrong_ca_with_the_same_names(consortium, other):
    assert consortium.pem("root.pem") != other.pem("root.pem")
    assert refusal(consortium.trust(), other.cert(Role.SITE)) == "identity.untrusted"


@pytest.mark.case(36)
def test_attack_self_signed(consortium):
    key = p256()
    mine = load_certificate(consortium.pem("issuing-site.pem")).subject
    for names in (mine, identity.subject("the-site", "Org site")):
        cert = consortium.forge(public=key.public_key(), issuer_key=key, names=names)
        assert refusal(consortium.trust(), cert, usage="tls") == "identity.untrusted"


def test_attack_leaf_acts_as_ca(consortium):
    """A site signs a certificate with its own TLS key."""
    leaf, key = consortium.cert(Role.SITE, "tls.pem"), load_key(consortium.folder / "site" / "tls.key")
    cert = (x509.CertificateBuilder().subject_name(identity.subject("evil", "Evil")).issuer_name(leaf.subject)
            .public_key(ed25519.Ed25519PrivateKey.generate().public_key()).serial_number(7)
            .not_valid_before(NOW - timedelta(1)).not_valid_after(NOW + timedelta(1)).sign(key, hashes.SHA256()))
    assert refusal(consortium.trust(), cert) == "identity.untrusted"
    pem = leaf.public_bytes(PEM)
    assert code(Refused, TrustStore, consortium.pem("root.pem"), [pem]) == "identity.untrusted"


@pytest.mark.parametrize("shown", list(Role))
@pytest.mark.parametrize("wanted", list(Role))
@pytest.mark.case(36)
def test_attack_wrong_role(consortium, shown, wanted):
    if shown is not wanted:
        for usage, file in (("tls", "tls.pem"), ("signing", "sign.pem")):
            assert refusal(consortium.trust(), consortium.cert(shown, file), wanted, usage) == "identity.role"


def test_a_listener_trusts_only_the_roles_it_serves(consortium):
    trust = TrustStore(consortium.pem("root.pem"), [consortium.pem("issuing-site.pem")])
    trust.check(consortium.cert(Role.SITE), Role.SITE, usage="signing", at=NOW)
    assert refusal(trust, consortium.cert(Role.ENGINEER), Role.ENGINEER) == "identity.untrusted"


def test_attack_issuing_ca_makes_an_issuing_ca(consortium, other):
    """The sites' CA signs a 'coordinator' CA; only the root may."""
    names = load_certificate(consortium.pem("issuing-coordinator.pem")).subject
    sub = consortium.forge(public=p256().public_key(), ca_flag=True, cert_sign=True, path_length=0, names=names)
    root, site = consortium.pem("root.pem"), consortium.pem("issuing-site.pem")
    for cas in ([site, sub.public_bytes(PEM)], [other.pem("issuing-site.pem")], [site, site]):
        assert code(Refused, TrustStore, root, cas) == "identity.untrusted"


@pytest.mark.parametrize("change", [{"ca_flag": False, "path_length": None}, {"path_length": 1}, {"path_length": None},
                                    {"cert_sign": False}, {"names": "no role"}, {"names": "unknown role"},
                                    {"public": ed25519.Ed25519PrivateKey.generate().public_key()},
                                    {"extra": [x509.InhibitAnyPolicy(0)]}])
def test_issuing_ca_that_the_root_should_not_have_made(consortium, change):
    def unit(role):
        return x509.Name([x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, role)])

    good = {"ca_flag": True, "path_length": 0, "cert_sign": True, "names": unit("site"), "public": p256().public_key()}
    root = consortium.pem("root.pem")
    TrustStore(root, [consortium.forge("root", **good).public_bytes(PEM)])
    if isinstance(change.get("names"), str):
        change = {"names": unit("janitor") if change["names"] == "unknown role" else identity.subject("a", "b")}
    bad = consortium.forge("root", **{**good, **change}).public_bytes(PEM)
    assert code(Refused, TrustStore, root, [bad]) == "identity.untrusted"


def test_root_must_be_a_self_signed_ca(consortium):
    assert code(Refused, TrustStore, consortium.pem("issuing-site.pem"), []) == "identity.untrusted"
    names, key = load_certificate(consortium.pem("root.pem")).subject, p256()
    for is_ca in (True, False):
        own = consortium.forge("root", key.public_key(), ca_flag=is_ca, cert_sign=True, names=names, issuer_key=key)
        if is_ca:
            TrustStore(own.public_bytes(PEM), [])
        else:
            assert code(Refused, TrustStore, own.public_bytes(PEM), []) == "identity.untrusted"
    assert code(UsageError, TrustStore, b"no pem", []) == "identity.malformed"


# --- dates, revocation, usage -------------------------------------------------------------------------------------

@pytest.mark.case(36)
def test_expired_and_not_yet_valid(consortium):
    trust = TrustStore(consortium.pem("root.pem"), [consortium.pem("issuing-site.pem")])
    cert = consortium.cert(Role.SITE)
    for days, ok in ((-1, False), (0, True), (89, True), (91, False)):
        at = NOW + timedelta(days=days)
        if ok:
            trust.check(cert, Role.SITE, usage="signing", at=at)
        else:
            assert refusal(trust, cert, at=at) == "identity.expired"


def test_expired_ca_takes_its_leaves_along(consortium):
    trust = TrustStore(consortium.pem("root.pem"), [consortium.pem("issuing-site.pem")])
    leaf = consortium.forge(days=3650)
    trust.check(leaf, Role.SITE, usage="signing", at=NOW)
    assert refusal(trust, leaf, at=NOW + timedelta(days=2000)) == "identity.expired"


def test_leaf_never_outlives_its_ca(tmp_path):
    ca.init(tmp_path / "ca", "C", days=10)
    issued = ca.issue(tmp_path / "ca", create_request(tmp_path / "a", "a", "A"), Role.SITE, days=365)
    leaf = load_certificate((issued.folder / "sign.pem").read_bytes())
    assert leaf.not_valid_after_utc <= load_certificate((tmp_path / "ca/root.pem").read_bytes()).not_valid_after_utc


@pytest.mark.case(36)
def test_revoked_and_stale_list(tmp_path):
    c = Consortium(tmp_path)
    old = c.trust()
    assert ca.revoke(c.ca, "the-site") == 2
    for usage, file in (("tls", "tls.pem"), ("signing", "sign.pem")):
        cert = c.cert(Role.SITE, file)
        old.check(cert, Role.SITE, usage=usage, at=NOW)
        assert refusal(c.trust(), cert, usage=usage) == "identity.revoked"
        assert refusal(c.trust(), cert, usage=usage, at=NOW + timedelta(days=31)) == "identity.revoked"
    engineer = c.cert(Role.ENGINEER)
    c.trust().check(engineer, Role.ENGINEER, usage="signing", at=NOW)
    late = NOW + timedelta(days=31)
    assert refusal(c.trust(), engineer, Role.ENGINEER, at=late) == "identity.crl_stale"


def test_attack_forged_revocation_list(consortium, other):
    root, site = consortium.pem("root.pem"), consortium.pem("issuing-site.pem")
    for crl in (other.pem("crl-site.pem"), consortium.pem("crl-engineer.pem")):
        assert code(Refused, TrustStore, root, [site], [crl]) == "identity.untrusted"
    lists = [consortium.pem("crl-site.pem")]
    TrustStore(root, [site], lists)
    assert code(Refused, TrustStore, root, [site], lists * 2) == "identity.untrusted"
    assert code(UsageError, TrustStore, root, [site], [b"junk"]) == "identity.malformed"


def test_revocation_list_needs_its_issuers_name_and_right_to_sign_it(consortium):
    key = p256()
    unit = x509.Name([x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, "site")])

    def store(issuer, crl_sign):
        crl = (x509.CertificateRevocationListBuilder().issuer_name(issuer).last_update(NOW)
               .next_update(NOW + timedelta(days=1)).sign(key, hashes.SHA256()))
        mine = consortium.forge("root", key.public_key(), ca_flag=True, path_length=0, cert_sign=True,
                                crl_sign=crl_sign, names=unit)
        return TrustStore(consortium.pem("root.pem"), [mine.public_bytes(PEM)], [crl.public_bytes(PEM)])

    store(unit, True)
    assert code(Refused, store, unit, False) == "identity.untrusted"
    assert code(Refused, store, identity.subject("a", "b"), True) == "identity.untrusted"


@pytest.mark.parametrize("role", [Role.SITE, Role.COORDINATOR])
def test_signing_and_tls_certificates_are_not_interchangeable(consortium, role):
    assert refusal(consortium.trust(), consortium.cert(role, "tls.pem"), role, "signing") == "identity.usage"
    assert refusal(consortium.trust(), consortium.cert(role, "sign.pem"), role, "tls") == "identity.usage"


CLIENT, SERVER = ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH


@pytest.mark.parametrize("wrong", [
    {"ekus": [SERVER]}, {"ekus": [CLIENT, SERVER]}, {"ekus": []}, {"ekus": [CLIENT], "ca_flag": True},
    {"ekus": [CLIENT], "signs": False}, {"ekus": [CLIENT], "cert_sign": True},
    {"ekus": [CLIENT], "extra": [x509.InhibitAnyPolicy(0)]}])
def test_leaf_made_for_something_else(consortium, wrong):
    key = p256().public_key()
    good = consortium.forge(public=key, ekus=[CLIENT])
    consortium.trust().check(good, Role.SITE, usage="tls", at=NOW)
    assert refusal(consortium.trust(), consortium.forge(public=key, **wrong), usage="tls") == "identity.usage"


def test_signing_certificate_is_ed25519_and_nothing_else(consortium):
    for bad in (consortium.forge(ekus=[CLIENT]), consortium.forge(public=p256().public_key())):
        assert refusal(consortium.trust(), bad, usage="signing") == "identity.usage"


@pytest.mark.parametrize("more", [(NameOID.COMMON_NAME, "the-engineer"), (NameOID.ORGANIZATION_NAME, "Other"),
                                  (NameOID.ORGANIZATIONAL_UNIT_NAME, "coordinator")])
def test_leaf_with_an_ambiguous_subject(consortium, more):
    names = x509.Name([*identity.subject("the-site", "Org site"), x509.NameAttribute(*more)])
    assert refusal(consortium.trust(), consortium.forge(names=names)) == "identity.untrusted"


def test_changed_certificate_is_untrusted(consortium):
    der = bytearray(consortium.cert(Role.SITE).public_bytes(serialization.Encoding.DER))
    at = der.index(b"the-site")
    der[at] ^= 1
    assert refusal(consortium.trust(), x509.load_der_x509_certificate(bytes(der))) == "identity.untrusted"


@pytest.mark.parametrize(("link", "expected"), [("_issued_by", "identity.untrusted"), ("_is_ca", "identity.untrusted")])
def test_planted_missing_chain_check_is_seen(consortium, other, monkeypatch, link, expected):
    """With one link's check removed, the attacks above get in: they fail because of that check alone."""
    def attack():
        if link == "_issued_by":
            consortium.trust().check(other.cert(Role.SITE), Role.SITE, usage="signing", at=NOW)
        else:
            unit = x509.Name([x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, "site")])
            TrustStore(consortium.pem("root.pem"), [consortium.forge("root", names=unit).public_bytes(PEM)])

    assert code(Refused, attack) == expected
    monkeypatch.setattr(f"privacy.trust.{link}", lambda *_args, **_kwargs: True)
    attack()
