"""Rules that are the mean of the changes of named tensors, and nothing else."""

from __future__ import annotations

from strategies.base import A, B, Rule


class Ffa(Rule):
    """FFA-LoRA (arXiv 2403.12313): A frozen, shared and orthonormal; the mean of B is the mean of the products.

    FedSVD under plain SGD is the same rule, with the orthonormal A that we start from.
    """

    name = "ffa"

    def trains(self, tensor: str, round_no: int | None = None) -> bool:
        return not tensor.endswith(A)


class FedIt(Rule):
    """FedIT (arXiv 2305.05644): mean of A and mean of B; linear, but the mean of products is not their product."""

    name, exact = "fedit", False

    def trains(self, tensor: str, round_no: int | None = None) -> bool:
        return True


class RoLora(Rule):
    """RoLoRA (arXiv 2502.01755): B in odd rounds, A in even ones, so that one factor is everyone's; the head in all.

    B goes first: it starts at zero, where A has no gradient.
    """

    name = "rolora"

    def trains(self, tensor: str, round_no: int | None = None) -> bool:
        if round_no is None:
            return True
        return not tensor.endswith(A if round_no % 2 else B)
