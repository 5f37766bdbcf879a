"""The contract: everything the sites of a run share and agree to, as canonical JSON. Its digest is bound everywhere.

It holds no path, no column name and no true count: those are each site's own. A site compares it with its policy and
its own digests before the first round, and refuses every round whose M0 names another digest.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from privacy.canonical import canonical, digest, parse
from privacy.errors import Refused, UsageError, nearest
from privacy.mechanism import DpMechanism

Suite = Literal["consilo-secagg-2:mlkem768x25519-hpke:ed25519:chacha20:hkdf-sha256"]
SUITE: Suite = "consilo-secagg-2:mlkem768x25519-hpke:ed25519:chacha20:hkdf-sha256"
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,62}$")]
MAX_SITES = 100
T = TypeVar("T", bound=BaseModel)


class Terms(BaseModel):
    """Frozen section of a contract or configuration; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ChatTerms(Terms):
    """How a causal language model is asked, and what of its answers is measured. All of it is public."""

    system: str | None = Field(None, min_length=1, max_length=4000, description="system message before every prompt")
    plain: str | None = Field(None, max_length=4000, description="template with {prompt}, in place of the model's own")
    max_answer: int = Field(32, ge=2, description="tokens of an answer with its end; longer ones are cut")
    separator: str | None = Field(None, min_length=1, max_length=20, description="an answer up to it is scored by itself")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.plain is not None and "{prompt}" not in self.plain:
            raise ValueError("the plain template has no {prompt}")
        if self.plain is not None and self.system is not None:
            raise ValueError("a plain template holds what a system message would say")
        return self


class ModelTerms(Terms):
    weights: Sha256 = Field(description="digest of config and weights of the base model's folder")
    tokenizer: Sha256
    chat_template: Sha256 | None = Field(None, description="of its text; null where the tokenizer has none")
    task: Literal["classification", "causal_lm"] = "classification"
    pooling: Literal["mean", "cls"] = "mean"
    scale: float = Field(10.0, gt=0, description="factor on the L2-normalised sentence vector")
    max_length: int = Field(24, ge=2, le=8192, description="tokens; every record is padded or cut to it")
    chat: ChatTerms | None = Field(None, description="of causal_lm")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.task == "causal_lm") != (self.chat is not None):
            raise ValueError("chat is given exactly when the task is causal_lm")
        if self.chat is not None and self.chat.max_answer >= self.max_length:
            raise ValueError("max_answer leaves no room for a prompt in max_length")
        return self


class DataTerms(Terms):
    name: str = Field(min_length=1, max_length=200)
    fields: tuple[Literal["text", "label", "prompt", "answer", "person"], ...] = Field(
        ("text", "label"), description="schema of a record")
    labels: tuple[str, ...] = Field((), max_length=10_000, description="classes; none for causal_lm")
    floor: int = Field(50, ge=1, description="least number of units of a site, decided at approval")


class LoraTerms(Terms):
    r: int = Field(4, ge=1, le=1024)
    alpha: float = Field(16.0, gt=0)
    targets: tuple[str, ...] = Field(("query", "value"), min_length=1)
    layers: tuple[int, ...] = Field((-1,), min_length=1, description="layer indices; negative ones count from the top")
    seed: int = Field(0, ge=0, lt=2**32, description="of the shared frozen A")


class SiteRank(Terms):
    site: Name
    r: int = Field(ge=1, le=1024)


class RuleTerms(Terms):
    name: str = "ffa"
    optimizer: str = "fedavgm"
    server_lr: float = Field(0.2, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.99, ge=0, lt=1, description="of fedadam and fedyogi: memory of squared changes")
    tau: float = Field(1e-3, gt=0, description="of fedadam and fedyogi: below it a change counts less than its sign")
    local_lr: float = Field(1.0, gt=0)
    mu: float = Field(0.0, ge=0, description="FedProx: pull towards the round's adapter, added after the noise")
    max_norm: float | None = Field(None, gt=0, description="L2 limit of a site's update; null: what clip and noise imply")
    ranks: tuple[SiteRank, ...] = Field((), max_length=MAX_SITES, description="of sites with a rank below lora.r")
    byzantine: int = Field(1, ge=0, description="sites that krum, trimmed_mean and median survive")


