"""Why the coordinator says no: the closed list of codes that travel as a gRPC status' details.

Guarantees: the server sends a code and no other word; the client takes a code from this list and says cause and mend in
its own words, so nothing that an untrusted coordinator writes is ever shown.
"""

from __future__ import annotations

from dataclasses import dataclass

from privacy.errors import ConsiloError, Refused, Unreachable, UsageError


@dataclass(frozen=True)
class Reason:
    """status: name of the gRPC status code."""

    status: str
    error: type[ConsiloError]
    cause: str
    mend: str


REASONS = {
    "control.role": Reason("PERMISSION_DENIED", Refused, "This certificate's role may not make that call.",
                           "Use the certificate of the role that docs/control-plane.md names."),
    "control.tls": Reason("UNAUTHENTICATED", Refused, "The connection isn't TLS 1.3.", "Use a current client."),
    "control.malformed": Reason("INVALID_ARGUMENT", UsageError, "The request is not of the agreed form.",
                                "Use a client of this version."),
    "control.too_large": Reason("INVALID_ARGUMENT", UsageError, "The document is over its limit.",
                                "docs/control-plane.md lists the limits."),
    "control.not_found": Reason("NOT_FOUND", UsageError, "There is no such document, or it isn't this site's to read.",
                                "Check the digest or run; evidence and adapter exist once the run has ended."),
    "control.approved": Reason("ALREADY_EXISTS", Refused, "This site has approved the contract with other bytes before.",
                               "One approval a contract counts; ask the coordinator's operator to remove the old one."),
    "control.busy": Reason("RESOURCE_EXHAUSTED", Unreachable, "Too many calls of this peer, or of all, at once.",
                           "Try again in a minute."),
    "control.store": Reason("UNAVAILABLE", Unreachable, "The coordinator can't read its documents at the moment.",
                            "Tell the coordinator's operator."),
    "enrol.full": Reason("RESOURCE_EXHAUSTED", Unreachable, "The coordinator holds too many requests for certificates.",
                         "Tell the coordinator's operator, or carry the request to the CA (fl-client csr)."),
    "enrol.taken": Reason("ALREADY_EXISTS", Refused, "Another request was sent for this token before.",
                          "Ask the CA for a new token, and say that the old one may be known to others."),
    "enrol.unknown": Reason("NOT_FOUND", UsageError, "The coordinator has no request of this token.",
                            "It may have been removed: run the command again."),
    "identity.untrusted": Reason("UNAUTHENTICATED", Refused, "No issuing CA of this consortium signed this certificate.",
                                 "Use certificates that this consortium's CA issued."),
    "identity.expired": Reason("UNAUTHENTICATED", Refused, "This certificate is not valid at this time.",
                               "Check the clock, then renew the certificate."),
    "identity.revoked": Reason("UNAUTHENTICATED", Refused, "This certificate has been revoked.",
                               "Ask the CA for a new certificate."),
    "identity.usage": Reason("UNAUTHENTICATED", Refused, "This certificate is not made for TLS in its role.",
                             "Use tls.pem for connections."),
    "internal.bug": Reason("INTERNAL", ConsiloError, "The coordinator failed; its own log says how.",
                           "Tell the coordinator's operator."),
}


def reason(code: str) -> ConsiloError:
    """The error of a code in `REASONS`."""
    known = REASONS[code]
    return known.error(code, known.cause, known.mend)
