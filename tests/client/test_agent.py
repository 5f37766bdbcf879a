"""The agent put together: what is refused at start leaves no promise in the ledger."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conf import load_settings
from fl_client import agent
from privacy import ca
from privacy.errors import Refused
from privacy.identity import FileSigner, Role, create_request
from privacy.ledger import Ledger


def test_a_site_that_cannot_train_holds_no_budget(tmp_path: Path, tiny_contract: Callable[..., Any],
                                                  tiny_data: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer refuses the model: the contract's rounds must stay free for another job."""
    ca.init(tmp_path / "ca", "Test")
    ca.issue(tmp_path / "ca", create_request(tmp_path / "keys", "site-a", "Hospital A"), Role.SITE)
    issued = tmp_path / "ca" / "issued" / "site-a"
    signer = FileSigner(tmp_path / "keys" / "sign.key", issued / "sign.pem")
    contract = tiny_contract()
    sites = tuple(s.model_copy(update={"signer": signer.fingerprint}) if s.name == "site-a" else s for s in contract.sites)
    (tmp_path / "contract.json").write_bytes(contract.model_copy(update={"sites": sites}).to_bytes())
    (tmp_path / "policy.yaml").write_text("approver: test\n")
    settings = load_settings([
        "site.name=site-a", f"site.data={tiny_data['site-a']}", f"site.keys={tmp_path}/keys", f"site.certificates={issued}",
        f"site.contract={tmp_path}/contract.json", f"site.policy={tmp_path}/policy.yaml", f"site.state={tmp_path}/state"])

    def refuse(request: dict[str, Any], *, limit_s: float) -> None:
        raise Refused("model.digest", "The base model differs.", "Install the right one.")

    monkeypatch.setattr(agent, "TrainerProcess", refuse)
    with pytest.raises(Refused, match=r"model\.digest"):
        agent.Agent(settings)
    with Ledger.open(tmp_path / "state" / "ledger.jsonl", signer) as ledger:
        assert ledger.summary().encumbrances == ()
