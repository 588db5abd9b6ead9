# Every target sets itself up: a bare machine needs python3 (3.11 or later, with venv), gcc and the package registry.

VENV := .venv
PYTHON := python3
READY := $(VENV)/ready

.PHONY: demo test check tests test-browser bench clean

# The embedded engine, a search, a report: about a minute.
demo: $(READY)
	$(VENV)/bin/loadstone demo

# Style, types and tests.
test: check tests

check: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/hadolint docker/*.Dockerfile

tests: $(READY)
	$(VENV)/bin/python -m pytest

# The report page in headless Chromium, which must be installed.
test-browser: $(READY)
	$(VENV)/bin/python -m pytest tests/browser

# All the figures of bench/README.md; wants wrk and a machine with nothing else to do.
bench: $(READY)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r bench/requirements.txt
	$(VENV)/bin/python bench/client.py
	$(VENV)/bin/python bench/search.py

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements.lock
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

clean:
	rm -rf $(VENV) .venv-* build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

include services.mk
include models.mk
include vllm.mk
