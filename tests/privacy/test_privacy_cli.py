"""fl-privacy: its command contract (exit codes, JSON keys), in a full and in a base install."""

import json
import subprocess
import sys
import types
from dataclasses import dataclass

import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from ledger_fixture import LINEAGE, OTHER, RUN, SelfSigner, create, reserve

from privacy import crosscheck
from privacy.cli import app
from privacy.cli_edge import run

SIGNER = SelfSigner()


@pytest.fixture
def call(capsys):
    """Run a command; exit code and the last line of stdout as JSON (or all of stdout)."""

    def invoke(*arguments: str):
        code = run(app, arguments)
        out = capsys.readouterr().out
        return (code, json.loads(out.splitlines()[-1])) if "--json" in arguments else (code, out)

    return invoke


@pytest.fixture
def ledger_file(tmp_path):
    path = tmp_path / f"{LINEAGE}.jsonl"
    with create(path, SIGNER) as ledger:
        ledger.commit(reserve(ledger, 1), 1)
        reserve(ledger, 1, run=OTHER)
        (tmp_path / "extract.jsonl").write_bytes(ledger.extract(RUN))
    (tmp_path / "site.pem").write_bytes(SIGNER.certificate.public_bytes(Encoding.PEM))
    (tmp_path / "rival.pem").write_bytes(SelfSigner().certificate.public_bytes(Encoding.PEM))
    return path


GOLDEN = ("account", "--q", "0.01", "--sigma", "1", "--steps", "1000", "--delta", "1e-5")


def test_account_with_extras_reports_dp_accounting_and_cross_checks(call):
    code, out = call(*GOLDEN, "--json")
    assert code == 0 and out.keys() == {"epsilon", "accountant", "cross_check"}
    assert out["accountant"] == "dp-accounting-pld/0.6.0" and out["epsilon"] == 1.8283  # 1.82824..., rounded up
    assert abs(out["cross_check"]["prv"] - 1.8282) < 2e-3 and 2.10 < out["cross_check"]["rdp"] < 2.11


def test_account_in_a_base_install_answers_by_itself(call, monkeypatch):
    monkeypatch.setattr(crosscheck, "available", lambda: False)
    code, out = call(*GOLDEN, "--json")
    assert (code, out) == (0, {"epsilon": 1.8283, "accountant": "consilo-pld/1", "cross_check": None})
    code, text = call(*GOLDEN)
    assert code == 0 and "1.8283" in text and "consilo-pld/1" in text


def test_account_of_a_group(call, monkeypatch):
    flags = ("account", "--q", "0.5", "--sigma", "60", "--steps", "3", "--delta", "1e-5", "--group", "2", "--json")
    code, out = call(*flags)
    assert code == 0 and out["cross_check"] == {"prv": None, "rdp": None}  # they know no groups
    monkeypatch.setattr(crosscheck, "available", lambda: False)
    assert abs(call(*flags)[1]["epsilon"] - out["epsilon"]) <= 2e-4
    assert call(*flags, "--group", "0")[0] == 2


@pytest.mark.parametrize(("change", "code"), [
    (("--q", "2"), "dp.parameter"), (("--sigma", "0"), "dp.parameter"), (("--sigma", "nan"), "dp.parameter"),
    (("--delta", "1"), "dp.parameter"), (("--steps", "0"), "cli.usage"), (("--sigma", "0.001"), "dp.unbounded"),
    (("--adjacency", "replace_one"), "cli.usage")])
def test_account_refuses_what_it_cannot_answer(call, change, code):
    exit_code, out = call(*GOLDEN, *change, "--json")
    assert exit_code == 2 and out["error"].keys() == {"code", "cause", "mend"} and out["error"]["code"] == code


def test_plan(call):
    code, out = call("plan", "--records", "500", "--batch", "250", "--rounds", "21", "--epsilon", "8", "--json")
    assert code == 0 and out.keys() == {
        "sigma", "epsilon", "delta", "steps", "q", "noise_to_signal", "epsilon_at"}
    assert out["epsilon"] <= 8.0 and (out["q"], out["steps"], out["delta"]) == (0.5, 21, 1e-5)
    assert out["noise_to_signal"] == out["sigma"] / 250
    again = call("plan", "--records", "500", "--q", "0.5", "--rounds", "7", "--local-steps", "3", "--sigma",
                 str(out["sigma"]), "--json")
    assert again == (0, out)
    code, text = call("plan", "--records", "500", "--q", "0.5", "--rounds", "2", "--sigma", "9")
    assert code == 0 and "noise_to_signal" in text


def test_plan_for_persons_and_at_several_deltas(call):
    flags = ("plan", "--records", "2000", "--q", "0.05", "--rounds", "10", "--epsilon", "3", "--unit", "person")
    code, out = call(*flags, "--k-max", "4", "--json")
    assert code == 0 and out["epsilon_at"].keys() == {"1e-4", "1e-5", "1e-6", "1e-7"}
    assert out["epsilon_at"]["1e-5"] == out["epsilon"] <= 3.0 < out["epsilon_at"]["1e-7"]
    assert call(*flags, "--json")[1]["sigma"] < out["sigma"] / 1.5  # persons sampled whole
    code, text = call(*flags, "--k-max", "4")
    assert code == 0 and "1e-7" in text
    assert call(*flags, "--unit", "record", "--k-max", "4", "--json")[0] == 2


@pytest.mark.parametrize("flags", [
    ("--rounds", "5", "--epsilon", "8"), ("--rounds", "5", "--q", ".5", "--batch", "9", "--epsilon", "8"),
    ("--rounds", "5", "--q", ".5"), ("--rounds", "5", "--q", ".5", "--epsilon", "8", "--sigma", "1"),
    ("--rounds", "5", "--q", ".5", "--epsilon", "0"), ("--rounds", "5", "--batch", "501", "--epsilon", "8"),
    ("--rounds", "5", "--batch", "0", "--epsilon", "8"), ("--rounds", "0", "--q", ".5", "--epsilon", "8"),
    ("--rounds", "5", "--q", ".5", "--epsilon", "8", "--delta", "0.01")])
def test_plans_that_cannot_be_exit_2(call, flags):
    code, out = call("plan", "--records", "500", *flags, "--json")
    assert code == 2 and "error" in out


def test_ledger_check(call, ledger_file):
    certificate = ("--certificate", str(ledger_file.with_name("site.pem")))
    code, out = call("ledger", "check", str(ledger_file), *certificate, "--json")
    assert code == 0 and out["ok"] and out["signatures_checked"] and not out["torn_line"]
    assert out["recomputed"] == out["epsilon"] > 0
    assert out["records"] == out["head"]["seq"] + 1 == len(ledger_file.read_bytes().splitlines())
    code, text = call("ledger", "check", str(ledger_file))
    assert code == 0 and "signatures NOT checked" in text
    code, out = call("ledger", "check", str(ledger_file.with_name("extract.jsonl")), *certificate, "--json")
    assert code == 0 and out["recomputed"] is None
    hidden = [line for line in ledger_file.with_name("extract.jsonl").read_bytes().splitlines() if b'"body"' not in line]
    assert out["commitments"] == len(hidden) >= 1
    code, out = call("ledger", "check", str(ledger_file), "--certificate", str(ledger_file.with_name("rival.pem")),
                     "--json")
    assert code == 1 and out["error"]["code"] == "ledger.broken"


def test_ledger_check_reads_while_a_job_holds_the_lease(call, ledger_file):
    from privacy.ledger import Ledger

    complete = len(ledger_file.read_bytes().splitlines())
    with Ledger.open(ledger_file, SIGNER), ledger_file.open("ab") as rest:
        rest.write(b'{"body"')  # an append under way
        rest.flush()
        code, out = call("ledger", "check", str(ledger_file), "--json")
    assert code == 0 and out["torn_line"] and out["records"] == complete
    assert ledger_file.read_bytes().endswith(b'{"body"')  # nothing is changed


