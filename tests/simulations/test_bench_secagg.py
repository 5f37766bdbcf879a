"""`fl-simulate bench secagg`: what it prints and that its sums are exact. No timing is asserted."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.common import bytes_to_ndarray

from privacy import cli_edge
from privacy.secagg.coordinator import CoordinatorSession
from privacy.secagg.encoding import Encoding
from simulations import bench, bench_baselines, bench_secagg
from simulations.adversary import Consortium
from simulations.bench import Samples, rounded
from simulations.bench_baselines import Wire, as_message, fedavg, plain_content, secaggplus
from simulations.cli import app

SMALL = ["bench", "secagg", "--sites", "4", "--dim", "1000", "--drop", "1", "--repeats", "2"]
CONTRACT = {"client_ns_per_element", "client_ns_per_element_per_neighbour", "upload_ratio_fp32", "server_ratio_plain",
            "max_error", "error_bound"}
CALLS = {"client encode": 4, "client m3": 4, "client m5": 3, "server take_m3": 4, "server take_m5": 3, "server unmask": 1}


@pytest.fixture
def consortium(tmp_path: Path) -> Consortium:
    return Consortium(tmp_path, 4)


def _json(capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, dict[str, Any]]:
    code = cli_edge.run(app, [*SMALL, *more, "--json"])
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_result_holds_what_the_contract_names_and_its_sums_are_exact(capsys: pytest.CaptureFixture[str]) -> None:
    code, found = _json(capsys)
    assert (code, found["exact"]) == (0, True)
    assert found.keys() >= CONTRACT | {"client_ns", "client_limit_ns", "within", "goals", "stages", "environment", "tenseal"}
    assert found["max_error"] <= found["error_bound"] < 1.2e-7 + 3.1e-8
    assert found["client_limit_ns"] == pytest.approx(5 + 1.6 * 3)
    assert found["upload_ratio_fp32"] >= found["upload_ratio_fp32_median"] > 1
    assert found["secaggplus"]["upload_ratio_fp32"] > 2
    assert len(found["samples"]["fedavg"]) == len(found["samples"]["server drop"]) == found["repeats"] == 2
    assert found["environment"]["versions"].keys() == {"numpy", "cryptography", "flwr", "tenseal"}
    for name, goal in found["goals"].items():
        assert (goal["value"], goal["met"]) == (found[name], goal["value"] <= goal["limit"])
    assert found["within"] == (found["goals"]["client_ns"]["met"] and found["goals"]["client_session_ns"]["met"])


def test_a_ring_of_16_bits_takes_fewer_bits_to_fit(capsys: pytest.CaptureFixture[str]) -> None:
    code, found = _json(capsys, "--ring", "16", "--repeats", "1")
    assert (code, found["exact"], found["bits"], found["dtype"]) == (0, True, 14, "uint16")
    assert found["max_error"] <= found["error_bound"]


def test_an_inexact_sum_exits_with_1(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    unmask = CoordinatorSession.unmask

    def off_by_one(self: CoordinatorSession) -> Any:
        total = unmask(self)
        total[-1] += 1
        return total

    monkeypatch.setattr(CoordinatorSession, "unmask", off_by_one)
    code, found = _json(capsys, "--repeats", "1")
    assert (code, found["exact"]) == (1, False)


def test_a_biased_encoding_misses_the_error_goal(capsys: pytest.CaptureFixture[str],
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    encode = Encoding.encode
    monkeypatch.setattr(Encoding, "encode", lambda *given, **how: encode(*given, **how) + np.uint32(1))
    code, found = _json(capsys, "--repeats", "1")
    assert (code, found["exact"], found["goals"]["max_error"]["met"]) == (0, True, False)


@pytest.mark.parametrize("wrong", [("--drop", "2"), ("--ring", "8"), ("--sites", "2"), ("--dim", "0")])
def test_impossible_terms_are_usage_errors(wrong: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    code, found = _json(capsys, *wrong)
    assert (code, found["error"]["code"]) == (2, "cli.usage")


def test_people_get_the_goals_and_the_baselines(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli_edge.run(app, [*SMALL, "--repeats", "1"]) == 0
    out = capsys.readouterr().out
    assert "sums exact: yes" in out
    assert all(word in out for word in ("server_ratio_plain", "SecAgg+", "FedAvg", "TenSEAL", "client m5"))


def test_a_session_drops_sites_after_the_request_and_recovers_their_masks(consortium: Consortium) -> None:
    updates = [np.full(10, 0.1 * u, np.float32) for u in range(4)]
    session = bench_secagg.play(consortium, consortium.offer(4, 3, 10), updates, 1)
    assert session.exact
    assert list(session.upload) == [0, 1, 2]
    assert session.max_error <= session.error_bound
    assert {name: len(session.samples.taken[name]) for name in CALLS} == CALLS


def test_a_ring_of_16_bits_halves_the_vector_on_the_wire(consortium: Consortium) -> None:
    updates = [np.zeros(1000, np.float32)] * 4
    wide, narrow = (bench_secagg.play(consortium, consortium.offer(4, 3, 1000, ring=ring, bits=14), updates, 0).upload[0]
                    for ring in (32, 16))
    assert wide - narrow == pytest.approx(2000, abs=20)
    assert wide > 4000


def test_uploads_are_counted_as_flowers_objects() -> None:
    content = plain_content(np.zeros(1000, np.float32))
    wire = Wire(content)
    assert 4000 < wire.size < 6000
    assert (wire.received().content["arrays"]["update"].numpy() == 0).all()


def test_the_plain_baseline_is_the_mean() -> None:
    updates = [np.arange(5, dtype=np.float32) * u for u in range(1, 4)]
    np.testing.assert_allclose(fedavg([as_message(plain_content(u)) for u in updates]), np.arange(5) * 2, rtol=1e-6)


def test_secaggplus_makes_masked_int64() -> None:
    made = [bytes_to_ndarray(bench_baselines._secaggplus_client(np.zeros(100, np.float32), 3)()[-(128 + 800):])
            for _ in range(2)]
    assert made[0].dtype == np.int64
    assert (made[0] != made[1]).mean() > 0.9
    assert secaggplus(np.zeros(100, np.float32), [0, 1], 1).keys() >= {"client_ns", "upload_ratio_fp32", "samples"}


def test_without_tenseal_its_figures_are_null(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_baselines, "find_spec", lambda name: None)
    assert bench_baselines.tenseal_ckks(np.zeros(10, np.float32), 1) is None


def test_samples_add_up_and_results_keep_six_digits() -> None:
    samples = Samples({"a": [(1.0, 2.0), (3.0, 4.0)], "b": [(5.0, 6.0)]})
    assert (samples.cpu("a"), samples.wall("a"), samples.total("a", "b")) == (2.0, 3.0, (9.0, 12.0))
    assert rounded({"a": [(1.23456789, 1)], "b": True}) == {"a": [[1.23457, 1]], "b": True}


def test_a_sample_is_cpu_then_wall_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, wall = iter([1.0, 3.0]), iter([10.0, 15.0])
    monkeypatch.setattr(bench, "time", SimpleNamespace(process_time=lambda: next(cpu), perf_counter=lambda: next(wall)))
    samples = Samples()
    assert samples.take("sum", lambda x, *, y: x + y, 1, y=2) == 3
    assert samples.taken == {"sum": [(2.0, 5.0)]}
