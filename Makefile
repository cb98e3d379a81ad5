# `make demo` and `make test` set up everything they need; nothing has to be installed by hand.
PYTHON ?= python3
IS_3_11 := $(shell $(PYTHON) -c 'import sys; print(int(sys.version_info[:2] == (3, 11)))')
# The exact versions were resolved on Python 3.11; other versions take what pip finds.
ifeq ($(IS_3_11),1)
CONSTRAINTS := -c constraints.txt
endif
PIP := -m pip --disable-pip-version-check --quiet
ARGS ?=

.PHONY: demo test lint bundles clean help

help:
	@echo "make demo            wrists train one model over MQTT (ARGS='--rounds 20' passes options on)"
	@echo "make test            all tests, TensorFlow included (Python 3.11)"
	@echo "make lint            ruff, mypy, import-linter"
	@echo "make bundles         build the model bundles again (KEY=FILE signs with an existing publisher key)"
	@echo "make clean           remove the virtual environments; run folders stay"

demo: .venv/.ready
	.venv/bin/covey-fleet demo $(ARGS)

test: .venv-dev/.ready
	.venv-dev/bin/python -m pytest $(ARGS)

lint: .venv-dev/.ready
	.venv-dev/bin/ruff check .
	.venv-dev/bin/ruff format --check .
	.venv-dev/bin/mypy
	.venv-dev/bin/lint-imports

bundles: .venv-dev/.ready
	.venv-dev/bin/covey-model build all --out-dir models/bundles --version 2 --force $(if $(KEY),--key $(KEY))

# Runtime only, no TensorFlow.
.venv/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2])' \
	  || { echo "make demo: expected Python 3.10 or newer, got $$($(PYTHON) --version); set PYTHON=/path/to/python3.11"; exit 1; }
	@echo "Setting up .venv (once; about a minute)"
	@$(PYTHON) -m venv .venv
	@.venv/bin/python $(PIP) install $(CONSTRAINTS) -e '.[fleet]'
	@touch $@

# tensorflow-privacy 0.9 needs TensorFlow 2.15, which ends at Python 3.11.
.venv-dev/.ready: pyproject.toml constraints.txt
	@test "$(IS_3_11)" = 1 \
	  || { echo "make test: expected Python 3.11 (tensorflow-privacy needs it), got $$($(PYTHON) --version); set PYTHON=/path/to/python3.11"; exit 1; }
	@echo "Setting up .venv-dev with TensorFlow (once; a few minutes)"
	@$(PYTHON) -m venv .venv-dev
	@.venv-dev/bin/python $(PIP) install $(CONSTRAINTS) -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv .venv-dev .venv-newest .peers
