# The gate with real clients, real engines and Redis, in an environment of its own: Loadstone's must work without them.

SERVICES_ENV := .venv-services

# Wants ab, curl, redis-server and wrk on PATH.
.PHONY: test-services
test-services: $(COMPILED) $(SERVICES_ENV)/ready
	$(SERVICES_ENV)/bin/python -m pytest tests/services

$(SERVICES_ENV)/ready: requirements.lock pyproject.toml tests/services/requirements.txt
	python3 -m venv --clear $(SERVICES_ENV)
	$(SERVICES_ENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
		-r requirements.lock -r tests/services/requirements.txt
	LOADSTONE_PURE=1 $(SERVICES_ENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
		--no-build-isolation --editable .
	touch $@
