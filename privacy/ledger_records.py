"""Ledger records: their fields, their schemas, how they are signed. The format is docs/evidence-format.md.

Guarantees: a record is read as the schema that it names says, and an unknown schema is refused by code; a record of
schema 1 reads as one of schema 2 with what it lacked filled in (one item a unit, records sampled, nothing held).
"""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from privacy.accountant import Release
from privacy.canonical import canonical, decimal, digest
from privacy.errors import CheckFailed
from privacy.identity import Signer
from privacy.mechanism import DpMechanism

V1, V2 = "consilo.ledger/1", "consilo.ledger/2"
ZERO = "0" * 64
MAX_CLASSES = 16  # mechanisms of one encumbrance, and ways to spend it
RefusalCode = Literal[
    "budget.exhausted", "budget.not_encumbered", "contract.certificate", "contract.code", "contract.epsilon",
    "contract.expired", "ledger.mismatch", "policy.cohort", "policy.delta", "policy.epsilon", "policy.non_private",
    "policy.reveal_update", "policy.rule", "policy.sigma", "policy.sign_off", "policy.unit", "policy.weights",
    "site.adapter_invalid", "site.budget_exhausted", "site.contract_mismatch", "site.history_conflict",
    "site.model_mismatch", "site.withdrawn"]
REFUSALS: tuple[str, ...] = get_args(RefusalCode)
Enforced = Literal["pld", "pld+filter"]

Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Id = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Count = Annotated[int, Field(ge=0, lt=2**53)]
Positive = Annotated[int, Field(ge=1, lt=2**53)]
Number = Annotated[str, Field(pattern=r"^[0-9]{1,20}(\.[0-9]{1,30})?(e[+-]?[0-9]{1,2})?$")]
Text = Annotated[str, Field(min_length=1, max_length=200)]
Plan = Annotated[tuple[Count, ...], Field(strict=False)]


class Head(NamedTuple):
    """A record named by its place and hash: what witnesses countersign."""

    seq: int
    hash: str


class _Form(BaseModel):
    """Numbers that are not counts are decimal strings."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True)


class Charge(_Form):
    """What one round releases at this site: a mechanism without its lineage's unit, adjacency and delta."""

    sampler: Text
    sampled: Text
    q: Number
    clip: Number
    sigma: Number
    planned_steps: Positive
    group: Positive
    draws: Positive

    @property
    def release(self) -> Release:
        """What it is charged as: its planned steps, whatever was executed."""
        return Release(float(self.q), float(self.sigma), self.planned_steps, self.group)

    @property
    def charge(self) -> Charge:
        """The mechanism alone, for comparisons."""
        return Charge(**{name: getattr(self, name) for name in Charge.model_fields})


class Schedule(_Form):
    """Rounds of a job by mechanism. `plans` are the ways in which its rounds and retries can be spent, each a number of
    rounds of every class."""

    classes: tuple[Charge, ...] = Field(min_length=1, max_length=MAX_CLASSES, strict=False)
    plans: tuple[Plan, ...] = Field(min_length=1, max_length=MAX_CLASSES, strict=False)

    @property
    def rounds(self) -> int:
        """Rounds and retries together."""
        return max(sum(plan) for plan in self.plans)

    def covers(self, drawn: Mapping[Charge, int]) -> bool:
        """Whether the schedule holds that many rounds of each class."""
        most = {c: max(plan[i] for plan in self.plans) for i, c in enumerate(self.classes)}
        return all(n <= most.get(c, 0) for c, n in drawn.items()) and sum(drawn.values()) <= self.rounds

    def left(self, drawn: Mapping[Charge, int]) -> list[list[Release]]:
        """What may still come after that many rounds of each class, in every way that the plans allow."""
        ways = {tuple(max(0, n - drawn.get(c, 0)) for n, c in zip(plan, self.classes, strict=True)) for plan in self.plans}
        return [[Release(float(c.q), float(c.sigma), c.planned_steps * n, c.group)
                 for c, n in zip(self.classes, way, strict=True) if n] for way in sorted(ways)]


class Record(_Form):
    schema_: Literal["consilo.ledger/1", "consilo.ledger/2"] = Field(default="consilo.ledger/2", alias="schema")
    seq: Count
    prev: Hash


