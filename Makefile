# `make sweep` tunes a tiny GPT and a tiny MoE with real jobs on 4 CPU ranks. `make test` runs all tests. Both set up what
# they need. The oldest supported release of Megatron-Core is the one that they run with; `make test-newest` runs the tests
# with the newest one, in an environment of its own.
OLDEST_PYTHONS := 3.11 3.12 3.13
NEWEST_PYTHONS := 3.13 3.12
PYTHON ?= $(call python,$(OLDEST_PYTHONS))
NEWEST_PYTHON ?= $(call python,$(NEWEST_PYTHONS))
VENV := .venv
NEWEST := .venv-newest
READY := $(VENV)/.ready
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: sweep test test-unit test-integration test-newest test-bridge test-cuda lint format oracle bench clean

# $(call python,VERSIONS): the first of these versions of Python that runs, from the PATH or from pyenv, whose commands on
# the PATH may exist without a Python behind them.
python = $(shell for version in $(1); do \
	for found in python$$version python3 python "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/$$version.*/bin/python; do \
		"$$found" -c "import ensurepip, sys; sys.exit('%d.%d' % sys.version_info[:2] != '$$version')" 2>/dev/null \
			&& command -v "$$found" && exit; done; done)

# $(call environment,FOLDER,PYTHON,VERSIONS,CONSTRAINTS): builds an environment with megatune and what its tests need.
define environment
	@test -n "$(2)" || { echo "$(1) needs a Python of version $(3), with venv, and none runs here: install one (pyenv \
	install, uv python install, or a package such as python3.13-venv), or name its path: PYTHON=..." >&2; exit 1; }
	$(2) -m venv --clear $(1)
	$(1)/bin/pip install --quiet --constraint $(4) torch
	$(1)/bin/pip install --quiet --constraint $(4) --editable '.[dev]'
	touch $(1)/.ready
endef

$(READY): pyproject.toml constraints.txt constraints-oldest.txt
	$(call environment,$(VENV),$(PYTHON),$(OLDEST_PYTHONS),constraints-oldest.txt)

$(NEWEST)/.ready: pyproject.toml constraints.txt constraints-newest.txt
	$(call environment,$(NEWEST),$(NEWEST_PYTHON),$(NEWEST_PYTHONS),constraints-newest.txt)

sweep: $(READY)
	$(VENV)/bin/megatune sweep search_spaces/sweeps/tiny-gpt.yaml
	$(VENV)/bin/megatune sweep search_spaces/sweeps/tiny-moe.yaml

test: lint test-unit test-integration

test-unit: $(READY)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest tests/unit --numprocesses auto --cov --cov-report=

test-integration: $(READY)
	$(VENV)/bin/python -m pytest tests/integration tests/security --cov --cov-append --cov-report=term

NEWEST_TESTS := tests/unit tests/integration tests/security
test-newest: $(NEWEST)/.ready
	$(NEWEST)/bin/python -m pytest $(NEWEST_TESTS)

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

# Two environments with a CUDA build of torch and the Python code of Transformer Engine, at their newest and at their oldest
# supported releases. Neither needs a GPU or a driver: tests/cuda/standins.py replaces Transformer Engine's native module in
# every Python process of these environments.
CUDA := .venv-cuda
CUDA_PYTHON ?= $(call python,3.12)
CUDA_RELEASES := newest oldest
CUDA_TESTS := tests/cuda
$(CUDA)/%/.ready: tests/cuda/%.txt tests/cuda/packages.txt constraints.txt
	$(CUDA_PYTHON) -m venv --clear $(@D)
	grep --invert-match --extended-regexp '^(torch|megatron-core|numpy)==' constraints.txt > $(@D)/constraints.txt
	$(@D)/bin/pip install --quiet --requirement $<
	$(@D)/bin/pip install --quiet --constraint $(@D)/constraints.txt --requirement tests/cuda/packages.txt
	$(@D)/bin/pip install --quiet --no-deps --editable .
	printf '%s\nimport tests.cuda.standins; tests.cuda.standins.install()\n' '$(CURDIR)' \
		> "$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/standins.pth"
	touch $@

test-cuda:
	@for release in $(CUDA_RELEASES); do \
		if $(MAKE) --no-print-directory $(CUDA)/$$release/.ready; \
		then $(CUDA)/$$release/bin/python -m pytest $(CUDA_TESTS) --disable-warnings || exit 1; \
		else echo "SKIPPED: the CUDA environment of the $$release releases cannot be built, see above"; fi; done

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
	rm -rf $(VENV) $(NEWEST) $(BRIDGE) $(CUDA) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage
