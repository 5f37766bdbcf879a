"""Ephemeral hybrid keys: HPKE (RFC 9180) in base mode, single-shot, with the KEM ML-KEM-768 + X25519.

Every failure of the library (a low-order X25519 point, a tampered ciphertext, a bad length) becomes the same Aborted.
"""

from __future__ import annotations

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from privacy.errors import Aborted

_SUITE = hpke.Suite(hpke.KEM.MLKEM768_X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.CHACHA20_POLY1305)
MLKEM_PUBLIC = 1184
OVERHEAD = 1088 + 32 + 16  # of a ciphertext: both encapsulations and the tag


class HybridKey:
    """One round's key pair; `public` is 1216 bytes, ML-KEM-768 first."""

    def __init__(self) -> None:
        mlkem, x25519 = MLKEM768PrivateKey.generate(), X25519PrivateKey.generate()
        self._private = hpke.MLKEM768X25519PrivateKey(mlkem, x25519)
        self.public = mlkem.public_key().public_bytes_raw() + x25519.public_key().public_bytes_raw()

    def open(self, ciphertext: bytes, info: bytes) -> bytes:
        """Decrypt. Raises Aborted `secagg.ciphertext`."""
        try:
            return _SUITE.decrypt(ciphertext, self._private, info=info)
        except (InvalidTag, ValueError) as e:
            raise _aborted() from e


def seal(public: bytes, plaintext: bytes, info: bytes) -> bytes:
    """Encrypt to a peer. Raises Aborted `secagg.ciphertext` for a key that is no key."""
    try:
        key = hpke.MLKEM768X25519PublicKey(MLKEM768PublicKey.from_public_bytes(public[:MLKEM_PUBLIC]),
                                           X25519PublicKey.from_public_bytes(public[MLKEM_PUBLIC:]))
        return _SUITE.encrypt(plaintext, key, info=info)
    except ValueError as e:
        raise _aborted() from e


def _aborted() -> Aborted:
    return Aborted("secagg.ciphertext", "A peer's key or ciphertext is not valid.", "The round is void; try again.")
