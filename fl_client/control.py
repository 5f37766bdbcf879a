"""A certified party's view of the control plane: roster and lists, contracts, evidence, adapters.

Guarantees: the coordinator is believed in nothing that someone else signed; what arrives is verified first and written
then, whole or not at all; a list or file is never replaced by one that is older or fails its check.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
from cryptography.x509 import Certificate

from fl_client.control_channel import CONNECT_S, Address, explain, open_channel, require_coordinator, shown_certificate
from fl_client.control_transfer import Receiver, adapter_tensors_digest, new_folder
from privacy import bundle
from privacy.ca import RosterEntry, verify_roster
from privacy.control import MAX_ADAPTER_BYTES, MAX_ADAPTER_FILES, STREAM_S, UNARY_S
from privacy.control import consilo_control_pb2 as pb
from privacy.control import consilo_control_pb2_grpc as rpc
from privacy.errors import CheckFailed, Refused, Unreachable
from privacy.files import FileLayer, read_file, read_private
from privacy.predicates import Release
from privacy.trust import TrustStore
from privacy.trust_files import is_older, named_lists
from privacy.verify import examine

ADAPTER_FILES = frozenset({"adapter_config.json", "adapter_model.safetensors", "head.safetensors", "labels.txt",
                           "README.md"})


class ControlClient:
    """url: `https://host:port`. keys: folder with tls.key. certificates: folder with tls.pem and trust/; `roster` renews
    the lists in trust/ and writes roster.json beside it. proxy: see `fl_client.control_channel`. unary_s, stream_s:
    limits of one call, in seconds.

    Every method opens a connection of its own, and raises Unreachable `control.unreachable`, `control.deadline`,
    `control.busy`, `control.store`, `control.refused` (the server hung up, perhaps on our certificate); Refused
    `control.untrusted` (the server's certificate), `control.role`, `identity.*`; UsageError `control.not_found`,
    `control.version`, `control.url`.
    """

    def __init__(self, url: str, keys: Path, certificates: Path, *, proxy: str | None = None, unary_s: float = UNARY_S,
                 stream_s: float = STREAM_S) -> None:
        self._address, self._folder = Address.parse(url, proxy), certificates
        self._key, self._certificate = read_private(keys / "tls.key"), read_file(certificates / "tls.pem")
        self._unary_s, self._stream_s = unary_s, stream_s

    def roster(self) -> list[RosterEntry]:
        """Renew the revocation lists and the roster; returns who takes part.

        Works with lists that have run out, which is what it is for; the server is then checked against the new ones.
        Also raises Refused `control.older` (a list is older than ours, or missing), `identity.crl_stale`; CheckFailed
        `roster.invalid`, `statement.*`.
        """
        now, old = datetime.now(UTC), TrustStore.load(self._folder / "trust")
        server = self._server(old, stale=True)
        with self._calls(server) as channel:
            reply = rpc.RosterStub(channel).Get(pb.RosterRequest(), timeout=self._unary_s)
        trust = self._trust(reply.crls)
        lists = named_lists(trust, reply.crls, now)
        if is_older(lists, {p.name: read_file(p) for p in (self._folder / "trust").glob("crl-*.pem")}):
            raise Refused("control.older", "The coordinator serves older revocation lists than the ones here.",
                          "Tell the coordinator's operator, and the CA's: someone may hide a revocation.")
        require_coordinator(trust, server, now)
        entries = verify_roster(reply.roster, trust)
        for name, pem in lists.items():
            FileLayer().write_atomic(self._folder / "trust" / name, pem)
        FileLayer().write_atomic(self._folder / "roster.json", reply.roster)
        return entries

    def contracts(self) -> list[str]:
        """Digests of the contracts that this certificate may read."""
        with self._calls() as channel:
            found = rpc.ContractsStub(channel).List(pb.ContractsRequest(), timeout=self._unary_s)
        return sorted(digest for digest in found.digests if re.fullmatch(r"[0-9a-f]{64}", digest))

    def contract(self, digest: str) -> tuple[bytes, bytes]:
        """(contract, signature). The contract's bytes have that digest; the signature, b"" if there is none, is NOT
        verified here. Raises CheckFailed `control.digest`."""
        with self._calls() as channel:
            found = rpc.ContractsStub(channel).Get(pb.ContractRequest(digest=digest), timeout=self._unary_s)
        if hashlib.sha256(found.contract).hexdigest() != digest:
            raise CheckFailed("control.digest", "The coordinator sent another contract than the one that was asked for.",
                              "Ask the engineer for the contract, and compare its digest.")
        return found.contract, found.signature

    def approve(self, digest: str, envelope: bytes) -> None:
        """Hand in this site's signed approval; again with the same bytes is no error. Raises Refused
        `control.approved`; UsageError `control.too_large`."""
        with self._calls() as channel:
            rpc.ContractsStub(channel).Approve(pb.ApproveRequest(digest=digest, envelope=envelope),
                                               timeout=self._unary_s)

    def evidence(self, run: str, folder: Path) -> None:
        """Fetch a run's bundle into a new folder, if it verifies against our root. Raises CheckFailed
        `control.evidence`, `control.transfer`; UsageError `control.exists`."""
        with new_folder(folder) as work:
            self._fetch(lambda channel: rpc.EvidenceStub(channel).Fetch, run, work, lambda name: True,
                        bundle.MAX_FILES, bundle.MAX_BUNDLE_BYTES)
            self._release(run, work)

    def adapter(self, run: str, folder: Path, evidence: Path | None = None) -> None:
        """Fetch a run's adapter into a new folder, if its tensors are those that the evidence says were released.

        evidence: the run's bundle, fetched if None. The other files (config, labels, card) are the coordinator's word.
        Raises CheckFailed `control.adapter`, `control.evidence`, `control.transfer`; UsageError `control.exists`.
        """
        with new_folder(folder) as work:
            bundle_folder = evidence or work.with_name("evidence")
            if evidence is None:
                self.evidence(run, bundle_folder)
            released = self._release(run, bundle_folder)
            self._fetch(lambda channel: rpc.AdaptersStub(channel).Fetch, run, work, ADAPTER_FILES.__contains__,
                        MAX_ADAPTER_FILES, MAX_ADAPTER_BYTES)
            if not released or adapter_tensors_digest(work) != released:
                raise CheckFailed("control.adapter", "The adapter is not the one that the evidence says was released.",
                                  "Tell the coordinator's operator; don't use it.")

    def _release(self, run: str, folder: Path) -> str:
        """The released adapter's digest, "" if there is none. Raises CheckFailed `control.evidence`."""
        verdict, facts = examine(folder, TrustStore.load(self._folder / "trust").fingerprint)
        if verdict.verdict != "PASS" or facts.agreed().run != run:
            raise CheckFailed("control.evidence", "The run's evidence does not verify, or is of another run.",
                              "Tell the coordinator's operator, and the auditor.")
        return next((release.adapter for release in facts.said(Release)), "")

    def _server(self, trust: TrustStore, *, stale: bool = False) -> Certificate:
        """The certificate that the server shows, checked. stale: lists may have run out, for the moment."""
        certificate = shown_certificate(self._address, min(CONNECT_S, self._unary_s))
        now = datetime.now(UTC)
        try:
            require_coordinator(trust, certificate, now)
        except Refused as e:
            if not stale or e.code != "identity.crl_stale":
                raise
            require_coordinator(self._trust([]), certificate, now)
        return certificate

    @contextmanager
    def _calls(self, server: Certificate | None = None) -> Iterator[grpc.Channel]:
        server = server or self._server(TrustStore.load(self._folder / "trust"))
        try:
            with open_channel(self._address, server, self._key, self._certificate) as channel:
                yield channel
        except grpc.RpcError as e:
            raise explain(e) from None

    def _fetch(self, method: Callable[[grpc.Channel], Any], run: str, folder: Path, known: Callable[[str], bool],
               max_files: int, max_bytes: int) -> None:
        """Write the files of a stream. One that is cut goes on after the last whole file, as long as there is progress."""
        receiver = Receiver(folder, known, max_files, max_bytes)
        while True:
            before = receiver.last
            try:
                with self._calls() as channel:
                    for chunk in method(channel)(pb.FetchRequest(run=run, after=before), timeout=self._stream_s):
                        receiver.take(chunk)
                receiver.end()
                return
            except Unreachable:
                if receiver.last == before:
                    raise
            finally:
                receiver.drop()

    def _trust(self, crls: Iterable[bytes]) -> TrustStore:
        """Our CAs, with these lists."""
        folder = self._folder / "trust"
        return TrustStore(read_file(folder / "root.pem"), map(read_file, sorted(folder.glob("issuing-*.pem"))), crls)
