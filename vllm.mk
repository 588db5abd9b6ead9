# Real vLLM on the CPU, in an environment of its own: it pins versions that Loadstone's must not depend on.

VLLM_ENV := .venv-vllm

.PHONY: test-vllm
test-vllm: $(COMPILED) $(VLLM_ENV)/ready
	.venv/bin/python -m pytest tests/vllm/against_*.py

$(VLLM_ENV)/ready: tests/vllm/requirements.txt
	python3 -m venv --clear $(VLLM_ENV)
	$(VLLM_ENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r tests/vllm/requirements.txt
	touch $@
