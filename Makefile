# Two commands do all the set-up: `make demo` and `make test`. Needs Python 3.11+, pip, make and git.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-long check bench mutate data proto lock sbom audit-deps clean

demo: $(STAMP)
	@$(BIN)/fl-simulate demo

test: $(STAMP) data
	@$(BIN)/pytest

test-long: $(STAMP) data
	@$(BIN)/pytest -m long

check: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

# Baselines that aren't installed are rows that say so: `pip install 'consilo[bench]'`, or NVFLARE_PYTHON=/path/to/python.
bench: $(STAMP)
	@$(BIN)/fl-simulate bench all --out outputs/bench

proto: $(STAMP)
	@$(BIN)/python -m grpc_tools.protoc -I . --python_out=. --pyi_out=. --grpc_python_out=. privacy/control/*.proto

mutate: $(STAMP)
	@$(BIN)/python tests/secagg/mutate.py

data: $(STAMP)
	@$(BIN)/fl-simulate fetch minilm
	@$(BIN)/fl-simulate fetch hpo

# The release targets need the extra `release` (docs/releasing.md). torch has a lock of its own.
lock: $(STAMP)
	@CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/pip-compile --quiet --generate-hashes --strip-extras --no-emit-index-url \
	  --no-emit-find-links --no-emit-trusted-host --no-emit-options --extra all --constraint constraints.txt \
	  --unsafe-package torch --unsafe-package consilo --output-file requirements.lock pyproject.toml
	@sed -i '/^# WARNING: The following packages were not pinned/,$$d' requirements.lock

sbom: $(STAMP)
	@mkdir -p dist
	@cat requirements.lock torch-cpu.lock | $(BIN)/cyclonedx-py requirements --pyproject pyproject.toml --mc-type library \
	  --output-reproducible --of JSON -o dist/sbom.cdx.json -

audit-deps: $(STAMP)
	@$(BIN)/pip-audit --strict --require-hashes --no-deps --disable-pip --progress-spinner off -r requirements.lock || \
	  { echo "audit-deps: a locked package has a known fault, or no advisory database could be reached (see above)." >&2; \
	    exit 1; }

# torch comes first and pinned, so that no other package chooses its build.
$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all,dev]'
	@touch $@

clean:
	rm -rf $(VENV) outputs .cache build *.egg-info
