"""The control plane's messages and stubs (consilo_control.proto, made by `make proto`), and what both sides agree on.

Nothing here is imported by the verifier: grpc and protobuf belong to the extras `site` and `coordinator`.
"""

from __future__ import annotations

CHUNK_BYTES = 256 * 2**10
MAX_APPROVAL_BYTES = 64 * 2**10
MAX_ENROLMENT_BYTES = 16 * 2**10  # two signing requests are 1.5 kB
MAX_REQUEST_BYTES = 2 * MAX_APPROVAL_BYTES
MAX_REPLY_BYTES = 9 * 2**20  # of one message: a roster or contract of at most 8 MiB, and its lists
MAX_ADAPTER_FILES = 16
MAX_ADAPTER_BYTES = 4 * 2**30
UNARY_S = 30.0
STREAM_S = 900.0  # a transfer that takes longer goes on after the last whole file
