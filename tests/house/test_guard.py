"""CASES 32 of the start-up: another owner of an import name is named, and nothing starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CHECK = "from privacy import guard; guard.check(); print('started')"


def run(folder: Path, *, safe_path: bool) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *(["-P"] if safe_path else []), "-c", CHECK], cwd=folder, capture_output=True,
                          text=True, timeout=60)


def test_installed_environment_starts(tmp_path: Path) -> None:
    assert run(tmp_path, safe_path=True).stdout == "started\n"


@pytest.mark.case(32)
def test_attack_folder_shadows_a_package(tmp_path: Path) -> None:
    """A `strategies/` in the current folder: refused where it would be imported, ignored with -P."""
    (tmp_path / "strategies").mkdir()
    (tmp_path / "strategies" / "__init__.py").write_text("")
    refused = run(tmp_path, safe_path=False)
    assert "install.shadowed" in refused.stderr and "'strategies'" in refused.stderr
    assert run(tmp_path, safe_path=True).stdout == "started\n"


@pytest.mark.case(32)
def test_attack_another_distribution_owns_a_name(tmp_path: Path) -> None:
    info = tmp_path / "evil-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: evil\nVersion: 1.0\n")
    (info / "top_level.txt").write_text("privacy\n")
    done = subprocess.run([sys.executable, "-P", "-c", f"import sys; sys.path.append({str(tmp_path)!r}); {CHECK}"],
                          capture_output=True, text=True, timeout=60)
    assert "install.shadowed" in done.stderr and "evil" in done.stderr
