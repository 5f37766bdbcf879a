"""The shape of the configuration, group by group. What the sites must agree on becomes the contract; the rest is local."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from privacy.compute import Compute, Device, Engine, Precision
from privacy.contract import ChatTerms, LoraTerms, Name, PrivacyTerms, RuleTerms, SignOff, TensorRange, Terms


class ModelSettings(Terms):
    name: str = Field(description="written into the adapter's files in place of a path")
    path: str = Field(description="local Hugging Face folder")
    task: Literal["classification", "causal_lm"] = "classification"
    pooling: Literal["mean", "cls"] = "mean"
    scale: float = Field(10.0, gt=0)
    max_length: int = Field(24, ge=2)
    chat: ChatTerms | None = Field(None, description="of causal_lm: how the model is asked")
    packing: bool = Field(False, description="refused: several records in a row have no gradients of their own")


class SiteDeclaration(Terms):
    n_decl: int | None = Field(None, ge=1, description="null: simulations round the true count to one digit")
    weight: float = Field(1.0, gt=0, le=1)
    file: str | None = Field(None, description="simulations only: that site's records")


class Evaluation(Terms):
    """A public split that no site trains on; text and label name its columns, as in `DataSettings`."""

    file: str | None = None
    name: str = "public split"
    text: str = "text"
    label: str = "label"


class DataSettings(Terms):
    name: str
    labels: tuple[str, ...] | None = Field(None, description="null: the labels of the public evaluation split")
    floor: int = Field(50, ge=1)
    text: str = Field("text", description="column of what the model reads: a text, or a prompt")
    label: str = Field("label", description="column of what it learns to give: a label, or an answer")
    person: str | None = Field(None, description="column of the person's key, where the privacy unit is a person")
    sites: dict[Name, SiteDeclaration] = Field(default_factory=dict)
    evaluation: Evaluation = Evaluation()


class PrivacySettings(PrivacyTerms):
    delta: float | None = Field(None, gt=0, lt=1, description="null: min(1e-5, 1 / (10 n_decl)) at each site")
    sigma: float | None = Field(None, gt=0, description="null: calibrated to epsilon over rounds + retries")


class SecAggSettings(Terms):
    enabled: bool = True
    threshold: int | None = Field(None, description="null: the smallest legal one for the cohort")
    survivors: int | None = Field(None, description="fewest sites in a sum; null: the smallest legal number")
    colluding: int = Field(1, ge=1, description="n_C, sites that may collude with the coordinator")
    ring: Literal[16, 32] = Field(32, description="16 halves the upload; bits must be fewer then")
    bits: int = Field(24, ge=2, le=31)
    range: float | None = Field(None, gt=0, description="null: 2 * clip * local_lr * local_steps")
    ranges: tuple[TensorRange, ...] = Field((), description="public bounds of single tensors, by name or pattern")


class ContractSettings(Terms):
    days: int = Field(90, ge=1, le=3660, description="a contract expires so long after it was made")
    sign_off: tuple[SignOff, ...] = Field((), description="who agreed to the purpose: DPO, ethics board")


class SiteSettings(Terms):
    name: Name = "site"
    url: str = "https://localhost:8443"
    data: str = "data.csv"
    text: str = "text"
    label: str = "label"
    person: str | None = None
    keys: str = "keys"
    certificates: str = "certificates"
    contract: str = "contract.json"
    signature: str = Field("contract.signature.json", description="the engineer's, on the contract")
    policy: str = "policy.yaml"
    state: str = "state"
    other_lineages: tuple[str, ...] = Field((), description="state folders of this site's other data lineages")
    threads: int = Field(0, ge=0, description="of the trainer; 0 leaves it to torch")
    engine: Engine = Field("auto", description="of per-sample gradients; what is released "
                                                       "is the same mechanism, so it is the site's own choice")
    device: Device = Field("cpu", description="of the trainer")
    precision: Precision = Field("float32", description="bfloat16: products in the forward and backward pass by autocast; "
                                 "clipping, sum and noise are as ever")
    checkpointing: bool = Field(False, description="compute activations twice and keep fewer; the fused engine only")
    physical_batch: int | None = Field(None, ge=1, description="records in memory at a time; null: the contract's proposal. "
                                       "It changes no result")
    cache_mib: int = Field(1024, ge=0, description="most memory for what the frozen layers make of records; more records "
                           "than fit are encoded again each time")
    control_url: str | None = Field(None, description="the coordinator's control plane; null: roster and revocation lists "
                                    "are carried by hand")
    proxy: str | None = Field(None, description="HTTP CONNECT proxy; null: that of the environment (HTTPS_PROXY)")
    proxy_ca: str | None = Field(None, description="CA of the proxy's own certificate, for an https:// proxy; PEM file")

    @property
    def compute(self) -> Compute:
        return Compute(engine=self.engine, device=self.device, precision=self.precision, checkpointing=self.checkpointing,
                       physical_batch=self.physical_batch, cache_mib=self.cache_mib)


class ServerSettings(Terms):
    name: Name = "coordinator"
    host: str = "127.0.0.1"
    port: int = Field(8443, ge=0, le=65535)
    keys: str = "keys"
    certificates: str = "certificates"
    roster: str = "roster.json"
    log: str = Field("log", description="folder of the transparency log; one for all runs of a coordinator")
    store: str = Field("control", description="folder that the control plane serves (docs/control-plane.md)")
    control_port: int | None = Field(None, ge=0, le=65535, description="null: no control plane in this process")
    enrol_port: int | None = Field(None, ge=0, le=65535, description="null: no enrolment over the network")
    contract: str = "contract.json"
    signature: str = "contract.signature.json"
    out: str = "outputs/run"
    wait_s: float = Field(600.0, gt=0, description="for all sites to be online")
    deadline_s: float = Field(600.0, gt=0, description="of the training stage")
    stage_deadline_s: float = Field(60.0, gt=0, description="of every other stage")
    evaluate_every: int = Field(5, ge=1)


class Settings(Terms):
    purpose: str = "private federated fine-tuning"
    contract: ContractSettings = ContractSettings()
    seed: int = Field(0, ge=0, lt=2**32)
    model: ModelSettings
    data: DataSettings
    lora: LoraTerms
    rule: RuleTerms
    privacy: PrivacySettings
    secure_aggregation: SecAggSettings
    site: SiteSettings
    server: ServerSettings
