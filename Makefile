# Every target works on a fresh machine: what it needs is installed into .venv first.
# EXTRA picks the rollout engine's build: `make setup EXTRA=gpu` on a CUDA host; later targets keep what is installed.
VENV  := .venv
EXTRA ?= $(if $(wildcard $(VENV)/.installed-gpu),gpu,cpu)
BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed-$(EXTRA)
export HF_HUB_OFFLINE ?= 1

.PHONY: setup quickstart test test-all lint format bench bench-quality bench-truncation clean

setup: $(STAMP)

$(STAMP): pyproject.toml launch/install.sh
	bash launch/install.sh $(VENV) $(EXTRA),dev
	touch $@

quickstart: $(STAMP)
	$(BIN)/python -m launch.quickstart

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow and not gpu and not multi_gpu"

test-all: $(STAMP)
	$(BIN)/python -m pytest -m "not gpu and not multi_gpu"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/.installed-bench: $(STAMP)
	bash launch/install.sh $(VENV) $(EXTRA),dev,bench
	touch $@

bench: $(VENV)/.installed-bench
	$(BIN)/python -m benchmarks $(ARGS)

# Hours, in parts: finished runs are kept. ARGS="--minutes 60" bounds a part.
bench-quality: $(STAMP)
	$(BIN)/python -m benchmarks.quality $(ARGS)

bench-truncation: $(STAMP)
	$(BIN)/python -m benchmarks.truncation $(ARGS)

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info
