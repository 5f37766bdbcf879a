"""Privacy maths and evidence: mechanism, accounting, ledger, secure aggregation, identity, statements, verification.

Nothing here knows a transport, Flower or hydra. torch and opacus are imported by `dpsgd` alone, and lazily.
"""

__version__ = "0.1.0"
