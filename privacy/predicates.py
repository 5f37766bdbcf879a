"""What each statement of a run asserts, and which role may sign it. The formats are docs/evidence-format.md."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from privacy.contract import MAX_SITES, Name, Sha256
from privacy.ledger_records import Number, RefusalCode


def _exists(moment: str) -> str:
    datetime.fromisoformat(moment)
    return moment


Run = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Count = Annotated[int, Field(ge=0, lt=2**53)]
Code = Annotated[str, Field(pattern=r"^[a-z0-9_.]*$", max_length=64)]
Metric = Annotated[str, Field(pattern=r"^[a-z0-9_]{1,40}$")]
Stage = Literal["update", "again", "shares", "masked", "vote", "unmask"]
Person = Annotated[str, Field(min_length=1, max_length=200, pattern=r"\S")]
Moment = Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00$"), AfterValidator(_exists)]
Pass = Annotated[int, Field(ge=1, le=2)]  # of the secure sums of one attempt
BEFORE_SUM: tuple[Stage, ...] = ("update", "again", "shares", "masked")  # a site that falls out here is not in the sum


class Strict(BaseModel):
    """Unknown keys and mistyped values are refused; numbers are decimal strings."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Predicate(Strict):
    """What a statement asserts."""

    run: Run
    contract: Sha256


class ContractSignature(Predicate):
    """The engineer's: who answers for the contract's purpose."""

    purpose: str = Field(min_length=1, max_length=500)
    expires: str = Field(min_length=1, max_length=40)


class Acceptance(Predicate):
    site: Name
    lineage: Run | Literal[""]
    cap: Number | Literal[""] = Field(description="'' exactly when trust is 'none', as every epsilon")
    delta: Number
    trust: Literal["local", "none"]
    approver: Person = Field(description="who answers for the policy, as in the ledger")
    approved_by: Person
    approved: Moment
    policy: Sha256
    code: Sha256 = Field(description="digest of the code that is installed at the site")


class RoundSite(Predicate):
    site: Name
    lineage: Run | Literal[""]
    round: int = Field(ge=1, lt=2**31)
    attempt: Count
    pass_no: Pass
    adapter_in: Sha256
    view: Sha256 | Literal[""] = Field(description="T2, or '' without secure aggregation")
    masked: Sha256 = Field(description="SHA-256 of the vector that left")
    q: Number
    clip: Number
    sigma: Number
    steps: Count
    n_decl: Count
    ledger_seq: Count
    ledger_head: Sha256 | Literal[""]
    epsilon: Number | Literal[""]


class Vote(Strict):
    site: Name
    signature: str = Field(pattern=r"^[A-Za-z0-9+/]{85}[AQgw]==$", description="base64 of s7: Ed25519 over T3 and the index")


class SecureSum(Strict):
    """One sum of an attempt: what its sites saw and voted for. Without secure aggregation all is empty."""

    view: Sha256 | Literal[""]
    transcript: Sha256 | Literal[""] = Field(description="T3")
    votes: list[Vote] = Field(max_length=MAX_SITES)


class Dropout(Strict):
    """A site that did not answer properly at a stage, and why."""

    site: Name
    pass_no: Pass
    stage: Stage
    code: Code


class Round(Predicate):
    round: int = Field(ge=1, lt=2**31)
    attempt: Count
    outcome: Literal["done", "void"]
    reason: Code
    sites: list[Name] = Field(max_length=MAX_SITES, description="in the sum, in the contract's order")
    adapter_in: Sha256
    adapter_out: Sha256 | Literal[""]
    sums: list[SecureSum] = Field(max_length=2, description="in order, all over `sites`; none of a void attempt")
    dropped: list[Dropout] = Field(max_length=400)


class Closing(Predicate):
    site: Name
    lineage: Run
    records: int = Field(ge=1, lt=2**31)
    ledger_seq: Count
    ledger_head: Sha256
    epsilon: Number
    delta: Number
    cap: Number


class Evaluation(Predicate):
    """On a public split: nobody's records."""

    round: Count = Field(description="after it; 0: the initial adapter")
    adapter: Sha256
    metric_name: Metric
    metric: Number
    split: str = Field(max_length=200)
    units: Count


class Release(Predicate):
    adapter: Sha256
    rounds: int = Field(ge=1, lt=2**31)
    metric_name: Metric
    metric_before: Number
    metric_after: Number
    split: str = Field(max_length=200)
    units: Count


class Refusal(Predicate):
    """The site said no to a round of the run, with a code that depends on no record. Once for each code."""

    site: Name
    code: RefusalCode


class Withdrawal(Predicate):
    """The site takes part no more. What was released stays released; what was spent stays spent."""

    site: Name
    lineage: Run | Literal[""]
    ledger_seq: Count
    ledger_head: Sha256 | Literal[""]
    withdrawn: Moment
    approver: Person = Field(description="who withdrew the approval")


@dataclass(frozen=True)
class Kind:
    """A statement's name in file names, its predicateType, the role that may sign it, and its predicate."""

    name: str
    predicate_type: str
    role: str
    model: type[Predicate]


KINDS = {kind.name: kind for kind in (
    Kind("contract", "urn:consilo:contract:1", "engineer", ContractSignature),
    Kind("acceptance", "urn:consilo:acceptance:2", "site", Acceptance),
    Kind("round-site", "urn:consilo:round-site:4", "site", RoundSite),
    Kind("round", "urn:consilo:round:3", "coordinator", Round),
    Kind("evaluation", "urn:consilo:evaluation:1", "coordinator", Evaluation),
    Kind("closing", "urn:consilo:closing:1", "site", Closing),
    Kind("refusal", "urn:consilo:refusal:1", "site", Refusal),
    Kind("withdrawal", "urn:consilo:withdrawal:1", "site", Withdrawal),
    Kind("release", "urn:consilo:release:1", "coordinator", Release),
)}
