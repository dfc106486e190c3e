# `make sweep` tunes a tiny GPT and a tiny MoE with real jobs on 4 CPU ranks. `make test` runs all tests. Both set up what
# they need.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
READY := $(VENV)/.ready
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: sweep test test-unit test-integration test-bridge lint format oracle bench clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --constraint constraints.txt torch
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

sweep: $(READY)
	$(VENV)/bin/megatune sweep search_spaces/sweeps/tiny-gpt.yaml
	$(VENV)/bin/megatune sweep search_spaces/sweeps/tiny-moe.yaml

test: lint test-unit test-integration

test-unit: $(READY)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest tests/unit --numprocesses auto --cov --cov-report=

test-integration: $(READY)
	$(VENV)/bin/python -m pytest tests/integration --cov --cov-append --cov-report=term

# An environment with Megatron Bridge, a newer Megatron-Core and megatune, as in a container. Bridge's wheels ask for
# Python 3.12, of which they use one name, and for packages that need a GPU. tests/bridge/standins.py replaces both, in
# every Python process of this environment.
BRIDGE := .venv-bridge
BRIDGE_TESTS := tests/bridge
$(BRIDGE)/.ready: tests/bridge/requirements.txt constraints.txt
	$(PYTHON) -m venv $(BRIDGE)
	$(BRIDGE)/bin/pip install --quiet --constraint constraints.txt torch numpy pandas psutil pydantic pyyaml rich \
		typer optuna mlflow plotly scikit-learn nvidia-ml-py hypothesis pytest pytest-timeout 'transformers>=5.8,<=5.12.1'
	$(BRIDGE)/bin/pip install --quiet --no-deps --ignore-requires-python --requirement tests/bridge/requirements.txt
	$(BRIDGE)/bin/pip install --quiet --no-deps --editable .
	printf '%s\nimport tests.bridge.standins; tests.bridge.standins.install()\n' '$(CURDIR)' \
		> "$$($(BRIDGE)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/standins.pth"
	touch $@

test-bridge:
	@$(MAKE) --no-print-directory $(BRIDGE)/.ready || { echo "SKIPPED: the environment of Megatron Bridge cannot be built, see above"; exit 0; }
	@test ! -e $(BRIDGE)/.ready || $(BRIDGE)/bin/python -m pytest $(BRIDGE_TESTS) --disable-warnings

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-cache

oracle: $(READY)
	MEGATUNE_ORACLE_DRAWS=2000 $(VENV)/bin/python -m pytest tests/integration/test_rules_against_megatron.py --timeout 7200

bench: $(READY)
	$(VENV)/bin/python -m tests.bench.space
	$(VENV)/bin/python -m tests.bench.ask
	$(VENV)/bin/python -m tests.bench.memory
	$(VENV)/bin/python -m tests.bench.oracle_memory
	$(VENV)/bin/python -m tests.bench.published
	$(VENV)/bin/python -m tests.bench.audit
	$(VENV)/bin/python -m tests.bench.stopping
	$(VENV)/bin/python -m tests.bench.replay

format: $(READY)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) $(BRIDGE) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