def test_ledger_check_recomputes_what_a_site_signed_too_low(call, tmp_path, monkeypatch):
    """A modified client that halves every epsilon it writes: chain and signatures hold, the figures don't."""
    import privacy.ledger

    path, honest = tmp_path / "low.jsonl", privacy.ledger.decimal_up
    monkeypatch.setattr(privacy.ledger, "decimal_up", lambda eps: honest(eps / 2))
    with create(path, SIGNER) as ledger:
        reserve(ledger, 1)
    code, out = call("ledger", "check", str(path), "--json")
    assert code == 1 and out["error"]["code"] == "ledger.epsilon"


def test_ledger_show(call, ledger_file):
    code, out = call("ledger", "show", str(ledger_file), "--json")
    assert code == 0 and out["lineage"] == LINEAGE and out["cap"] == 8.0
    assert [(r["run"], r["round"], r["planned_steps"], r["executed_steps"]) for r in out["reserves"]] == [
        (RUN, 1, 1, 1), (OTHER, 1, 1, None)]
    code, text = call("ledger", "show", str(ledger_file))
    assert code == 0 and LINEAGE in text
    assert call("ledger", "show", str(ledger_file.with_name("missing")), "--json")[0] == 2


@dataclass
class StubVerdict:
    verdict: str

    def as_dict(self):
        return {"verdict": self.verdict, "anchored": self.verdict != "UNANCHORED",
                "steps": [{"name": "files", "ok": True, "detail": "3 files"}]}


@pytest.mark.parametrize(("verdict", "want"), [("PASS", 0), ("FAIL", 1), ("UNANCHORED", 1)])
def test_verify_exits_0_on_pass_only(call, monkeypatch, tmp_path, verdict, want):
    asked = []
    stub = types.ModuleType("privacy.verify")
    stub.verify_bundle = lambda bundle, ca: asked.append((bundle, ca)) or StubVerdict(verdict)
    monkeypatch.setitem(sys.modules, "privacy.verify", stub)
    code, out = call("verify", str(tmp_path), "--ca", "ab" * 32, "--json")
    assert (code, out) == (want, StubVerdict(verdict).as_dict()) and asked == [(tmp_path, "ab" * 32)]
    code, text = call("verify", str(tmp_path))
    assert code == want and text.splitlines()[-1] == verdict and asked[1][1] is None


def test_report_writes_where_it_is_told(call, monkeypatch, tmp_path):
    stub = types.ModuleType("privacy.report")
    stub.write_report = lambda bundle, out, ca=None: out / "report.html"
    monkeypatch.setitem(sys.modules, "privacy.report", stub)
    code, out = call("report", "bundle", "--out", str(tmp_path), "--json")
    assert (code, out) == (0, {"report": str(tmp_path / "report.html")})


def test_help_imports_neither_torch_nor_scipy():
    script = ("import sys; from privacy.cli import app; from privacy.cli_edge import run; run(app, ['plan', '--help']);"
              "sys.exit(any(m in sys.modules for m in ('torch', 'scipy', 'dp_accounting', 'opacus', 'matplotlib')))")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "noise_to_signal" in done.stdout


def test_the_own_accountant_and_the_ledger_work_without_the_extras():
    """What the offline verifier needs, with dp-accounting, opacus and torch made unimportable."""
    script = ("import sys\n"
              "class Missing:\n"
              "    def find_spec(self, name, path=None, target=None):\n"
              "        if name.split('.')[0] in ('torch', 'flwr', 'opacus', 'dp_accounting', 'hydra'):\n"
              "            raise ModuleNotFoundError(name)\n"
              "sys.meta_path.insert(0, Missing())\n"
              "import privacy.calibration, privacy.ledger\n"
              "print(privacy.calibration.calibrate_sigma(.5, 20, 1e-5, 8.0))")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and abs(float(done.stdout) - 1.553) < 0.004, done.stderr
