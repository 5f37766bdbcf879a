"""Refuse to start when one of our import names belongs to something else (docs/adr/0001-import-names.md)."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from importlib.util import find_spec
from pathlib import Path

from privacy.errors import Refused

DISTRIBUTION = "consilo"
PACKAGES = ("conf", "fl_client", "fl_server", "privacy", "simulations", "strategies")


def check() -> None:
    """Raises Refused `install.shadowed`, naming the package and who owns it or where it lies.

    All packages must lie beside this one, and no other installed distribution may claim one of their names.
    """
    try:
        distribution(DISTRIBUTION)
    except PackageNotFoundError as e:
        raise Refused("install.missing", "The distribution consilo isn't installed in this environment.",
                      "pip install it; running from a bare checkout is not supported.") from e
    owners, home = packages_distributions(), Path(__file__).resolve().parent.parent
    for name in PACKAGES:
        others = sorted(set(owners.get(name, ())) - {DISTRIBUTION})
        if others:
            raise _shadowed(name, f"also belongs to the distribution {others[0]}")
        found = find_spec(name)
        origin = Path(found.origin).resolve().parent if found and found.origin else None
        if origin != home / name:
            raise _shadowed(name, f"is found at {origin or 'no place'} first")


def _shadowed(name: str, what: str) -> Refused:
    return Refused("install.shadowed", f"The import name {name!r} {what}.",
                   "Install consilo in an environment of its own, and start it from another folder.")
