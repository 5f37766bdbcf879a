"""The site bundle: one lineage of a site in full, made at the site (`fl-client evidence export`); docs/evidence-format.md.

It holds every job on the lineage, so it is for the site's own auditor: other consortia's jobs are in it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from pydantic import Field

from privacy.bundle import MAX_FILES, Layout, RawBundle, read_bundle
from privacy.contract import Name, Sha256
from privacy.errors import Refused, UsageError
from privacy.files import FileLayer
from privacy.identity import Signer
from privacy.predicates import KINDS, Run, Strict
from privacy.statements import make

MANIFEST_TYPE = "urn:consilo:site-manifest:1"
MARK = "ledger.jsonl"  # only a site bundle has it
_NAME = r"[a-z0-9][a-z0-9_.-]{0,62}"
LAYOUT = Layout(
    folders=("certificates", "contracts", "statements", "witness"),
    names=re.compile(rf"manifest\.json|ledger\.jsonl|certificates/{_NAME}\.pem|contracts/[0-9a-f]{{64}}\.json"
                     rf"|contracts/[0-9a-f]{{64}}\.(approval|signature)\.json|witness/(witness|witness-conflict)\.json"
                     rf"|statements/[0-9]{{6}}-({'|'.join(KINDS)})\.json"))


class SiteManifest(Strict):
    site: Name
    lineage: Run
    files: dict[str, Sha256] = Field(max_length=MAX_FILES)


def is_site_bundle(folder: Path) -> bool:
    return (folder / MARK).is_file()


def read_site_bundle(folder: Path) -> RawBundle:
    """Raises as `read_bundle`."""
    return read_bundle(folder, LAYOUT)


def write_site_bundle(folder: Path, files: Mapping[str, bytes], *, site: str, lineage: str, signer: Signer) -> Path:
    """Write files and manifest into a new folder. Raises Refused `bundle.sealed` (it isn't empty); UsageError
    `bundle.name`."""
    if folder.exists() and any(folder.iterdir()):
        raise Refused("bundle.sealed", "The folder isn't empty.", "Write to a new folder.")
    layer = FileLayer()
    for name, data in sorted(files.items()):
        if not LAYOUT.names.fullmatch(name) or name == "manifest.json":
            raise UsageError("bundle.name", "A name doesn't fit the bundle's format.", "Use a-z, 0-9 and -.")
        (folder / name).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        layer.write_atomic(folder / name, data)
    said = SiteManifest(site=site, lineage=lineage,
                        files={name: hashlib.sha256(data).hexdigest() for name, data in files.items()})
    ledger = said.files[MARK]
    layer.write_atomic(folder / "manifest.json", make(signer, MANIFEST_TYPE, [(MARK, ledger)], said.model_dump()))
    return folder
