"""What is released: a wheel of exactly these files, a lock that holds everything, nothing that unpickles or evaluates."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from importlib.util import find_spec
from pathlib import Path

import pytest

from privacy.canonical import parse

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = ("conf", "fl_client", "fl_server", "privacy", "simulations", "strategies")
SHIPPED = re.compile(rf"({'|'.join(PACKAGES)})/(.*\.pyi?|.*\.j2|control/.*\.proto)|conf/.*\.yaml")
LOCKED = re.compile(r"^([a-z0-9.-]+)==([^ ;]+)[^\n]*((?:\n    --hash=sha256:[0-9a-f]{64}[^\n]*)+)", re.M)


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [name for name in listed if (ROOT / name).is_file()]


def name_of(requirement: str) -> str:
    return re.split(r"[<>=!~;\[ ]", requirement, maxsplit=1)[0].lower().replace("_", "-")


def locked(*files: str) -> dict[str, str]:
    """Version by name; each has a hash."""
    return {name: version for file in files for name, version, _ in LOCKED.findall((ROOT / file).read_text())}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from the files that git knows, so that nothing is left in the checkout and nothing stray gets in."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in tracked():
        if not name.startswith(("docs/", "deploy/")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, source / name)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps",
                    "--no-index", "--no-build-isolation", "--wheel-dir", out, source],
                   check=True, capture_output=True, timeout=250)
    (built,) = out.iterdir()
    return zipfile.ZipFile(built)


def test_the_wheel_holds_exactly_the_packages(wheel: zipfile.ZipFile) -> None:
    info = f"consilo-{PROJECT['project']['version']}.dist-info/"
    beside = {info + name for name in (
        "METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt", "licenses/LICENSE")}
    shipped = {name for name in tracked() if SHIPPED.fullmatch(name)}
    assert set(wheel.namelist()) == shipped | beside
    assert {"conf/config.yaml", "privacy/control/consilo_control.proto", "privacy/templates/report.html.j2"} <= shipped
    assert not [name for name in shipped if "test" in Path(name).stem.split("_")]


def test_the_base_install_is_the_verifiers(wheel: zipfile.ZipFile) -> None:
    meta = Parser().parsestr(wheel.read(f"consilo-{PROJECT['project']['version']}.dist-info/METADATA").decode())
    base = {name_of(r) for r in meta.get_all("Requires-Dist", []) if "extra ==" not in r}
    assert base == {"cryptography", "jinja2", "matplotlib", "numpy", "pydantic", "rfc8785", "rich", "scipy", "typer"}
    assert meta["License-Expression"] == "Apache-2.0" and meta["Requires-Python"] == ">=3.11"


def test_the_lock_holds_everything_and_honours_the_constraints() -> None:
    """Except torch, which has a lock of its own; no path, no address, no build for a GPU."""
    found, text = locked("requirements.lock"), (ROOT / "requirements.lock").read_text()
    extras = PROJECT["project"]["optional-dependencies"]
    groups = PROJECT["project"]["dependencies"], extras["site"], extras["coordinator"], extras["sim"]
    direct = {name_of(requirement) for group in groups for requirement in group} - {"consilo"}
    assert direct - found.keys() == {"torch"}
    assert locked("torch-cpu.lock").keys() == {"torch"}
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.M))
    wrong = {n: v for n, v in pinned.items() if found.get(n.lower().replace("_", "-"), v) != v}
    assert wrong == {}
    assert locked("torch-cpu.lock")["torch"].split("+")[0] == pinned["torch"]
    entries = re.findall(r"^[a-z0-9][^\n]*", text, re.M)
    assert len(entries) == len(found) > 60 and not re.search(r"file:|https?://|@ |^-", text, re.M)
    assert not [n for n in found if n.startswith(("nvidia-", "triton", "cuda-"))]


def test_the_bill_of_materials_names_everything_that_is_locked(tmp_path: Path) -> None:
    if find_spec("cyclonedx_py") is None:
        pytest.skip("cyclonedx-bom isn't installed: pip install -e '.[release]'")
    recipe = re.search(r"^sbom:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)
    assert recipe
    command = recipe[1].replace("\t@", "").replace("\\\n", " ").replace("$(BIN)/", f"{Path(sys.executable).parent}/")
    command = command.replace("dist", str(tmp_path))
    subprocess.run(["bash", "-ec", command], cwd=ROOT, check=True, capture_output=True, timeout=250)
    bill = parse((tmp_path / "sbom.cdx.json").read_bytes())
    assert bill["bomFormat"] == "CycloneDX" and bill["specVersion"] >= "1.5"
    assert bill["metadata"]["component"]["name"] == "consilo"
    named = {c["name"]: c["version"] for c in bill["components"]}
    assert named == locked("requirements.lock", "torch-cpu.lock")
    assert all(c["purl"].startswith(f"pkg:pypi/{c['name']}@") for c in bill["components"])


PLANTED = {
    "import pickle\n": "TID251", "from pickle import loads\n": "TID251", "import marshal\n": "TID251",
    "import shelve\n": "TID251", "import joblib\n": "TID251", "import torch\n\ntorch.load('a')\n": "TID251",
    "import torch as t\n\nt.save(1, 'a')\n": "TID251",
    "from torch import load\n\nload('a')\n": "TID251", "import numpy as np\n\nnp.load('a')\n": "TID251",
    "eval('1')\n": "S307", "exec('1')\n": "S102", "import yaml\n\nyaml.load('a', yaml.Loader)\n": "S506",
    "import subprocess\n\nsubprocess.run('ls', shell=True)\n": "S602"}


def test_what_unpickles_or_evaluates_is_refused_by_the_linter() -> None:
    ruff = shutil.which("ruff", path=str(Path(sys.executable).parent))
    assert ruff
    for package in ("privacy", "fl_client"):
        for text, rule in PLANTED.items():
            command = [ruff, "check", "--output-format", "concise", "--stdin-filename", f"{package}/planted.py", "-"]
            found = subprocess.run(command, cwd=ROOT, input=text, capture_output=True, text=True, check=False, timeout=60)
            assert found.returncode == 1 and f" {rule} " in found.stdout, (text, found.stdout)
    excused = [line for name in tracked() if SHIPPED.fullmatch(name) for line in (ROOT / name).read_text().splitlines()
               if re.search(r"noqa:.*(TID251|S102|S307|S301|S506|S60[245])", line)]
    assert len(excused) == 2 and all("np.load(" in line and "allow_pickle=False" in line for line in excused)
