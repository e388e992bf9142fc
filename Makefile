# Run from the repository's root with GNU make. `make help` lists the targets.

PYTHON ?= python3
BIN := .venv/bin
DEMO := runs/demo
CHECKPOINT := $(DEMO)/student/checkpoints/last.ckpt

.DEFAULT_GOAL := help
.PHONY: help install demo clean-demo bench test slow gpu check

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# --- Environment. Indexes, proxies and caches are pip's own settings: PIP_EXTRA_INDEX_URL and so on.

install: .venv/.installed ## create .venv with the versions of constraints.txt

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Python 3.11 or newer is needed and '$(PYTHON)' is not one; try: make install PYTHON=python3.11" >&2; \
	  exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install -c constraints.txt -e ".[dev]"
	touch $@

# --- Demo: the shipped Pong teacher, distilled. A stage runs when its output is missing (order-only
# prerequisites: no clock is compared) and continues what an interrupted run left behind.

STAGES := dataset/manifest.json student/done teacher/evaluation.json student/evaluation.json

demo: $(addprefix $(DEMO)/,$(STAGES)) ## distill the Pong teacher and report; continues where it stopped
	$(BIN)/lightning-distill report $(DEMO) --out $(DEMO)

$(DEMO)/dataset/manifest.json: | .venv/.installed
	$(BIN)/lightning-distill collect $(if $(wildcard $(@D)/progress.json),--resume $(@D),--config configs/demo/collect.yaml)

# policy/last exists from the first checkpoint on, so a stamp says that the training has ended.
$(DEMO)/student/done: | $(DEMO)/dataset/manifest.json
	$(BIN)/lightning-distill fit --config configs/demo/distill.yaml $(if $(wildcard $(CHECKPOINT)),--ckpt_path $(CHECKPOINT))
	@touch $@

$(DEMO)/teacher/evaluation.json: | .venv/.installed
	$(BIN)/lightning-distill evaluate --policy pretrained/pong --episodes 30 --out $(@D)

$(DEMO)/student/evaluation.json: | $(DEMO)/student/done
	$(BIN)/lightning-distill evaluate --policy $(@D)/policy/last --episodes 30 --out $(@D)

clean-demo: ## remove the demo's results
	rm -rf $(DEMO)

# --- Benchmark

bench: .venv/.bench ## measure every stage beside a limit or a peer; three quarters of an hour
	$(BIN)/python -m benchmarks

.venv/.bench: .venv/.installed
	$(BIN)/pip install -c constraints.txt -e ".[bench]"
	touch $@

# --- Checks

test: .venv/.installed ## the fast tests
	$(BIN)/pytest -m "not slow and not gpu"

slow: .venv/.installed ## the tests that learn, every config, the notebooks: minutes
	$(BIN)/pytest -m "slow"

gpu: .venv/.installed ## the tests that need a CUDA device
	$(BIN)/pytest -m "gpu"

check: .venv/.installed ## lint, formatting, types and the fast tests
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(MAKE) test

.NOTPARALLEL: # the demo's stages each use every core
.DELETE_ON_ERROR: # a stage that failed or was interrupted is not done
