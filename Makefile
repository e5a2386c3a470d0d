# Two commands set everything up, each alone, from a fresh clone: `make demo` and `make test`.
# They need Python 3.12 or newer, pip and make, and reach nothing but the package index.

MINIMUM := 3.12
CANDIDATES := python3 python3.12 python3.13 python3.14
VENV := .venv
PYTHON := $(VENV)/bin/python
GPU_VENV := .venv-gpu
TPU_VENV := .venv-tpu

.PHONY: demo test lint gpu-gate aot parity parity-golden clean

demo: $(VENV)/installed
	$(VENV)/bin/gptoss-jax demo

test: $(VENV)/installed-dev
	JAX_PLATFORMS=cpu $(PYTHON) -m pytest -n 2 --dist loadfile --max-worker-restart 0
	JAX_PLATFORMS=cpu $(PYTHON) -m pytest --nbmake notebooks -q

# The same lines as the pre-commit hooks.
lint: $(VENV)/installed-dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyright

# Compiles the steps for an H200, which need not be there, and refuses more launches, spills or temporaries than
# tests/gpu_gate/limits.json allows. In an environment of its own: NVIDIA's compilers take 1 GB.
gpu-gate: $(GPU_VENV)/installed
	$(GPU_VENV)/bin/python -m tests.gpu_gate

# Compiles the steps of both models for four generations of TPUs, which need not be there, and refuses more memory, other
# kernels or other collectives than tests/tpu_aot/table.json has; then the tests of plans for TPUs. In an environment of
# its own: libtpu takes 0.7 GB.
# AOT="--layers 2 --jobs 2" is quick; a name or part of one, as in AOT=20b-v5e, picks programs.
aot: $(TPU_VENV)/installed
	JAX_PLATFORMS=cpu $(TPU_VENV)/bin/python -m tests.tpu_aot $(AOT)
	JAX_PLATFORMS=cpu $(TPU_VENV)/bin/python -m pytest -q tests/plan/test_tpu.py

# Makes the torch oracles' answers afresh in an environment of their own, and compares with them.
parity: $(VENV)/installed-dev
	sh tests/parity/make_environment.sh
	JAX_PLATFORMS=cpu $(PYTHON) -m pytest tests/parity -m parity

# Writes tests/parity/golden afresh.
parity-golden: $(VENV)/installed-dev
	sh tests/parity/make_environment.sh
	JAX_PLATFORMS=cpu $(PYTHON) -m tests.parity.oracles
	JAX_PLATFORMS=cpu $(PYTHON) -m tests.parity.demo

$(VENV)/bin/python:
	@for name in $(CANDIDATES); do \
	  if $$name -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < tuple(map(int, "$(MINIMUM)".split("."))))' \
	      2>/dev/null; then \
	    echo "using $$name ($$($$name --version))"; exec $$name -m venv $(VENV); \
	  fi; \
	done; \
	echo "make: found no Python $(MINIMUM) or newer with venv among: $(CANDIDATES)." >&2; \
	echo "make: install one (Debian and Ubuntu: apt install python$(MINIMUM)-venv) and run make again." >&2; \
	exit 1

$(VENV)/installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PYTHON) -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PYTHON) -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@ $(VENV)/installed

$(GPU_VENV)/installed: $(VENV)/bin/python pyproject.toml constraints.txt constraints-gpu.txt
	$(PYTHON) -m venv $(GPU_VENV)
	$(GPU_VENV)/bin/python -m pip install --quiet --constraint constraints.txt --requirement constraints-gpu.txt --editable .
	touch $@

$(TPU_VENV)/installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PYTHON) -m venv $(TPU_VENV)
	$(TPU_VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,tpu]'
	touch $@

clean:
	rm -rf $(VENV) $(GPU_VENV) $(TPU_VENV) .venv-parity build
