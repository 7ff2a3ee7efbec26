# make train | make test | make lint | make typecheck | make docs
# Each creates the virtual environment and installs what is missing; nothing happens when it is up to date.

PYTHON ?= python3
VENV ?= .venv
GPU := $(shell command -v nvidia-smi 2>/dev/null)
PRESET ?= $(if $(GPU),gpu_4096,cpu)
EXTRAS = test,lint,tensorboard,video,ray,examples,export,docs$(if $(GPU),$(comma)cuda)
comma := ,
ARGS ?=

# Idle OpenMP threads must not spin for long: simulation and learning share the cores. A few microseconds bridge most gaps
# within a Langevin chain, which without spinning takes up to twice as long; ten times that hurts beside other processes.
export OMP_WAIT_POLICY = passive
export GOMP_SPINCOUNT = 1000
# glibc hands freed tensors back to the kernel, and pages fault in again at every Langevin step, unless told to keep them.
export MALLOC_MMAP_THRESHOLD_ = 1073741824
export MALLOC_TRIM_THRESHOLD_ = 1073741824
export MALLOC_TOP_PAD_ = 67108864
export CI

STAMP = $(VENV)/.installed
TORCH = $(shell grep '^torch==' constraints.txt)

.PHONY: train test lint typecheck docs install

train: $(STAMP)
	$(VENV)/bin/nclql-train preset=$(PRESET) $(ARGS)

# A process per core, each with one thread; a file's tests stay together, because they share what was compiled.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto --dist loadfile $(ARGS)

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

typecheck: $(STAMP)
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

# The site, into site/: a broken link or reference is an error.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

install: $(STAMP)

# torch alone first: the pinned version decides which build (CPU or CUDA) is used, before anything asks for a range.
$(STAMP): pyproject.toml constraints.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet "$(TORCH)"
	$(VENV)/bin/python -m pip install --quiet -c constraints.txt -e ".[$(EXTRAS)]"
	touch $@
