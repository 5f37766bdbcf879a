"""Rules: how updates combine (the noun `Rule`). A rule is a few pure functions on named tensors and one flat vector.

`linear` rules only ever need the weighted mean of the sites' vectors, so a secure sum serves them; a rule that isn't
linear is refused under secure aggregation, with the linear alternative named.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from privacy.errors import UsageError, nearest


class Rule(ABC):
    """What each site trains and what the mean of the sites' changes does to the adapter."""

    name: str
    linear: bool
    instead: str = ""  # the linear rule to use where this one isn't

    @abstractmethod
    def trains(self, tensor: str) -> bool:
        """Whether a site trains (and sends the change of) the tensor of that name."""


class Ffa(Rule):
    """FFA-LoRA (arXiv 2403.12313): A frozen, shared and orthonormal; the mean of B is the mean of the products."""

    name, linear = "ffa", True

    def trains(self, tensor: str) -> bool:
        return ".lora_A." not in tensor


class FedIt(Rule):
    """FedIT (arXiv 2305.05644): mean of A and mean of B; linear, but the mean of products is not their product."""

    name, linear = "fedit", True

    def trains(self, tensor: str) -> bool:
        return True


RULES: dict[str, Rule] = {rule.name: rule for rule in (Ffa(), FedIt())}


def rule(name: str, *, secure: bool) -> Rule:
    """Look a rule up. Raises UsageError `rule.unknown`, `rule.not_linear`."""
    try:
        found = RULES[name]
    except KeyError:
        raise UsageError("rule.unknown", f"There is no rule {name!r}.", nearest(name, RULES)) from None
    if secure and not found.linear:
        raise UsageError("rule.not_linear", f"Rule {name!r} needs single updates, which secure aggregation hides.",
                         f"Use rule={found.instead}, which is linear.")
    return found
