# crisp: plain `make` prints the targets.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PACKAGES := proto libs/servicekit libs/lab services/cri-gateway services/image-svc services/runtime-svc services/net-svc services/monitor-svc cli
PY := .venv/bin/python
SETUP := .venv/.setup

.PHONY: help setup lock check lint types unit

help: ## print this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/\1\t\2/' | expand -t 16

setup: $(SETUP) ## install what crisp needs: Debian packages and .venv
$(SETUP): requirements.lock proto/cri/api.proto proto/hatch_build.py $(addsuffix /pyproject.toml,$(PACKAGES))
	@deploy/install-debian-packages runtime
	@test -x $(PY) || /usr/bin/python3 -m venv .venv
	@echo "installing the locked Python packages"
	@$(PY) -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation $(addprefix -e ,$(PACKAGES))
	@touch $@

lock: ## resolve requirements.in anew
	.venv/bin/uv pip compile --quiet --generate-hashes --no-header --upgrade --python-version 3.11 --python-platform x86_64-manylinux_2_28 requirements.in -o requirements.lock

