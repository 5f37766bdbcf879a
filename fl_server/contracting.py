"""From configuration to contract: digests of the real model, public sizes, calibrated noise, certificates of the roster."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

from conf.settings import Settings
from privacy import __version__
from privacy.calibration import calibrate_schedule
from privacy.contract import (
    Contract,
    DataTerms,
    ModelTerms,
    PrivacyTerms,
    SecAggTerms,
    SiteTerms,
    validate,
)
from privacy.errors import Refused, UsageError
from privacy.mechanism import default_delta
from privacy.secagg.encoding import Encoding
from privacy.secagg.transcript import check_cohort, least_survivors, least_threshold
from privacy.signing import code_digest
from strategies.base import ranks
from strategies.causal import metrics
from strategies.folder import folder_digests
from strategies.optimizers import optimizer
from strategies.records import public_labels
from strategies.rules import rule


def make_contract(settings: Settings, signers: Mapping[str, str]) -> Contract:
    """signers: fingerprint of each site's Ed25519 certificate. Everything is refused here that can't work later.

    Raises UsageError `contract.*`, `dp.*`, `rule.*`, `encoding.overflow`; Refused `secagg.cohort`, `secagg.threshold`,
    `secagg.survivors`.
    """
    names = sorted(settings.data.sites)
    if not names:
        raise UsageError("contract.no_sites", "The cohort is empty.", "Name the sites under data.sites.")
    if missing := [n for n in names if n not in signers]:
        raise UsageError("contract.no_certificate", f"The roster has no certificate for {', '.join(missing)}.",
                         "Issue certificates with fl-ca, and make a new roster.")
    combine = rule(settings.rule.name, secure=settings.secure_aggregation.enabled)
    optimizer(settings.rule.optimizer)
    model = _model(settings)
    contract = Contract(
        run=secrets.token_hex(16), purpose=settings.purpose, sign_off=settings.contract.sign_off,
        expires=_expiry(settings.contract.days), code_version=__version__, code=code_digest(), model=model,
        metrics=("accuracy",) if model.chat is None else metrics(model.chat), data=_data(settings),
        lora=settings.lora.model_copy(update={"seed": settings.seed}), rule=settings.rule,
        privacy=_privacy(settings), secagg=_secagg(settings, len(names)),
        sites=tuple(_site(settings, name, signers[name]) for name in names))
    ranks(combine, contract)
    sites = tuple(s.model_copy(update={"sigma": _sigma(settings, contract, s)}) for s in contract.sites)
    return validate(Contract, contract.model_copy(update={"sites": sites}).model_dump(mode="json"))


def _model(settings: Settings) -> ModelTerms:
    if settings.model.packing:
        raise Refused("model.packing", "Packing puts several records into one row, whose gradient is then no one's own.",
                      "Leave model.packing false; model.max_length sets what a row costs.")
    digests = folder_digests(Path(settings.model.path))
    return validate(ModelTerms, digests._asdict() | settings.model.model_dump(exclude={"name", "path", "packing"}))


def _data(settings: Settings) -> DataTerms:
    data, classes = settings.data, settings.model.task == "classification"
    fields = [*(("text", "label") if classes else ("prompt", "answer")),
              *(["person"] if settings.privacy.unit == "person" else [])]
    if data.labels and not classes:
        raise UsageError("contract.labels", "Answers of a causal language model are no labels.", "Leave data.labels null.")
    labels = _labels(settings) if classes else ()
    return validate(DataTerms, {"name": data.name, "labels": labels, "floor": data.floor, "fields": fields})


def _expiry(days: int) -> str:
    return (datetime.now(UTC) + timedelta(days=days)).strftime("%Y-%m-%dT%H:%M:%SZ")


def _privacy(settings: Settings) -> PrivacyTerms:
    return PrivacyTerms.model_validate(settings.privacy.model_dump(exclude={"delta", "sigma"}))


def _secagg(settings: Settings, n: int) -> SecAggTerms:
    s, p = settings.secure_aggregation, settings.privacy
    threshold = s.threshold or min(n, least_threshold(n, s.colluding))
    survivors = s.survivors or min(n, least_survivors(threshold, s.colluding))
    bound = s.range or 2 * p.clip * settings.rule.local_lr * p.local_steps
    terms = SecAggTerms(enabled=s.enabled, threshold=threshold, survivors=survivors, ring=s.ring, bits=s.bits, range=bound,
                        ranges=s.ranges)
    if s.enabled:
        check_cohort(n, threshold, survivors, s.colluding)
    Encoding(bits=terms.bits, ring=terms.ring, cohort=n, ranges=((1, bound),))
    return terms


def _site(settings: Settings, name: str, signer: str) -> SiteTerms:
    declared, p = settings.data.sites[name], settings.privacy
    if declared.n_decl is None:
        raise UsageError("contract.n_decl", f"{name} has no declared number of units.",
                         f"Set data.sites.{name}.n_decl to its size, rounded to one significant digit.")
    delta = p.delta if p.delta is not None else default_delta(declared.n_decl)
    if delta >= 1 / declared.n_decl:
        raise UsageError("dp.parameter", f"delta = {delta} is not below 1 / {declared.n_decl} at {name}.",
                         "Leave privacy.delta null, or lower it.")
    sigma = 0.0 if p.trust == "none" else p.sigma or 1.0
    return SiteTerms(name=name, signer=signer, n_decl=declared.n_decl, weight=declared.weight, delta=delta, sigma=sigma)


def _sigma(settings: Settings, draft: Contract, site: SiteTerms) -> float:
    """The one given, or the least with which every way of spending the rounds and retries keeps epsilon. Building the
    draft's mechanisms refuses what no mechanism may have; with its sigma of 1, theirs is the schedule's noise."""
    plans = [[(m.q, m.sigma, m.steps * rounds, m.group) for m, rounds in plan] for plan in draft.plans(site.name)]
    p = settings.privacy
    return site.sigma if p.epsilon is None or p.sigma is not None else calibrate_schedule(plans, site.delta, p.epsilon)


def _labels(settings: Settings) -> tuple[str, ...]:
    """From the configuration, or from the public split: never from a site's data."""
    if settings.data.labels is not None:
        return settings.data.labels
    split = settings.data.evaluation
    if split.file is None:
        raise UsageError("contract.labels", "The labels are not known.",
                         "Set data.labels, or data.evaluation.file to a public labelled file.")
    return public_labels(Path(split.file), text=split.text, label=split.label)
