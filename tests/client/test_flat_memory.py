"""A trainer's memory doesn't follow its file: 10 MB and 1 GB of JSON lines, each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from privacy.contract import Contract

WORDS = ["pulse", "cough", "rash", "chest", "pain", "since", "monday", "and", "my", "breath", "is", "slow"]
PROGRAM = """
import json, sys, time
from pathlib import Path
from fl_client.training import LocalTrainer
from privacy.compute import Compute
from privacy.contract import load_contract
from strategies.adapter import initial

contract, model, data, person = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4] or None
start = time.monotonic()
trainer = LocalTrainer(load_contract(contract.read_bytes()), "site-a", model=model, data=data, text="text", label="label",
                       person=person, lineage="x", compute=Compute(cache_mib=8))
trainer.probe()
loaded = time.monotonic() - start
for number in (1, 2):
    trainer.train(initial(trainer.spec, 0), number)
lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(json.dumps({"records": trainer._probe, "kib": int(lines["VmHWM"].split()[0]), "load_s": loaded,
                  "train_s": time.monotonic() - start - loaded}))
"""


def write(path: Path, size: int, persons: int) -> int:
    """Lines of about 200 bytes, `size` bytes in all. Returns their number."""
    block = []
    for i in range(1000):
        text = " ".join(WORDS[(i * 7 + j * j) % len(WORDS)] for j in range(22))
        block.append({"text": text, "label": ("heart", "lung", "skin")[i % 3]})
    count = 0
    with path.open("w") as f:
        while f.tell() < size:
            for i, row in enumerate(block):
                f.write(json.dumps({**row, "person": f"p{(count + i) % persons}"}) + "\n")
            count += len(block)
    return count


def peak(folder: Path, model: Path, contract: Contract, size: int, person: str) -> dict[str, float]:
    data, terms = folder / f"{size}.jsonl", folder / "contract.json"
    count = write(data, size, max(1, size // 1000))
    units = max(1, size // 1000) if person else count
    privacy = contract.privacy.model_copy(update={"q": 100 / units})
    terms.write_bytes(contract.model_copy(update={"privacy": privacy}).to_bytes())
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", PROGRAM, str(terms), str(model), str(data), person],
                          env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}, capture_output=True, text=True,
                          check=True, timeout=1500)
    data.unlink()
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.long
@pytest.mark.timeout(3000)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory as Linux tells it")
@pytest.mark.parametrize(("person", "limit"), [("", 16), ("person", 256)])
def test_memory_is_flat_in_the_file(tmp_path: Path, tiny_model: Path, tiny_contract: Callable[..., Contract], person: str,
                                    limit: int) -> None:
    """limit: MiB for 6 million records more: half a byte each, and with persons about 40 while their owners are numbered."""
    unit = {"unit": "person", "sampled": "person"} if person else {}
    fields = {"data": {"fields": ("text", "label", "person")}} if person else {}
    contract = tiny_contract(privacy={"rounds": 2, **unit}, **fields)
    small, large = (peak(tmp_path, tiny_model, contract, size, person) for size in (10**7, 10**9))
    print(small, large)
    assert large["kib"] - small["kib"] < limit * 1024
