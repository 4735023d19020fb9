# `make demo` and `make test` do everything on a fresh machine: environment, installation, run.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Exits with a message where $(PYTHON) is too old; runs in any Python, so that it can say so.
CHECK_PYTHON := $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "ema_triton needs Python >= 3.10, but $(PYTHON) is " + sys.version.split()[0] + ". Run: make PYTHON=/path/to/python3.10")'

.PHONY: help demo test integrations ptx docs docs-serve bench lint gpu gpu-memcheck clean
help:
	@echo "make demo    train a small net with EMA on handwritten digits"
	@echo "make test    run the tests"
	@echo "make integrations   run all tests with Lightning, transformers, accelerate, diffusers and timm"
	@echo "make ptx     run the compiled kernels on the CPU, for every GPU"
	@echo "make docs    build the documentation into site/"
	@echo "make docs-serve   show it, and follow what is edited"
	@echo "make bench   time one EMA update beside its rivals (some 15 minutes on 2 cores)"
	@echo "make lint    ruff and mypy"
	@echo "make gpu     run the GPU tests in the environment of PYTHON, installing nothing"
	@echo "make gpu-memcheck   the same for compute-sanitizer's memcheck of every kernel"
	@echo "make clean   remove the environment and all outputs"

# timm needs torchvision, whose compiled part does not load beside a CPU build of torch. In the
# environment it would break transformers and Lightning, which import it if it is there.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(CHECK_PYTHON)
	@echo "First, once: everything that the tests and tools need is installed into $(VENV). This takes some"
	@echo "minutes and 2.5 GB of the disk, or several GB more where PyTorch comes with CUDA."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps --target $(VENV)/timm --upgrade timm torchvision
	@touch $@

# The demo needs a quarter of the packages; where all are installed it takes those.
$(VENV)/.demo: pyproject.toml constraints.txt
	@$(CHECK_PYTHON)
	@echo "First, once: PyTorch, Ignite, scikit-learn and matplotlib are installed into $(VENV). This takes"
	@echo "a few minutes and 2 GB of the disk, or several GB more where PyTorch comes with CUDA."
	@echo "Then a small net trains on handwritten digits, with an EMA: half a minute on a CPU."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo]'
	@touch $@

demo: $(or $(wildcard $(VENV)/.installed),$(VENV)/.demo)
	$(BIN)/python examples/digits.py

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2

integrations: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 -m "not every_target" tests/integrations

ptx: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 -m "" tests/ptx

# The variable silences Material's advertisement of its successor.
docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

docs-serve: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve

bench: $(VENV)/.installed
	$(BIN)/python -m bench run

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Planned for 8 minutes. A test that takes 2 prints where it is.
gpu:
	@$(CHECK_PYTHON)
	$(PYTHON) -m pytest -m gpu -v -ra --durations=10 -o faulthandler_timeout=120

gpu-memcheck:
	@$(CHECK_PYTHON)
	$(PYTHON) -m pytest -m memcheck -v -ra tests/test_gpu_memory.py

clean:
	rm -rf $(VENV) build dist *.egg-info digits_run tensorboard_run fsdp2_run posthoc_run ddp_run ddpm_run site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -exec rm -rf {} +
