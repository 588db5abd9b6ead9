# Every target sets itself up: a bare machine needs python3 (3.11 or later, with venv), gcc and the package registry.

VENV := .venv
PYTHON := python3
READY := $(VENV)/ready
# The stamp of the compiled modules (setup.py), which hide their sources: made again when one of these changes.
COMPILED := $(VENV)/compiled

.PHONY: demo test check tests test-pure test-browser bench clean

# The embedded engine, a search, a report: about a minute. It does not wait for the compiler.
demo: $(READY) $(wildcard $(COMPILED))
	$(VENV)/bin/loadstone demo

# Style, types and tests.
test: check tests

check: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/hadolint docker/*.Dockerfile

tests: $(COMPILED)
	$(VENV)/bin/python -m pytest

# The same tests of what is compiled, as Python.
test-pure: $(READY)
	rm -rf build/pure
	mkdir -p build/pure
	cp -r src/loadstone build/pure
	find build/pure -name '*.so' -delete
	PYTHONPATH=build/pure $(VENV)/bin/python -m pytest tests/test_ad*.py tests/test_*quota*.py tests/test_gate_*.py \
		tests/test_server_*.py tests/test_upstream*.py tests/test_wire_*.py tests/test_chunk*.py tests/test_head_memo.py

# The report page in headless Chromium, which must be installed.
test-browser: $(COMPILED)
	$(VENV)/bin/python -m pytest tests/browser

# All the figures of bench/README.md; wants wrk and a machine with nothing else to do.
bench: $(COMPILED)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r bench/requirements.txt
	$(VENV)/bin/python bench/client.py
	$(VENV)/bin/python bench/search.py

$(COMPILED): $(READY) setup.py $(shell find src -name '*.py')
	find src -name '*.so' -delete
	$(VENV)/bin/python setup.py --quiet build_ext --inplace
	touch $@

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -m venv --clear $(VENV)
	find src -name '*.so' -delete
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements.lock
	LOADSTONE_PURE=1 $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
		--no-build-isolation --editable .
	touch $@

clean:
	rm -rf $(VENV) .venv-* build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src -name '*.so' -delete

include services.mk
include models.mk
include vllm.mk
