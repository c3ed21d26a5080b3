# Commands run inside .venv, which `setup` makes; nothing else is assumed but Python >= 3.11.
#   make train CONFIG=configs/sentiment_rankings.yaml ARGS="--training.steps=20"

PYTHON      ?= python3
CONFIG      ?= configs/sentiment_pairs.yaml
RUN         ?= runs/sentiment_pairs
ARGS        ?=
# The shipped data are about sentiment, so their true reward judges the policy afterwards.
WINRATE     ?= $(if $(findstring configs/sentiment,$(CONFIG)),--winrate=vader)
CONSTRAINTS ?= constraints.txt
export CONSTRAINTS

BIN   := .venv/bin
# A worker runs neighbouring tests, which share fixtures and programs, and takes over what another has not begun.
PYTEST := $(BIN)/python -m pytest -n auto --dist worksteal
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help setup train evaluate report data docs test test-all check format bench diffusion frontier mutants clean

help: ## Print this list
	@echo "make TARGET [CONFIG=$(CONFIG)] [RUN=$(RUN)] [ARGS=\"--training.steps=20\"] [PYTHON=$(PYTHON)]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-9s %s\n", $$1, $$2}' Makefile

setup: $(STAMP) ## Make .venv and install the package with its pinned dependencies

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python >= 3.11 is needed, but '$(PYTHON)' is: $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "Name another with: make setup PYTHON=/path/to/python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing into .venv (pins: $${CONSTRAINTS:-none}) ..."
	@$(BIN)/python -m pip install --quiet $${CONSTRAINTS:+-c $$CONSTRAINTS} -e '.[dev]'
	@touch $@

train: setup ## Fine-tune as CONFIG says, evaluate, export, win-rate (WINRATE=--winrate=JUDGE), write the report
	$(BIN)/dpo train --config $(CONFIG) $(WINRATE) $(ARGS)

evaluate: setup ## Held-out accuracy of the policy in RUN against its reference
	$(BIN)/dpo evaluate --run $(RUN) $(ARGS)

report: setup ## Write RUN/report.html again
	$(BIN)/dpo report $(RUN) $(ARGS)

data: setup ## Make the shipped sentiment preferences again (samples SmolLM2 with its own decode loop)
	$(BIN)/python data/make_sentiment.py $(ARGS)

docs: setup ## Write the docs as a site to site/, with an API reference and search; a broken link stops it
	@$(BIN)/python -m pip install --quiet $${CONSTRAINTS:+-c $$CONSTRAINTS} -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

test: setup ## Quick tests on every core (ARGS="tests/losses -x" narrows them, ARGS="-n 0" runs them in one process)
	$(PYTEST) $(ARGS)

test-all: setup ## All tests, also those that need minutes, the real model or data from elsewhere
	$(PYTEST) -m "slow or not slow" $(ARGS)

check: setup ## Format and lint (ruff), types (pyright)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: setup ## Rewrite the files as `check` wants them
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

diffusion: CONFIG = configs/diffusion_gaussian.yaml
diffusion: setup ## Diffusion-DPO where the optimum is known (CONFIG=configs/diffusion_mixture.yaml: in two dimensions)
	$(BIN)/dpo diffusion --config $(CONFIG) $(ARGS)

frontier: setup ## True reward against KL for DPO, IPO and Plackett-Luce (about an hour on two cores; goes on where it was stopped)
	$(BIN)/dpo frontier $(ARGS)

mutants: setup ## Plant faults in modules and see whether their tests notice (ARGS="losses/pairs.py --count 20")
	$(BIN)/python tests/mutants.py $(ARGS)

bench: setup ## Measure speed and memory of training steps
	$(BIN)/python -m benchmarks $(ARGS)

clean: ## Remove caches and build products (not .venv, not runs)
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
