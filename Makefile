# Everything runs in a virtual environment in $(VENV), made on first use. `make help` lists targets.
#   PYTHON=/path/to/python   interpreter of the environment (default: the newest one that runs)
#   EXTRAS=cuda13,wandb      optional dependencies, see extras_require in setup.py
#   VENV=folder              the environment (default .venv)

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV ?= .venv
PYTHON ?=
EXTRAS ?=
RUN = $(VENV)/bin/python
MAKE_VENV := scripts/make_venv.sh
QUICKSTART := runs/quickstart
GPU_RESULTS := runs/gpu-check

.PHONY: help venv venv-test train test test-slow lint format faults gpu-check clean print-python

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | column -t -s '|'

print-python:  ## Print the interpreter that a new environment would use
	@$(MAKE_VENV) --choose "$(PYTHON)"

venv:  ## Make the environment (quick when nothing changed); EXTRAS=cuda13,text,...
	@$(MAKE_VENV) "$(VENV)" "$(PYTHON)" "$(EXTRAS)"

venv-test:
	@$(MAKE_VENV) "$(VENV)" "$(PYTHON)" "$(EXTRAS),test"

train: venv  ## Train, evaluate, sample and plot the quickstart model (minutes on a laptop)
	$(RUN) -m scripts.train --config=configs/quickstart.py --workdir=$(QUICKSTART)
	$(RUN) -m scripts.evaluate --workdir=$(QUICKSTART) --split=test --max_bytes=400000
	$(RUN) -m scripts.generate --workdir=$(QUICKSTART) --prompt="def " --max_new_tokens=400
	$(RUN) -m scripts.plot $(QUICKSTART) --out=$(QUICKSTART)/curves.png
	@echo
	@echo "made: $(QUICKSTART)/ (checkpoints, metrics.jsonl, TensorBoard events, curves.png)"
	@echo "next: $(RUN) -m scripts.generate --workdir=$(QUICKSTART) --prompt='class ' --temperature=0.5"
	@echo "      $(RUN) -m scripts.train --config=configs/quickstart.py --workdir=runs/transformer --config.model.name=transformer"
	@echo "      $(RUN) -m scripts.sweep --sweep=configs/sweeps/quickstart_lr.py --workdir=runs/quickstart_lr"

test: venv-test  ## Run the fast tests
	$(RUN) -m pytest -n 2 --dist loadfile -q -m "not slow and not gpu and not network"

test-slow: venv-test  ## Run the fast and the slow tests
	$(RUN) -m pytest -n 2 --dist loadfile -q -m "not gpu and not network"

lint: venv-test  ## Check style (ruff) and types (pyright)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	@if $(RUN) -m pyright --version >/dev/null 2>&1 </dev/null; then \
	  $(RUN) -m pyright --pythonpath $(RUN); \
	else \
	  echo "types not checked: pyright does not run here (it needs Node.js, or a network to fetch it)" >&2; \
	fi

format: venv-test  ## Rewrite the code in the project's style
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

faults: venv  ## Inject kills, damage, full disks and more into real runs; half an hour
	$(RUN) -m scripts.faults --out=runs/faults.jsonl

gpu-check:  ## On a GPU machine: GPU tests, then every benchmark; records what decay attention takes
	@$(MAKE_VENV) "$(VENV)" "$(PYTHON)" "$(EXTRAS),cuda13,test"
	@$(RUN) -c 'import jax; print(jax.devices("gpu"))' || { echo "error: gpu-check needs a GPU: jax found none; check nvidia-smi and the driver" >&2; exit 1; }
	LONGCTX_TEST_GPU=1 $(RUN) -m pytest -q -m gpu
	$(RUN) -m scripts.benchmark --suite=train --out=$(GPU_RESULTS)/train.jsonl
	$(RUN) -m scripts.benchmark --suite=decode --out=$(GPU_RESULTS)/decode.jsonl
	$(RUN) -m scripts.benchmark --suite=decay --peers=all --out=$(GPU_RESULTS)/decay.jsonl --record
	$(RUN) -m scripts.benchmark --suite=vq --out=$(GPU_RESULTS)/vq.jsonl
	$(RUN) -m scripts.benchmark --suite=memory --out=$(GPU_RESULTS)/memory.jsonl

clean:  ## Remove caches and build leftovers (not runs, not the environment)
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
