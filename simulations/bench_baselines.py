"""What secure aggregation is measured against: Flower's plain averaging, Flower's SecAgg+, CKKS as NVFlare uses it.

All run the installed package's own functions on the same updates. A package that isn't installed gives None.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.app.metadata import Metadata
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore
from numpy.typing import NDArray

from simulations.bench import Samples

Update = NDArray[np.float32]
RUN = 1
# NVFlare's HEBuilder: 128-bit security at this degree; half as many slots as the degree
CKKS_DEGREE, CKKS_MODULI, CKKS_SCALE = 8192, [60, 40, 40], 2.0**40


class Wire:
    """A Flower message as it arrives at a SuperLink: its serialised objects."""

    def __init__(self, content: Any) -> None:
        message = as_message(content)
        self._objects = {name: item.deflate() for name, item in get_all_nested_objects(message).items()}
        self._tree, self._name = get_object_tree(message), message.object_id

    @property
    def size(self) -> int:
        """Bytes of all objects, without the framing of HTTP and protobuf."""
        return sum(map(len, self._objects.values()))

    def received(self) -> Any:
        """What a coordinator gets: every object verified (SHA-256) by Flower's store, taken out and inflated."""
        store = InMemoryObjectStore()
        store.preregister(RUN, self._tree)
        for name, data in self._objects.items():
            store.put(name, data)
        return inflate_object_from_contents(self._name, {name: store.get(name) for name in self._objects})


def as_message(content: Any) -> Any:
    return Message(content=content, metadata=Metadata(run_id=RUN, message_id="", src_node_id=1, dst_node_id=2,
                                                      reply_to_message_id="", group_id="", created_at=0.0, ttl=1.0,
                                                      message_type="train"))


def plain_content(update: Update) -> Any:
    """A site's answer to plain FedAvg: the update as `Array(ndarray)` makes it, and its weight."""
    return RecordDict({"arrays": ArrayRecord({"update": Array(update)}), "metrics": MetricRecord({"num-examples": 1})})


def fedavg(replies: Sequence[Any]) -> Update:
    """`FedAvg.aggregate_train`: deserialise, weight and add each update, serialise the mean."""
    logging.getLogger("flwr").setLevel(logging.WARNING)  # two lines for each call
    arrays, _ = FedAvg().aggregate_train(1, replies)
    mean: Update = arrays["update"].numpy()
    return mean


def secaggplus(update: Update, neighbours: Sequence[int], repeats: int) -> dict[str, Any]:
    """One SecAgg+ client's `_collect_masked_vectors` (its workflow's defaults) for each number of neighbours.

    What a vector of one value costs (key agreement, decryption) is taken off. Contains what that function does:
    weighting, quantisation, masks, and the parameters from and to bytes.
    """
    samples, masked = Samples(), b""
    for _ in range(repeats):
        for k in neighbours:
            samples.take(f"control {k}", _secaggplus_client(update[:1], k))
            masked = samples.take(f"vector {k}", _secaggplus_client(update, k))
    ns = [(samples.cpu(f"vector {k}") - samples.cpu(f"control {k}")) / update.size * 1e9 for k in neighbours]
    slope, base = np.polyfit(neighbours, ns, 1)
    return {"client_ns_per_element": float(base), "client_ns_per_element_per_neighbour": float(slope),
            "client_ns": ns[-1], "upload_ratio_fp32": len(masked) / update.nbytes, "samples": dict(samples.taken)}


def _secaggplus_client(update: Update, neighbours: int) -> Any:
    """A client that has shared keys with its neighbours, about to make its masked vector: () -> bytes."""
    from flwr.common import ndarrays_to_parameters
    from flwr.common.secure_aggregation.secaggplus_constants import Key
    from flwr.server.workflow import SecAggPlusWorkflow

    mod = importlib.import_module("flwr.client.mod.secure_aggregation.secaggplus_mod")  # its package exports a function
    terms = SecAggPlusWorkflow(num_shares=1.0, reconstruction_threshold=1)
    own, peers = mod.SecAggPlusState(), [mod.SecAggPlusState() for _ in range(neighbours)]
    for state in (own, *peers):
        mod._setup(state, {Key.SAMPLE_NUMBER: neighbours + 1, Key.SHARE_NUMBER: neighbours + 1, Key.THRESHOLD: 1,
                           Key.CLIPPING_RANGE: terms.clipping_range, Key.TARGET_RANGE: terms.quantization_range,
                           Key.MOD_RANGE: terms.modulus_range, Key.MAX_WEIGHT: 1.0})
    own.nid, own.rd_seed = neighbours // 2, os.urandom(32)  # half the masks are added, half subtracted
    own.rd_seed_share_dict, own.sk1_share_dict = {}, {}
    others = [u for u in range(neighbours + 1) if u != own.nid]
    own.public_keys_dict = {u: (peer.pk1, peer.pk2) for u, peer in zip(others, peers, strict=True)}
    own.ss2_dict = {u: mod.generate_shared_key(mod.bytes_to_private_key(own.sk2), mod.bytes_to_public_key(peer.pk2))
                    for u, peer in zip(others, peers, strict=True)}
    share = os.urandom(32)
    inbound = [mod.encrypt(own.ss2_dict[u], mod.share_keys_plaintext_concat(u, own.nid, share, share)) for u in others]
    parameters = ndarrays_to_parameters([update])

    def masked() -> bytes:
        configs = {Key.CIPHERTEXT_LIST: inbound, Key.SOURCE_LIST: others}
        return b"".join(mod._collect_masked_vectors(own, configs, 1, parameters)[Key.MASKED_PARAMETERS])

    return masked


def tenseal_ckks(update: Update, repeats: int) -> dict[str, Any] | None:
    """One update encrypted by a client, added by the server, decrypted: seconds for 1M values and bytes.

    As NVFlare's HEModelEncryptor and its aggregator do it, with vectors of one ciphertext each.
    """
    if find_spec("tenseal") is None:
        return None
    ts = importlib.import_module("tenseal")
    context = ts.context(ts.SCHEME_TYPE.CKKS, poly_modulus_degree=CKKS_DEGREE, coeff_mod_bit_sizes=CKKS_MODULI,
                         encryption_type=ts.ENCRYPTION_TYPE.SYMMETRIC)
    context.generate_relin_keys()
    context.global_scale = CKKS_SCALE
    slots, samples = CKKS_DEGREE // 2, Samples()
    parts = [update[at:at + slots].astype(np.float64) for at in range(0, update.size, slots)]

    def encrypt() -> list[bytes]:
        return [ts.ckks_vector(context, part).serialize() for part in parts]

    def add(uploads: list[bytes], total: list[Any]) -> list[Any]:
        return [before + ts.ckks_vector_from(context, data) for before, data in zip(total, uploads, strict=True)]

    for _ in range(min(repeats, 3)):
        uploads = samples.take("encrypt", encrypt)
        total = samples.take("add", add, uploads, [ts.ckks_vector_from(context, data) for data in uploads])
        twice = np.concatenate(samples.take("decrypt", lambda vectors: [v.decrypt() for v in vectors], total))
    return {"encrypt_s_per_million": samples.cpu("encrypt") / update.size * 1e6,
            "add_s_per_million": samples.cpu("add") / update.size * 1e6,
            "decrypt_s_per_million": samples.cpu("decrypt") / update.size * 1e6,
            "client_ns": samples.cpu("encrypt") / update.size * 1e9,
            "upload_ratio_fp32": sum(map(len, uploads)) / update.nbytes,
            "max_error": float(np.abs(twice / 2 - update).max()), "samples": dict(samples.taken)}