class Phase(Terms):
    """Rounds with a sampling probability and noise of their own. noise: factor on every site's sigma."""

    rounds: int = Field(ge=1)
    q: float = Field(gt=0, le=1)
    noise: float = Field(1.0, gt=0)


class PrivacyTerms(Terms):
    trust: Literal["local", "none"] = "local"
    unit: str = "record"
    sampled: str = Field("record", description="what is sampled and clipped: records, or whole persons")
    k_max: int | None = Field(None, ge=1, description="most records of a person, where the unit is a person and records "
                              "are sampled; which ones is fixed for the life of the lineage")
    draws: int = Field(1, ge=1, description="m: records drawn of a sampled person in each step")
    adjacency: str = "add_remove"
    sampler: str = "poisson"
    q: float = Field(0.5, gt=0, le=1)
    clip: float = Field(5.0, gt=0)
    epsilon: float | None = Field(8.0, gt=0, description="cap per site for all rounds and retries; null when trust=none")
    rounds: int = Field(20, ge=1)
    retries: int = Field(1, ge=0, description="void rounds that the schedule can pay for")
    local_steps: int = Field(1, ge=1)
    schedule: tuple[Phase, ...] = Field((), max_length=16, description="public phases, in order; none: all rounds alike")
    physical_batch: int = Field(128, ge=1, description="records in memory at a time; does not change the result")

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        if self.schedule and sum(phase.rounds for phase in self.schedule) != self.rounds:
            raise ValueError("the phases of the schedule don't add up to its rounds")
        if (self.epsilon is None) != (self.trust == "none"):
            raise ValueError("epsilon is a number exactly when trust is not 'none'")
        return self


class TensorRange(Terms):
    tensor: str = Field(min_length=1, max_length=200, description="name of trained tensors; * stands for any characters")
    range: float = Field(gt=0)


class SecAggTerms(Terms):
    enabled: bool = True
    suite: Suite = SUITE
    threshold: int = Field(ge=1, description="t: shares and votes needed to unmask")
    survivors: int = Field(ge=1, description="fewest sites whose sum may become known")
    ring: Literal[16, 32] = Field(32, description="sums are taken mod 2^ring; 16 halves the upload")
    bits: int = Field(24, ge=2, le=31, description="b: values are rounded to steps of range / (2^(b-1) - 1)")
    range: float = Field(gt=0, description="public bound C on every coordinate of an update")
    ranges: tuple[TensorRange, ...] = Field((), max_length=64, description="bounds of single tensors; the first that fits")


class SiteTerms(Terms):
    name: Name
    signer: Sha256 = Field(description="SHA-256 of the DER of the site's Ed25519 certificate")
    n_decl: int = Field(ge=1, description="declared units, one significant digit")
    weight: float = Field(1.0, gt=0, le=1, description="relative to w_cap = 1; never a real count")
    delta: float = Field(gt=0, lt=1)
    sigma: float = Field(ge=0, description="noise multiplier, calibrated on rounds + retries")


class SignOff(Terms):
    """Who outside the project agreed to the purpose, and where that is written down."""

    body: str = Field(min_length=1, max_length=60, description="such as DPO, or ethics board")
    who: str = Field(min_length=1, max_length=200)
    reference: str = Field(min_length=1, max_length=200)


