# make demo    pictures by the bundled predictors, then one's own: record, fit, draw, compare; on a CPU
# make dev     the environment to work in: .venv
# make check   format, lint, types
# make docs    the documentation site, in site/: open site/index.html
# make test    check, tests on the source tree, those of files on the wheel from another folder;
#              JOBS=8 takes 8 processes instead of 2
# make test-all  make test with the cases marked `nightly`; notes in tests/LAST_FULL_RUN.txt that it ran
# make oldest  the tests of deploying, recording and fitting on the lowest versions of pyproject.toml

PYTHON ?= python3
# Installed first, so that a CPU build is taken where the package index offers one.
TORCH ?= torch==2.13.0

# Several threads that wait for each other busily are many times slower on a shared machine.
export OMP_NUM_THREADS = 1
export OMP_WAIT_POLICY = passive
unexport PYTHONPATH

DEV := .venv/bin/python
TEST := .venv-test/bin/python
OLDEST := .venv-oldest/bin/python
# A file's tests share what they have prepared, so files are dealt out, not tests, in their order.
JOBS ?= 2
PYTEST := -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder --durations=20
FULL_RUN := tests/LAST_FULL_RUN.txt
# What an installation can break: all that is looked up beside the code, or started by its name.
OF_FILES := 'zoo|configs|__file__|foreseer\.cli|sys\.executable'
OLDEST_TESTS := core predictors rules checkpoints forecasting modes adaptive schedules hosts \
	pixel_pipeline pixel_flux_pipeline recorder kept_inputs shards repair merge dataset gram face \
	any_anchors refit lesa_training search_command benchmark verify_pipeline generate cli mistakes
PIP_INSTALL := -m pip install -qq --disable-pip-version-check

.PHONY: demo dev docs check test test-all editable test-source test-wheel oldest clean

demo: .venv/.installed
	@$(DEV) -m foreseer demo --out runs/demo

dev: .venv/.dev

docs: .venv/.dev
	$(DEV) -m mkdocs build --strict

# The last run may have left a wheel there, whose modules would hide that one is gone from here.
editable: .venv-test/.installed
	$(TEST) $(PIP_INSTALL) --no-deps --no-build-isolation --editable .

check: editable
	$(TEST) -m ruff format --check .
	$(TEST) -m ruff check .
	$(TEST) -m mypy

test: check
	$(MAKE) test-source
	$(MAKE) test-wheel

test-all: check
	@seen=$$(mktemp -d); trap 'rm -rf "$$seen"' EXIT; \
	{ $(TEST) $(PYTEST) -m "" 2>&1; echo $$? > "$$seen/status"; } | tee "$$seen/out"; \
	{ date -u +%F; git describe --always --dirty --abbrev=40 --exclude '*'; tail -n 1 "$$seen/out"; \
	} > $(FULL_RUN); exit $$(cat "$$seen/status")
	$(MAKE) test-wheel

test-source: editable
	$(TEST) $(PYTEST)

# The sdist is built first and the wheel from it. The tests run where no source lies beside them.
test-wheel: .venv-test/.installed
	rm -rf build dist src/foreseer.egg-info packages/foreseer-zoo/build
	mkdir build
	$(TEST) -m build --no-isolation --outdir dist . > build/log 2>&1 || { cat build/log; exit 1; }
	$(TEST) -m build --no-isolation --wheel --outdir dist packages/foreseer-zoo > build/log 2>&1 \
	|| { cat build/log; exit 1; }
	$(TEST) $(PIP_INSTALL) --no-deps --force-reinstall dist/foreseer-*.whl dist/foreseer_zoo-*.whl
	@set -e; elsewhere=$$(mktemp -d); trap 'rm -rf "$$elsewhere"' EXIT; \
	cp -r tests examples pyproject.toml "$$elsewhere"; cd "$$elsewhere"; \
	"$(CURDIR)/$(TEST)" -c "import foreseer; f = foreseer.__file__; print('testing', f); \
	assert 'site-packages' in f" ; \
	"$(CURDIR)/$(TEST)" $(PYTEST) -m "not (slow or fault or nightly)" \
	$$(grep -lE $(OF_FILES) tests/test_*.py)

# Now and then, not in `make test`: torch of that age comes with CUDA, 7 GB on disk. In one process.
oldest:
	$(PYTHON) -m venv --clear .venv-oldest
	$(OLDEST) $(PIP_INSTALL) --constraint .ci/oldest.txt torch
	$(OLDEST) $(PIP_INSTALL) --constraint .ci/oldest.txt --editable ".[train]" \
	accelerate beartype hypothesis markdown-it-py peft pytest
	$(OLDEST) -m pytest -q $(addprefix tests/test_,$(addsuffix .py,$(OLDEST_TESTS))) \
	-k "not ernie and not zimage and not ltx2 and not count_tokens_first and not host_without_taps and not why_a_host"

clean:
	rm -rf .venv .venv-test .venv-oldest build dist src/foreseer.egg-info packages/foreseer-zoo/build

# With pip's bars: this is what a newcomer waits for.
.venv/.installed: pyproject.toml
	@echo "Installing into .venv: $(TORCH) first, then the rest."
	@echo "0.4 GB to download and 1.9 GB on disk where torch comes for CPUs, more with CUDA."
	@$(PYTHON) -m venv --clear .venv
	@$(DEV) -m pip install --disable-pip-version-check "$(TORCH)"
	@$(DEV) -m pip install --disable-pip-version-check --editable ".[train]"
	@touch $@

.venv/.dev: .venv/.installed
	$(DEV) $(PIP_INSTALL) --editable ".[dev]"
	touch $@

.venv-test/.installed: pyproject.toml
	$(PYTHON) -m venv --clear .venv-test
	$(TEST) $(PIP_INSTALL) "$(TORCH)"
	$(TEST) $(PIP_INSTALL) --editable ".[dev]"
	touch $@
