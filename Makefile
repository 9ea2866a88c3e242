# crisp: plain `make` prints the targets.
SHELL := /bin/bash
.DEFAULT_GOAL := help
# The workspace's members, as pyproject.toml has them ([tool.uv.workspace]).
PACKAGES := $(patsubst %/pyproject.toml,%,$(wildcard proto/pyproject.toml libs/*/pyproject.toml services/*/pyproject.toml cli/pyproject.toml))
SOURCES := $(addsuffix /src,$(PACKAGES))
empty :=
export MYPYPATH := $(subst $(empty) $(empty),:,$(SOURCES))
BIN := .venv/bin
PY := $(BIN)/python
SETUP := .venv/.setup
# How many tests run at once; the heaviest wait for their own services, not for a processor.
JOBS ?= 3

.PHONY: root help setup lab programs lock mutants openapi check lint types unit e2e test demo up kubelet down test-kubelet soak conformance bench test-vm fresh clean

help: ## print this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## (.*)/\1\t\2/' | expand -t 16

root:
	@[ "$$(id -u)" = 0 ] || { echo "this needs root, for namespaces, mounts and cgroups: sudo make …" >&2; exit 1; }

demo: root setup lab ## start the five services and run a real pod end to end, then take all down
	@$(PY) -m crisplab.demo

programs: setup ## build crictl, kubelet, kubectl, an API server and etcd with Go, which is fetched if need be: minutes, once
	@$(PY) -m crisplab.golang

test: root setup lab programs ## all tests, with the real crun, conmon, CNI plugins and registry
	@$(PY) -m pytest -q -n $(JOBS)

check: setup ## the fast path: lint, types and the tests that need no node
	@$(MAKE) -s --no-print-directory lint types unit

up: root setup lab ## start a node and leave it running for crictl and kubelet
	@$(PY) -m crisplab.dev up

kubelet: root setup lab ## build kubelet and kubectl and start kubelet with static pods on `make up`'s node
	@$(PY) -m crisplab.dev kubelet

down: setup ## end the node that `make up` started, with all that is on it
	@$(PY) -m crisplab.dev down

test-kubelet: root setup lab programs ## only the tests through kubelet, kubectl and an API server
	@$(PY) -m pytest -q -n $(JOBS) tests/e2e/kubelet

soak: root setup lab ## fifty containers log for ten minutes at full speed over rotation and SIGKILL of every service, and every line is counted
	@CRISP_SOAK_CONTAINERS=50 CRISP_SOAK_SECONDS=600 CRISP_SOAK_SPEED=0 $(PY) -m pytest -q -s tests/e2e/test_logs.py -k no_line_is_lost

conformance: root setup lab ## build crictl and critest, run critest, write docs/conformance.md (CONFORMANCE="--handler runc" for another runtime)
	@$(PY) tests/conformance/conformance.py $(CONFORMANCE)

bench: root setup lab ## measure what bench/budgets.toml lists (BENCH="--containerd" adds a peer)
	@$(PY) bench/bench.py $(BENCH)

test-vm: root setup lab programs ## tests/e2e in a Debian 12 VM with systemd and cgroup version 2 (VM="--drivers systemd -- …" for a part)
	@$(PY) tests/conformance/conformance.py --build
	@$(PY) tests/vm/vm.py $(VM)

fresh: root lab ## try `make demo` and `make test` in a bare Debian 12 tree
	@tests/fresh/run

lint: setup ## ruff, import-linter, shell syntax
	@$(BIN)/ruff check --quiet . && $(BIN)/ruff format --quiet --check . && echo "ruff: fine"
	@$(BIN)/lint-imports --no-logo 2>&1 | tail -n 1
	@for script in .ci/run deploy/install-debian-packages deploy/unpack-debian-packages tests/fresh/run tests/vm/install tests/vm/inside; do bash -n $$script || exit 1; done

types: setup ## mypy --strict
	@$(BIN)/mypy --no-error-summary $(SOURCES) bench tests && echo "mypy: fine"

unit: setup ## the tests beside each package, and of what the documents promise
	@$(PY) -m pytest -q -n $(JOBS) proto libs services cli tests/test_docs.py

e2e: root setup lab programs ## the tests of the whole
	@$(PY) -m pytest -q -n $(JOBS) tests/e2e

mutants: setup ## mutation tests of the modules with fast unit tests (MUTANTS="servicekit.tasks" for a part): survivors are killed or named
	@$(PY) tests/mutants.py $(MUTANTS)

openapi: setup ## export each service's OpenAPI document to proto/openapi/
	@for service in image runtime net monitor; do $(PY) -m $${service}_svc --openapi > proto/openapi/$$service-svc.json || exit 1; done
	@$(PY) -m cri_gateway --openapi > proto/openapi/cri-gateway.json

setup: $(SETUP) ## install what crisp needs: Debian packages and .venv
$(SETUP): requirements.lock proto/cri/api.proto proto/hatch_build.py $(addsuffix /pyproject.toml,$(PACKAGES))
	@deploy/install-debian-packages runtime
	@test -x $(PY) || /usr/bin/python3 -m venv .venv
	@echo "installing the locked Python packages"
	@$(PY) -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation $(addprefix -e ,$(PACKAGES))
	@touch $@

lab: setup ## fetch what only the demo, tests and benches need; daemons are unpacked beside the checkout, not installed
	@deploy/install-debian-packages lab
	@deploy/unpack-debian-packages .cache/debian docker-registry containerd docker.io libdevmapper1.02.1 golang-github-opencontainers-specs-dev

lock: setup ## resolve what the packages and pyproject.toml's groups depend on (LOCK=--upgrade for newer versions)
	@$(BIN)/uv pip compile --quiet --generate-hashes --no-header --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
	  --no-emit-package crisp-proto --no-emit-package crisp-servicekit --group build --group check $(LOCK) \
	  $(addsuffix /pyproject.toml,$(PACKAGES)) -o requirements.lock

clean: ## remove .venv, .cache and what tools left
	@rm -rf .venv .cache .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