class Contract(Terms):
    schema_version: Literal["consilo.contract/2"] = "consilo.contract/2"
    run: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    purpose: str = Field(min_length=1, max_length=500)
    sign_off: tuple[SignOff, ...] = Field((), max_length=16)
    expires: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")]
    code_version: str
    code: Sha256 = Field(description="digest of the installed code, the same at every site and the coordinator")
    metrics: tuple[str, ...] = Field(("accuracy",), min_length=1, max_length=16, description="released, of a public split")
    model: ModelTerms
    data: DataTerms
    lora: LoraTerms
    rule: RuleTerms
    privacy: PrivacyTerms
    secagg: SecAggTerms
    sites: tuple[SiteTerms, ...] = Field(min_length=1, max_length=MAX_SITES)

    @model_validator(mode="after")
    def _consistent(self) -> Contract:
        names = [s.name for s in self.sites]
        if len(set(names)) != len(names) or len({s.signer for s in self.sites}) != len(names):
            raise ValueError("two sites share a name or a certificate")
        if ("person" in self.data.fields) != (self.privacy.unit == "person"):
            raise ValueError("the schema holds a person exactly when the unit is one")
        classes = self.model.task == "classification"
        if self.data.fields[:2] != (("text", "label") if classes else ("prompt", "answer")):
            raise ValueError("the schema isn't the task's")
        if len(self.data.labels) < 2 if classes else self.data.labels:
            raise ValueError("classification needs two labels or more, and causal_lm none")
        datetime.fromisoformat(self.expires)
        return self

    def expired(self, at: datetime | None = None) -> bool:
        return (at or datetime.now(UTC)) >= datetime.fromisoformat(self.expires)

    def check_expiry(self, at: datetime | None = None) -> None:
        """Raises Refused `contract.expired`."""
        if self.expired(at):
            raise Refused("contract.expired", f"The contract expired at {self.expires}.", "Ask the engineer for a new one.")

    def phases(self) -> tuple[Phase, ...]:
        """The public schedule, one phase if none was given."""
        p = self.privacy
        return p.schedule or (Phase(rounds=p.rounds, q=p.q),)

    @property
    def digest(self) -> str:
        """Lowercase hex SHA-256 of the canonical JSON."""
        return digest(self.model_dump(mode="json"))

    def to_bytes(self) -> bytes:
        return canonical(self.model_dump(mode="json"))

    def site(self, name: str) -> SiteTerms:
        for s in self.sites:
            if s.name == name:
                return s
        raise UsageError("contract.no_such_site", f"The contract has no site {name!r}.",
                         nearest(name, [s.name for s in self.sites]))

    def mechanism(self, name: str, round_no: int = 1) -> DpMechanism:
        """What that round at that site releases. Raises UsageError `dp.parameter`, `dp.unsupported`."""
        left = round_no
        for phase in self.phases():
            if left <= phase.rounds:
                break
            left -= phase.rounds
        return self._mechanism(name, phase)

    def plans(self, name: str) -> list[list[tuple[DpMechanism, int]]]:
        """Every way in which that site's rounds and retries can be spent: (mechanism, rounds) pairs, with all retries in
        one phase or another. What must fit a cap is the costliest."""
        phases = self.phases()
        return [[(self._mechanism(name, p), p.rounds + (self.privacy.retries if p is costly else 0)) for p in phases]
                for costly in phases]

    def _mechanism(self, name: str, phase: Phase) -> DpMechanism:
        s, p = self.site(name), self.privacy
        by_record = p.unit == "person" and p.sampled == "record"
        if by_record != (p.k_max is not None):
            raise UsageError("dp.parameter", f"k_max = {p.k_max} doesn't go with unit={p.unit} and sampled={p.sampled}.",
                             "Set privacy.k_max exactly when the unit is a person and records are sampled.")
        return DpMechanism(trust=p.trust, unit=p.unit, adjacency=p.adjacency, sampler=p.sampler, q=phase.q, clip=p.clip,
                           sigma=s.sigma * phase.noise, steps=p.local_steps, delta=s.delta, n_decl=s.n_decl,
                           sampled=p.sampled, group=p.k_max or 1, draws=p.draws)


def load_contract(data: bytes) -> Contract:
    """Parse and validate. Raises UsageError `json.invalid`, `config.unknown_key`, `config.invalid`."""
    return validate(Contract, parse(data))


def validate(model: type[T], value: Any) -> T:
    """Pydantic validation with the project's errors: an unknown key is named with the nearest known one."""
    try:
        return model.model_validate(value)
    except ValidationError as e:
        errors = e.errors(include_input=False, include_url=False)
        first = next((x for x in errors if x["type"] == "extra_forbidden"), errors[0])
        where = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise UsageError("config.unknown_key", f"Unknown key {where!r}.",
                             nearest(str(first["loc"][-1]), _keys(model, first["loc"][:-1]))) from e
        raise UsageError("config.invalid", f"{where or 'The document'}: {first['msg']}.",
                         "Correct the value; conf/ holds a working example.") from e


def _keys(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """Field names of the (nested) model at a validation path."""
    current: type[BaseModel] = model
    for part in path:
        field = current.model_fields.get(str(part))
        options = [] if field is None else [field.annotation, *getattr(field.annotation, "__args__", ())]
        inner = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
        if inner is not None:
            current = inner
    return list(current.model_fields)
