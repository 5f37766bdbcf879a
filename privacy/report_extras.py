"""What may accompany a report without being part of the signed evidence: an audit, and an attack demonstration.

Nobody signed these files and nothing of them is verified. Guarantees: they are of the documented form (sizes and lengths
are bounded, unknown keys refused), an audit's verdict is the one that its own p-values give, and no free text of theirs
reaches the report: neither the sentence that was attacked nor what was read of it.
"""

from __future__ import annotations

import hashlib
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from privacy.canonical import parse
from privacy.contract import Contract, Name, Sha256
from privacy.errors import ConsiloError, UsageError
from privacy.files import read_file
from privacy.ledger_records import Number

MAX_AUDIT_BYTES, MAX_ATTACK_BYTES = 64 * 1024, 2 * 2**20  # an audit takes 1 KiB, an attack of 64 tokens 100 KiB
LAST_DIGIT = Decimal("0.000002")  # p-values are rounded up and their level down, at 6 decimals

Many = Annotated[int, Field(ge=0, lt=2**53)]
Positive = Annotated[int, Field(ge=1, lt=2**31)]
Share = Annotated[float, Field(ge=0, le=1)]
Size = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Words = Annotated[str, Field(max_length=500)]
Sentence = Annotated[str, Field(max_length=10_000)]


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


F = TypeVar("F", bound=_Form)


class _Claimed(_Form):
    epsilon: Number
    delta: Number
    sigma: Number
    clip: Number
    q: Number
    steps: Positive


class _Bounds(_Form):
    one_run: Number
    f_dp: Number


class _Estimate(_Form):
    gaussian: Number


class _Tests(_Form):
    level: Number
    f_dp: Number
    noise: Number
    sensitivity: Number


class Audit(_Form):
    """`consilo.audit/1` (docs/audit.md)."""

    format: Literal["consilo.audit/1"]
    statement: Words
    verdict: Literal["consistent", "violation"]
    confidence: Number
    canaries: Positive
    included: Many
    guesses: Many
    correct: Many
    claimed: _Claimed
    lower_bound: _Bounds
    estimate: _Estimate
    tests: _Tests
    seed: Many
    model: Words
    data: Words
    site: Name
    unit: Literal["record", "person"]
    live: bool

    @model_validator(mode="after")
    def _adds_up(self) -> Audit:
        smallest = min(Decimal(p) for p in (self.tests.f_dp, self.tests.noise, self.tests.sensitivity))
        margin = smallest - Decimal(self.tests.level)
        if margin > LAST_DIGIT if self.verdict == "violation" else margin <= 0:
            raise ValueError("the verdict is not the one that the p-values give")
        if not (self.included <= self.canaries and self.correct <= self.guesses <= self.canaries
                and 0 < Decimal(self.confidence) < 1):
            raise ValueError("the counts don't add up")
        return self


class _Rate(_Form):
    releases: Many
    recovered: Many
    of: Positive
    rate: Share
    median_rank: Size

    @model_validator(mode="after")
    def _adds_up(self) -> _Rate:
        if self.rate != round(self.recovered / self.of, 4):
            raise ValueError("the rate is not that of the counts")
        return self


class _OfRound(_Rate):
    round: Positive


class _OfSigma(_Rate):
    sigma: Size


class _Token(_Form):
    position: Many
    token: Words
    guess: Words
    distance: Size
    ranks: list[Size] = Field(max_length=1000)


class _Scenarios(_Form):
    plain: _Rate
    noise_off: _Rate = Field(alias="noise off")
    noise: _Rate
    whole_run: _Rate = Field(alias="noise, whole run")
    absent: _Rate = Field(alias="noise, record absent")
    crowd_off: _Rate = Field(alias="crowd, noise off")
    crowd: _Rate = Field(alias="crowd, noise")


class _Model(_Form):
    name: Words
    digest: Sha256
    vocabulary: Positive


class _Adapter(_Form):
    r: Positive
    targets: list[Words] = Field(max_length=32)
    layers: list[Many] = Field(max_length=200)
    rule: Words
    round: Positive


