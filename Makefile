# Set-up needs python3.11 (or newer) and make, no root. `make demo` and `make test` do everything from nothing.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO := demo
SAMPLES := placement/samples
WORKERS ?= auto

.PHONY: help install demo test test-fast lint notebooks bench serve clean

help:
	@echo "make demo        record, compare, solve, apply, verify on the bundled model (demo/report.html)"
	@echo "make test        all tests; make test-fast without the slow ones"
	@echo "make lint        ruff and mypy"
	@echo "make notebooks   run the notebooks and write notebooks/html"
	@echo "make serve       the service on http://127.0.0.1:8700 (SERVE='--port 9000' for other options)"
	@echo "make bench       the benchmark tables (benchmarks/results; hours)"
	@echo "make clean       remove the environment and what was built"

install: $(STAMP)

# torch is installed by pip first: the pinned CPU build where the index has one.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[torch,service,notebooks,dev]'
	$(BIN)/python -m placement.solvers.compile search & search=$$!; \
	    $(BIN)/python -m placement.solvers.compile solvers && $(BIN)/python -m traces.compile && wait $$search
	touch $(STAMP)

demo: $(STAMP)
	rm -rf $(DEMO) && mkdir $(DEMO)
	@echo "--- 1. record the routing of the bundled model on real text"
	$(BIN)/moe-placement trace record --model byte16 --context 1024 -o $(DEMO)/trace --text $(SAMPLES)/text/*.txt
	@echo "--- 2. every policy, fitted on every other window, scored on the windows between"
	$(BIN)/moe-placement compare $(DEMO)/trace -t h100:1x8 --window 2048 \
	    --calibration $(SAMPLES)/linear.json --html $(DEMO)/report.html
	@echo "--- 3. solve for 8 GPUs on all windows"
	$(BIN)/moe-placement solve $(DEMO)/trace -t h100:1x8 --window 2048 \
	    --calibration $(SAMPLES)/linear.json -o $(DEMO)/placement.json
	@echo "--- 4. apply it to the model: are the outputs the same?"
	$(BIN)/moe-placement verify $(DEMO)/placement.json --model byte16 --context 1024
	@echo "--- done: see $(DEMO)/report.html and $(DEMO)/placement.json"

test: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -rs

test-fast: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -rs -m "not model and not slow"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

notebooks: $(STAMP)
	$(BIN)/python -m notebooks.run

serve: $(STAMP)
	exec $(BIN)/moe-placement serve $(SERVE)

bench: $(STAMP)
	$(BIN)/python -m benchmarks.quality
	$(BIN)/python -m benchmarks.picture
	$(BIN)/python -m benchmarks.balancing
	$(BIN)/python -m benchmarks.replicas
	$(BIN)/python -m benchmarks.migration
	$(BIN)/python -m benchmarks.scaling
	$(BIN)/python -m benchmarks.solvers
	$(BIN)/python -m benchmarks.store
	$(BIN)/python -m benchmarks.statistics
	$(BIN)/python -m benchmarks.importers
	$(BIN)/python -m benchmarks.synthesis
	$(BIN)/python -m benchmarks.checkpoint
	$(BIN)/python -m benchmarks.distributed --ray
	$(BIN)/python -m benchmarks.planning.parallelism
	$(BIN)/python -m benchmarks.planning.cross_dc
	$(BIN)/python -m benchmarks.planning.hetero
	$(BIN)/python -m benchmarks.planning.fabric
	$(BIN)/python -m benchmarks.service
	$(BIN)/python -m benchmarks.views
	$(BIN)/python -m benchmarks.chaos --minutes 5

clean:
	rm -rf $(VENV) $(DEMO) .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
