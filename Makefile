# Two commands do everything on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: quickstart test chaos lint bench gpu-check clean

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[cluster,quickstart,dev]"
	touch $(READY)

quickstart: $(READY)
	$(BIN)/d3llm-ray quickstart

test: $(READY)
	$(BIN)/python -m pytest -q -m "not chaos"

# Faults on a local multi-node cluster: processes, nodes and drivers are killed on purpose.
chaos: $(READY)
	$(BIN)/python -m pytest -q -m chaos

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/d3llm-ray benchmark trajectories

# On a machine with torch, triton and transformers: no virtual environment, no Ray. Again until nothing is left.
gpu-check:
	PYTHONPATH=. $(PYTHON) jobs/gpu_check.py

clean:
	rm -rf $(VENV) build *.egg-info
