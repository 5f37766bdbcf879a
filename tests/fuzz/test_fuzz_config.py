"""What an operator or a mirror hands over: settings, policies, addresses, data files, adapters, archives."""

from __future__ import annotations

import gzip
import io
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from fuzz_kit import CANARY, TIMES, Target, bounded, fuzz, holds
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from conf import load_settings
from conf.settings import Settings
from fl_client.control_channel import Address
from fl_client.control_transfer import adapter_tensors_digest
from fl_client.policy import SitePolicy, load_policy
from privacy.errors import ConsiloError
from simulations.fetch import Package, _extract
from strategies.adapter import AdapterSpec
from strategies.records import load_records
from strategies.table import Table

SPEC = AdapterSpec((("a.lora_A.weight", (2, 3)), ("a.lora_B.weight", (4, 2))), frozenset({"a.lora_B.weight"}))
POLICY = b"approver: Dr A\nmax_epsilon: 4.0\nrequired_walls: [network, files]\nrules:\n- ffa\nallow_non_private: no\n"
CSV = b'text,label,person\n"a, ""b""",x,1\nc,y,2\n'
JSONL = b'{"text":"a","label":"x","person":1}\n{"text":"b\\n","label":"y","person":"2"}\n'


def archive(kind: str) -> bytes:
    out, text = io.BytesIO(), b"some text, " * 20
    if kind == "pypi":
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as z:
            z.writestr(zipfile.ZipInfo("root/one.txt"), text, zipfile.ZIP_DEFLATED)
            z.writestr(zipfile.ZipInfo("root/sub/two.txt"), text)
        return out.getvalue()
    with tarfile.open(fileobj=out, mode="w") as t:
        for name in ("root/one.txt", "root/sub/two.txt"):
            info = tarfile.TarInfo(name)
            info.size = len(text)
            t.addfile(info, io.BytesIO(text))
    return out.getvalue()


def unpack(kind: str, folder: Path) -> Callable[[bytes], object]:
    def parser(data: bytes) -> object:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            path, out = Path(scratch) / "archive", Path(scratch) / "out"
            path.write_bytes(data if kind == "pypi" else gzip.compress(data, 1))
            try:
                return _extract(Package(kind, "n", "1", "0" * 64, "root", ("*.txt",), "MIT", "x"), path, out)  # type: ignore[arg-type]
            finally:
                assert {p.name for p in Path(scratch).iterdir()} <= {"archive", "out"}

    return parser


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    folder = tmp_path_factory.mktemp("config")
    tensors = save({name: np.ones(shape, np.float32) for name, shape in SPEC.shapes})

    def at(name: str, read: Callable[[Path], object]) -> Callable[[bytes], object]:
        home = Path(tempfile.mkdtemp(dir=folder))

        def parser(data: bytes) -> object:
            (home / name).write_bytes(data)
            return read(home / name)

        return parser

    def table(path: Path, person: str | None = None) -> object:
        found = Table.open(path, {"text": "text", "label": "label"}, person=person)
        assert len(list(found)) == len(found) == len(list(found.contents))
        return found[0], found.owners

    return {
        "policy": Target(at("policy.yaml", load_policy), [POLICY, b"approver: {a: [b]}\n&a b: !!int '0_'\n<<: *a\n"]),
        "csv": Target(at("d.csv", table), [CSV]),
        "csv with persons": Target(at("d.csv", lambda p: table(p, "person")), [CSV]),
        "csv as records": Target(at("d.csv", lambda p: load_records(p, ("x", "y")).valid.tolist()), [CSV]),
        "jsonl": Target(at("d.jsonl", table), [JSONL]),
        "jsonl with persons": Target(at("d.jsonl", lambda p: table(p, "person")), [JSONL]),
        "safetensors": Target(at("adapter_model.safetensors", lambda p: adapter_tensors_digest(p.parent)), [
            tensors, *(tensors.replace(b'"F32"', kind) for kind in (b'"U32"', b'"I32"'))]),
        "safetensors header": Target(
            at("adapter_model.safetensors", lambda p: adapter_tensors_digest(reheaded(p, tensors).parent)),
            [header(tensors), header(tensors).replace(b"F32", b"BF16")]),
        "wheel": Target(unpack("pypi", folder), [archive("pypi")]),
        "tarball": Target(unpack("npm", folder), [archive("npm")]),
        "address": Target(lambda data: Address.parse(data.decode("latin-1")),
                          [b"https://hub.example:8444", b"https://[::1]:1"]),
    }


def header(tensors: bytes) -> bytes:
    return tensors[8:8 + int.from_bytes(tensors[:8], "little")]


def reheaded(path: Path, tensors: bytes) -> Path:
    """The file's bytes as the header in front of the tensors."""
    data = path.read_bytes()
    path.write_bytes(len(data).to_bytes(8, "little") + data + tensors[8 + len(header(tensors)):])
    return path


