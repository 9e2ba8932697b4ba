# `make demo` and `make test` do everything, from a fresh clone with Python 3.11 or newer, make and pip.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
SCENARIO := build/scenarios/customer_service.toml
REPOSITORY := model_repository

.PHONY: demo build serve bench bench-peers bench-overload bench-soak bench-clients scaling test lint format clean help
.DEFAULT_GOAL := help

help:
	@echo "make demo    environment, build, serve, classify over gRPC and HTTP, stop"
	@echo "make test    environment, all tests (a real Triton serves a small real model)"
	@echo "make build   the demo's model repository, in $(REPOSITORY)/"
	@echo "make serve   serve $(REPOSITORY)/ until Ctrl-C"
	@echo "make bench   the engine alone and served under load, on $(REPOSITORY)/ and DATA=..."
	@echo "make bench-peers     the same model in Infinity, LitServe and FastAPI, in one run (CHECKPOINT=...)"
	@echo "make bench-overload  twice the capacity for a minute: who is answered, how fast, and what follows"
	@echo "make bench-soak      200,000 requests: does memory stay flat"
	@echo "make bench-clients   our clients against tritonclient by hand, classify_many against perf_analyzer"
	@echo "make scaling   replicas, cost and the autoscaler in simulation, from a measured curve (needs kubectl)"
	@echo "make lint    ruff and mypy --strict"
	@echo "make format  ruff format"
	@echo "make clean   remove the environment, checkpoints and the built repository"

$(INSTALLED): pyproject.toml .ci/constraints.txt
	@echo "installing into .venv (torch, transformers, OpenVINO, Triton: 2.2 GB, some minutes) …"
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --disable-pip-version-check -c .ci/constraints.txt -e '.[build,serve,load,demo,dev]'
	@touch $@

build: $(INSTALLED)
	@$(BIN)/millibert build --scenario $(SCENARIO) --out $(REPOSITORY)

demo: build
	@$(BIN)/python clients/demo.py --repository $(REPOSITORY)

$(REPOSITORY)/release.json:
	@$(MAKE) --no-print-directory build

serve: $(INSTALLED) $(REPOSITORY)/release.json
	@$(BIN)/millibert serve --repository $(REPOSITORY)

DATA := build/scenarios/customer_service/test.csv
CHECKPOINT := .millibert/customer_service/checkpoint
BENCH :=
MEASURED := --repository $(REPOSITORY) --data $(DATA)

bench: $(INSTALLED) $(REPOSITORY)/release.json
	@$(BIN)/python -m load $(MEASURED) --checkpoint $(CHECKPOINT) --plot bench.svg $(BENCH)

bench-peers: $(INSTALLED) $(REPOSITORY)/release.json
	@$(BIN)/python -m load.bench_peers $(MEASURED) --checkpoint $(CHECKPOINT) $(BENCH)

bench-overload: $(INSTALLED) $(REPOSITORY)/release.json
	@$(BIN)/python -m load.overload $(MEASURED) $(BENCH)

bench-soak: $(INSTALLED) $(REPOSITORY)/release.json
	@$(BIN)/python -m load.soak $(MEASURED) $(BENCH)

bench-clients: $(INSTALLED) $(REPOSITORY)/release.json
	@$(BIN)/python -m load.bench_clients $(MEASURED) $(BENCH)

CURVE := docs/scaling/curve.json

# What docs/scaling.md shows, and its pictures.
scaling: $(INSTALLED)
	@$(BIN)/python -m load.capacity --curve $(CURVE) --plot docs/scaling/curve.svg
	@$(BIN)/python -m load.autoscaling --curve $(CURVE) --manifests k8s/overlays/prod-cpu --plot docs/scaling
	@$(BIN)/python -m load.autoscaling --curve $(CURVE) --manifests k8s/overlays/prod-cpu --scenario day --target 2 3 4 5 6 8
	@$(BIN)/python -m load.autoscaling --curve $(CURVE) --manifests docs/scaling/hpa-cpu
	@$(BIN)/python -m load.autoscaling --curve $(CURVE) --manifests docs/scaling/hpa-cpu --scenario day --target 0.6 0.7 0.8 0.9

test: $(INSTALLED)
	@$(BIN)/pytest -m "not slow" --numprocesses auto --maxprocesses 4 --dist loadfile
	@$(BIN)/pytest -m slow --numprocesses auto --maxprocesses 2 --dist loadfile --no-loadscope-reorder

lint: $(INSTALLED)
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

format: $(INSTALLED)
	@$(BIN)/ruff check --fix --quiet
	@$(BIN)/ruff format --quiet

clean:
	rm -rf .venv .peers .millibert .pytest_cache .mypy_cache .ruff_cache
	find $(REPOSITORY) -mindepth 1 -maxdepth 1 ! -name README.md -exec rm -rf {} +
