# make demo | make test | make lint | make clean
# Needs Python 3.11 to 3.13. On an ordinary machine the same pins install the CUDA build of torch; PIP_FIND_LINKS, if set,
# names extra places to look for wheels, as it does for pip.

SHELL := /bin/bash
VENV := .venv
# What is installed besides the dependencies; `make test EXTRAS=dev,nudenet` also runs what needs NudeNet.
EXTRAS ?= dev
STAMP := $(VENV)/.installed-$(EXTRAS)
RUN := $(VENV)/bin/python
PACKAGES := raysteer diffusion rewards glyphs evaluation actors learner cluster benchmarks tests
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	"$$p" -c '$(SUPPORTED)' >/dev/null 2>&1 && { echo "$$p"; break; }; done)

.PHONY: demo test lint clean distclean install
.DEFAULT_GOAL := demo

demo: install
	$(RUN) -m evaluation.demo

# Processes of the tests that need no cluster; those that do have the machine to themselves. Byte code as below.
WORKERS ?= 2

test: install
	@$(RUN) -m compileall -q $(PACKAGES)
	$(RUN) -m pytest -n $(WORKERS) --dist loadfile tests/unit tests/browser
	$(RUN) -m pytest tests/ray

lint: install
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy

install: $(STAMP)

# uv ignores pip's configuration, hence the explicit --find-links. Byte code is compiled once here: without it every
# process that imports torch would pay for it where PYTHONDONTWRITEBYTECODE is set.
$(STAMP): pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ] || ! "$(PYTHON)" -c '$(SUPPORTED)' 2>/dev/null; then \
	  found=$$("$(or $(PYTHON),python3)" --version 2>/dev/null || echo none); \
	  echo "raysteer needs Python 3.11, 3.12 or 3.13; found: $$found. Install one, or run make PYTHON=/path/to/python3.12" >&2; \
	  exit 1; fi
	@if ! $(RUN) -c '$(SUPPORTED)' >/dev/null 2>&1; then \
	  echo "creating $(VENV) with $(PYTHON)"; "$(PYTHON)" -m venv --clear $(VENV); fi
	@echo "installing raysteer and its dependencies into $(VENV) (about a minute with a good connection)"
	@$(RUN) -m uv --version >/dev/null 2>&1 || $(RUN) -m pip install -q 'uv>=0.9,<1'
	@VIRTUAL_ENV="$(CURDIR)/$(VENV)" UV_COMPILE_BYTECODE=1 $(RUN) -m uv pip install -q \
	  $${PIP_FIND_LINKS:+--find-links "$$PIP_FIND_LINKS"} -c constraints.txt -e '.[$(EXTRAS)]'
	@touch '$(STAMP)'

# Runs are results: make never deletes them.
clean:
	rm -rf .pytest_cache .ruff_cache .mypy_cache dist demo-result.json
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf

distclean: clean
	rm -rf $(VENV)
