# The model services with real models on the CPU, in an environment of its own: Loadstone's must work without torch.
# Wants ab, curl and wrk on PATH.

MODELS_ENV := .venv-models

.PHONY: test-models
test-models: $(COMPILED) $(MODELS_ENV)/ready
	$(MODELS_ENV)/bin/python -m pytest tests/models

$(MODELS_ENV)/ready: requirements.lock requirements-models.lock pyproject.toml tests/models/requirements.txt
	python3 -m venv --clear $(MODELS_ENV)
	$(MODELS_ENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
		-r requirements.lock -r requirements-models.lock -r tests/models/requirements.txt
	LOADSTONE_PURE=1 $(MODELS_ENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
		--no-build-isolation --editable .
	touch $@