NAMES = ("policy", "csv", "csv with persons", "csv as records", "jsonl", "jsonl with persons", "safetensors",
         "safetensors header", "wheel", "tarball", "address")


@TIMES
@pytest.mark.parametrize("name", NAMES)
def test_files(name: str, times: int, targets: dict[str, Target]) -> None:
    assert tuple(targets) == NAMES
    fuzz(targets[name], 60, times)


def test_honest_files_are_read(targets: dict[str, Target]) -> None:
    for name, target in targets.items():
        assert not isinstance(holds(target, target.examples[0]), Exception), name


@TIMES
def test_parquet(times: int, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="the extra parquet isn't installed")
    from pyarrow import parquet

    path = tmp_path / "d.parquet"
    parquet.write_table(pyarrow.table({"text": ["a", "b"] * 40, "label": ["x", "y"] * 40}), path)
    good = path.read_bytes()

    def parser(data: bytes) -> object:
        path.write_bytes(data)
        return list(Table.open(path, {"text": "text", "label": "label"}))

    fuzz(Target(parser, [good]), 60, times)


# Overrides and policies: valid by schema, and what operators mistype -------------------------------------------------

KEYS = st.sampled_from([
    *Settings.model_fields, "privacy.rounds", "privacy.q", "privacy.schedule", "lora.targets", "rule.ranks", "data.sites",
    "data.sites.a", "data.sites.a.n_decl", "site.name", "model.chat", "", "hydra.run.dir", "data.labels", "_target_",
    "privacy@x", "a.b.c", "\ud800", "x" * 300, "data.sites.\n"])
TEXT = st.sampled_from([
    "5", "-1", "1e999", "nan", "null", "[]", "{}", "[a,b]", "{a:{n_decl:5}}", "'", '"', "${oc.env:HOME}", "\\${x}", "???",
    CANARY, "int(3)", "choice(1,2)", "[" * 20, "1" * 5000, "\0", "\n", "none", "\ud800", "../epsilon8", "/etc/passwd",
    "glob(*)", "{_target_:os.system}", "[{site:a,r:2}]", "", "a=b"])
OVERRIDES = st.lists(st.builds("{}{}{}{}".format, st.sampled_from(["", "", "+", "++", "~"]), KEYS,
                               st.sampled_from(["=", "=", "=", "", " = "]), TEXT), min_size=1, max_size=2)


@TIMES
def test_overrides(times: int) -> None:
    @bounded(35, times)
    @given(OVERRIDES)
    def run(overrides: list[str]) -> None:
        try:
            assert isinstance(load_settings(overrides), Settings)
        except ConsiloError as e:
            assert str(e).isprintable()

    run()


@TIMES
def test_policies_by_schema(times: int, tmp_path: Path) -> None:
    """Whatever a policy may hold is read back from its YAML as it was."""
    path = tmp_path / "policy.yaml"
    numbers = {"max_epsilon": st.floats(0.01, 100), "max_delta": st.floats(1e-12, 0.5), "min_sigma": st.floats(0, 50),
               "min_cohort": st.integers(1, 100), "colluding": st.integers(1, 99), "min_weight_ratio": st.floats(0.01, 1)}
    who = st.text("aé中:#'\"- \\", min_size=1, max_size=20).filter(str.strip)
    walls = st.lists(st.sampled_from(["network", "files", "limits"]), max_size=3)
    flags = dict.fromkeys(("allow_non_private", "sign_off", "reveal_update"), st.booleans())

    @bounded(40, times)
    @given(st.fixed_dictionaries({"approver": who}, optional=numbers | flags | {"required_walls": walls}))
    def run(value: dict[str, object]) -> None:
        path.write_text(yaml.safe_dump(value, allow_unicode=True))
        assert load_policy(path) == SitePolicy.model_validate(value)

    run()


@pytest.mark.parametrize("text", [
    "approver: x\napprover: y\n", "a: &a {x: 1}\nb: {<<: [*a, *a]}\n", "approver: 2020-99-99", "a: !!bool foo",
    "a: !!int ''", "a: !!timestamp x", "[" * 60_000, "{a: " * 15_000, 'a: "\\UFFFFFFFF"', "a: 1\n---\nb: 2\n",
    "? [a]\n: 1\n", "&a [*a]"], ids=range(12))
def test_a_policy_is_plain_yaml(text: str, tmp_path: Path) -> None:
    """Doubled keys, anchors, merges, tags, nesting and several documents are refused; a date is text like any other."""
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    if text == "approver: 2020-99-99":
        assert load_policy(path).approver == "2020-99-99"
        return
    with pytest.raises(ConsiloError, match=r"policy\.yaml"):
        load_policy(path)
