# `make demo`, `make test`, `make families`, `make layouts`, `make lint`, `make bench NAME=...`: each sets up
# .venv first, once and again when the pins change. Needs Python 3.11 or 3.12; PYTHON=... chooses one.
#
# TORCH_INDEX_URL=... asks that package index for torch first. On x86-64 Linux PyPI's torch brings some 4 GB of CUDA
# libraries with it; PyTorch's index of CPU wheels (see its installation page) does not.
SHELL := /bin/bash
.DELETE_ON_ERROR:
.PHONY: demo test families layouts lint bench setup

is_supported := import ensurepip, sys, venv; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))
# A version manager's stand-in may be on the path and not run: ask each.
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do "$$p" -c '$(is_supported)' 2>/dev/null && echo "$$p" && break; done)
PYTHON := $(PYTHON)
pip := .venv/bin/python -m pip --disable-pip-version-check
torch := $(shell grep '^torch==' requirements/cpu.txt)
version_of = $(shell $(1) -c 'import sys; print(*sys.version_info[:2], sep=".")' 2>/dev/null)
pins := $(shell cat requirements/cpu.txt pyproject.toml | cksum | cut -d' ' -f1)
ready := .venv/.ready-$(call version_of,$(PYTHON))-$(pins)

demo: setup
	.venv/bin/sampo demo $(if $(filter-out 0,$(SERVE)),--serve)

test: setup
	.venv/bin/python -m pytest

families: setup
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 .venv/bin/python -m tests.families

layouts: setup
	@HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 .venv/bin/python -m tests.layouts

lint: setup
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy

bench: setup
	@test -f 'benchmarks/$(NAME).py' || { echo 'make bench NAME=..., one of: $(basename $(notdir $(wildcard benchmarks/[a-z]*.py)))' >&2; exit 2; }
	.venv/bin/python 'benchmarks/$(NAME).py'

setup: $(ready)

# The pins hold for what pip builds in isolation as well (deepspeed comes as source): the second name is newer pips'.
$(ready): export PIP_CONSTRAINT := $(CURDIR)/requirements/cpu.txt
$(ready): export PIP_BUILD_CONSTRAINT := $(CURDIR)/requirements/cpu.txt
$(ready):
	@$(or $(PYTHON),false) -c '$(is_supported)' 2>/dev/null || { \
	  echo 'sampo-ray needs Python 3.11 or 3.12 with its venv module on the path; or name one: make PYTHON=/path/to/python3.11' >&2; exit 2; }
	@echo 'Setting up .venv with $(PYTHON): once, a few minutes, about 5 GB'
	@test '$(call version_of,.venv/bin/python)' = '$(call version_of,$(PYTHON))' || $(PYTHON) -m venv --clear .venv
	$(if $(TORCH_INDEX_URL),$(pip) --retries 1 --timeout 20 install --no-deps --index-url '$(TORCH_INDEX_URL)' '$(torch)' || true)
	$(pip) install '$(torch)'
	$(pip) install --no-deps --requirement requirements/cpu.txt
	$(pip) install --no-deps --no-build-isolation --editable .
	@rm -f .venv/.ready-* && touch $@