class Open(Record):
    kind: Literal["open"] = "open"
    lineage: Id
    unit: Text
    adjacency: Text
    delta: Number
    cap: Number


class Register(Record):
    """The operator added data to the lineage; how much stays at the site."""

    kind: Literal["register"] = "register"
    approver: Text


class Encumber(Record, Schedule):
    """A job's whole schedule, held for it. epsilon: of everything reserved and held, this included."""

    kind: Literal["encumber"] = "encumber"
    run: Id
    contract: Hash
    epsilon: Number
    accountant: Text
    enforced: Enforced
    approver: Text

    @property
    def schedule(self) -> Schedule:
        """The schedule alone, for comparisons."""
        return Schedule(classes=self.classes, plans=self.plans)


class Reserve(Record, Charge):
    kind: Literal["reserve"] = "reserve"
    run: Id
    contract: Hash
    round: Positive
    attempt: Count
    epsilon: Number
    accountant: Text
    enforced: Enforced
    code: Text
    approver: Text


class Commit(Record):
    kind: Literal["commit"] = "commit"
    run: Id
    contract: Hash
    round: Positive
    attempt: Count
    reserve: Count
    executed_steps: Count


class Refusal(Record):
    """The site said no: to a whole job, or to a round of one. The codes are a closed list; no record content."""

    kind: Literal["refusal"] = "refusal"
    run: Id
    contract: Hash
    code: RefusalCode
    what: Literal["job", "round"]


class Close(Record):
    """End of a job. freed: rounds that it held and never reserved."""

    kind: Literal["close"] = "close"
    run: Id
    head_epsilon: Number
    freed: Count


Body = Open | Register | Encumber | Reserve | Commit | Refusal | Close
_BODY: TypeAdapter[Body] = TypeAdapter(Annotated[Body, Field(discriminator="kind")])
_ADDED: dict[str, dict[str, Any]] = {  # what schema 2 added to each kind of schema 1
    "open": {}, "commit": {}, "close": {"freed": 0},
    "reserve": {"sampled": "record", "group": 1, "draws": 1, "enforced": "pld"}}


def read_body(value: Any) -> Body:
    """A body as its own schema says. Raises CheckFailed `ledger.schema`; ValidationError, KeyError, TypeError."""
    if value["schema"] == V1:
        added = _ADDED[value["kind"]]
        if added.keys() & value.keys():
            raise KeyError("a field of a later schema")
        return _BODY.validate_python({**value, **added})
    if value["schema"] != V2:
        raise CheckFailed("ledger.schema", "A record has a schema that this version doesn't know.",
                          "Use the version of the software that wrote the ledger, or a newer one.")
    return _BODY.validate_python(value)


def domain(schema: str) -> bytes:
    """What a record's signature covers before its hash."""
    return schema.encode() + b"\n"


def sign_record(body: Body, signer: Signer) -> tuple[bytes, str]:
    """The line of a record, newline included, and its hash."""
    value = body.model_dump(mode="json", by_alias=True)
    hash_ = digest(value)
    signature = base64.b64encode(signer.sign(domain(body.schema_) + bytes.fromhex(hash_))).decode()
    return canonical({"body": value, "hash": hash_, "signature": signature}) + b"\n", hash_


def charge(m: DpMechanism) -> Charge:
    """A mechanism as a ledger states it."""
    return Charge(sampler=m.sampler, sampled=m.sampled, q=decimal(m.q), clip=decimal(m.clip), sigma=decimal(m.sigma),
                  planned_steps=m.steps, group=m.group, draws=m.draws)


def schedule(plans: Sequence[Iterable[tuple[DpMechanism, int]]]) -> Schedule:
    """What an encumbrance for `Contract.plans` holds; equal mechanisms are one class."""
    counted: list[Counter[Charge]] = []
    for plan in plans:
        counted.append(Counter())
        for mechanism, rounds in plan:
            counted[-1][charge(mechanism)] += rounds
    classes = tuple(dict.fromkeys(c for counts in counted for c in counts))
    return Schedule(classes=classes, plans=tuple(dict.fromkeys(tuple(n[c] for c in classes) for n in counted)))


def at_most(epsilon: str, cap: str | float) -> bool:
    """Compared as decimals, as they are written."""
    return Decimal(epsilon) <= Decimal(str(cap))
