"""The site's own policy: what it may be asked for at most. The coordinator can stay below it, never above.

`accept` is the approval of this version: it compares a contract with the policy once, before the agent connects.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from fl_client.sandbox import Wall
from privacy.accountant import Release, epsilon, round_up
from privacy.canonical import digest
from privacy.contract import Contract, Terms, validate
from privacy.errors import Refused, UsageError
from privacy.files import read_file
from privacy.predicates import Person
from privacy.secagg.encoding import Encoding
from privacy.secagg.transcript import check_cohort
from privacy.signing import code_digest

MAX_POLICY_BYTES = 2**16
MAX_POLICY_DEPTH = 2  # lists in a mapping


class SitePolicy(Terms):
    """Written by the site, as YAML. Defaults are the strict ones."""

    approver: Person = Field(description="who answers for accepting contracts")
    max_epsilon: float = Field(8.0, gt=0, description="cap of the lineage, for the life of the data")
    max_delta: float = Field(1e-5, gt=0, lt=1)
    min_sigma: float = Field(0.5, ge=0)
    min_cohort: int = Field(3, ge=1, description="least number of sites, in a contract and in any sum")
    min_weight_ratio: float = Field(0.1, gt=0, le=1, description="least weight of a site relative to the largest one: "
                                    "a site whose peers weigh nothing isn't hidden among them")
    colluding: int = Field(1, ge=1, description="n_C: sites that may collude with the coordinator")
    required_walls: tuple[Wall, ...] = Field((), description="walls around the trainer without which nothing is trained: "
                                             "network, files, limits (docs/sandbox.md)")
    rules: tuple[str, ...] = Field(("ffa", "fedit", "rolora", "exact", "fedsb", "hetero"), description="the linear ones, "
                                   "which need no single update")
    units: tuple[str, ...] = ("record", "person")
    allow_non_private: bool = False
    sign_off: bool = Field(False, description="true: the contract must name who signed off its purpose (DPO, ethics board)")
    reveal_update: bool = Field(False, description="true: single updates may be visible to the coordinator")

    @property
    def digest(self) -> str:
        return digest(self.model_dump(mode="json"))


def load_policy(path: Path) -> SitePolicy:
    """Raises UsageError `file.missing`, `file.too_large`, `policy.yaml`, `config.unknown_key`, `config.invalid`."""
    return validate(SitePolicy, _plain(path.name, read_file(path, limit=MAX_POLICY_BYTES)))


def _plain(name: str, data: bytes) -> Any:
    """One YAML document of plain values, each key once; scalars stay text. Anchors and tags, which can make a page grow to
    any size, and nesting are refused before anything is made of them."""
    import yaml

    depth = 0
    try:
        for event in yaml.parse(data, yaml.BaseLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_POLICY_DEPTH or getattr(event, "anchor", None) or getattr(event, "tag", None):
                raise yaml.YAMLError
        loader = yaml.BaseLoader(data)
        root = loader.get_single_node()
        if isinstance(root, yaml.MappingNode) and len({str(key.value) for key, _ in root.value}) < len(root.value):
            raise yaml.YAMLError
        return None if root is None else loader.construct_document(root)
    except (yaml.YAMLError, ValueError, OverflowError) as e:  # the latter two: escapes beyond Unicode
        raise UsageError("policy.yaml", f"{name} is not plain YAML, or has a key twice.",
                         "Start from docs/policy-example.yaml.") from e


def accept(contract: Contract, site: str, policy: SitePolicy) -> None:
    """Compare with the policy, the installed code and the clock. Raises Refused `policy.<what>`, naming the limit,
    `contract.code`, `contract.epsilon`, `contract.expired`, `data.floor`, `secagg.*`; nothing was spent by then."""
    terms, privacy = contract.site(site), contract.privacy
    contract.check_expiry()
    if contract.code != code_digest():
        raise Refused("contract.code", "The contract names other code than is installed here.",
                      f"Install the release that it names (version {contract.code_version}), or ask for another contract.")
    if policy.sign_off and not contract.sign_off:
        raise _refuse("sign_off", "Nobody has signed off the contract's purpose.", "sign_off")
    if privacy.trust == "none" and not policy.allow_non_private:
        raise _refuse("non_private", "The contract trains without privacy.", "allow_non_private")
    if privacy.epsilon is not None:
        if privacy.epsilon > policy.max_epsilon:
            raise _refuse("epsilon", f"The contract's epsilon {privacy.epsilon} is over {policy.max_epsilon}.",
                          "max_epsilon")
        if terms.delta > policy.max_delta:
            raise _refuse("delta", f"The contract's delta {terms.delta} is over {policy.max_delta}.", "max_delta")
        least = min(m.sigma for plan in contract.plans(site) for m, _ in plan)
        if least < policy.min_sigma:
            raise _refuse("sigma", f"The contract's sigma {least} is under {policy.min_sigma}.", "min_sigma")
        plans = [[Release(m.q, m.sigma, m.steps * rounds, m.group) for m, rounds in plan] for plan in contract.plans(site)]
        if max(round_up(epsilon(plan, terms.delta)) for plan in plans) > privacy.epsilon:
            raise Refused("contract.epsilon", "The contract's noise doesn't keep its own epsilon.",
                          "Ask for a contract with sigma calibrated to its rounds and retries.")
    weights = [s.weight for s in contract.sites]
    if min(weights) < policy.min_weight_ratio * max(weights):
        raise _refuse("weights", "The contract's weights leave too few sites to hide among.", "min_weight_ratio")
    if terms.n_decl < contract.data.floor:
        raise Refused("data.floor", "The site declares fewer units than the contract's floor.",
                      "Take no part in this contract, or ask for a lower floor.")
    least = min(len(contract.sites), contract.secagg.survivors)
    if least < policy.min_cohort:
        raise _refuse("cohort", f"The contract allows sums of {least} sites, under {policy.min_cohort}.", "min_cohort")
    if contract.rule.name not in policy.rules:
        raise _refuse("rule", f"Rule {contract.rule.name!r} is not allowed.", "rules")
    if privacy.unit not in policy.units:
        raise _refuse("unit", f"Privacy unit {privacy.unit!r} is not allowed.", "units")
    if not contract.secagg.enabled and not policy.reveal_update:
        raise _refuse("reveal_update", "Without secure aggregation the coordinator sees this site's updates.",
                      "reveal_update")
    s, n = contract.secagg, len(contract.sites)
    if s.enabled:
        check_cohort(n, s.threshold, s.survivors, policy.colluding)
    for bound in {s.range, *(own.range for own in s.ranges)}:
        Encoding(bits=s.bits, ring=s.ring, cohort=n, ranges=((1, bound),))
    contract.mechanism(site)


def _refuse(what: str, cause: str, key: str) -> Refused:
    return Refused(f"policy.{what}", cause, f"Ask for a tighter contract; only the site changes {key} in its policy.")