class _Mechanism(_Form):
    epsilon: Size
    delta: Size
    sigma: Size
    clip: Size
    q: Share
    rounds: Positive
    retries: Many
    shipped_default: bool


class Attack(_Form):
    """`consilo.attack/1` (docs/attack.md)."""

    format: Literal["consilo.attack/1"]
    attack: Words
    text: Sentence
    tokens: list[Words] = Field(min_length=1, max_length=1000)
    chance: Share
    model: _Model
    adapter: _Adapter
    mechanism: _Mechanism
    most_tokens: Positive
    inputs: Positive
    others: Many
    seeds: list[Many] = Field(min_length=1, max_length=100)
    repeats: Positive
    noise: Words
    without_dp: list[_Token] = Field(max_length=1000)
    with_dp: list[_Token] = Field(max_length=1000)
    scenarios: _Scenarios
    by_round: list[_OfRound] = Field(max_length=1000)
    sweep: list[_OfSigma] = Field(max_length=1000)
    favours: list[Words] = Field(max_length=32)
    not_claimed: list[Words] = Field(max_length=32)


class Extra(Protocol):
    """A validated file. code: of the error where it doesn't go with a report."""

    code: str

    def shown(self, agreed: Contract) -> dict[str, Any]:
        """What the report of a run under this contract says of it."""


class AuditExtra:
    code = "report.audit"

    def __init__(self, path: Path) -> None:
        self._sha256, self._audit = _load(Audit, path, MAX_AUDIT_BYTES, self.code)

    def shown(self, agreed: Contract) -> dict[str, Any]:
        """contract_mechanism: whether a site of that name has this unit, q, clip, sigma and delta in the contract."""
        a, names = self._audit, [s.name for s in agreed.sites]
        same = False
        if a.site in names:
            m = agreed.mechanism(a.site)
            said = tuple(float(x) for x in (a.claimed.q, a.claimed.clip, a.claimed.sigma, a.claimed.delta))
            same = (a.unit, *said) == (m.unit, m.q, m.clip, m.sigma, m.delta)
        return {"signed": False, "sha256": self._sha256, "contract_mechanism": same,
                **a.model_dump(exclude={"statement", "model", "data"})}


class AttackExtra:
    code = "report.attack"

    def __init__(self, path: Path) -> None:
        self._sha256, self._attack = _load(Attack, path, MAX_ATTACK_BYTES, self.code)

    def shown(self, agreed: Contract) -> dict[str, Any]:
        """contract_model: whether the base model is the contract's. Neither the sentence nor its words."""
        a, s = self._attack, self._attack.scenarios

        def rate(found: _Rate) -> dict[str, int]:
            return {"recovered": found.recovered, "of": found.of, "releases": found.releases}

        return {"signed": False, "sha256": self._sha256, "format": a.format,
                "contract_model": a.model.digest == agreed.model.weights, "tokens": len(a.tokens),
                "vocabulary": a.model.vocabulary, "seeds": len(a.seeds), "most_tokens": a.most_tokens, "inputs": a.inputs,
                "epsilon": f"{a.mechanism.epsilon:g}", "delta": f"{a.mechanism.delta:g}",
                "sigma": f"{a.mechanism.sigma:g}", "shipped_default": a.mechanism.shipped_default,
                "plain": rate(s.plain), "noise_off": rate(s.noise_off), "noise": rate(s.noise),
                "whole_run": rate(s.whole_run)}


def _load(model: type[F], path: Path, limit: int, code: str) -> tuple[str, F]:
    """(SHA-256 of the file, its document). Raises UsageError with that code, which quotes nothing of the file."""
    try:
        data = read_file(path, limit=limit)
        return hashlib.sha256(data).hexdigest(), model.model_validate(parse(data, limit=limit))
    except ValidationError as e:
        first = e.errors(include_input=False, include_url=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"] if first["type"] != "extra_forbidden")
        why = f"{where or 'the document'}: {first['msg']}"
    except ConsiloError as e:
        why = e.cause.rstrip(".")
    raise UsageError(code, f"{path.name} isn't of the documented form ({why}).",
                     "Give the file that fl-simulate wrote, unchanged.")
