# Needs Python >= 3.10, a C++20 compiler and make. Everything else goes into .venv, in the versions of constraints.txt.
# The package is built in place and .venv refers to this folder, so that changes in elbo_ext/*.py need no build, and
# changes in csrc compile only the files they concern.

PYTHON ?= python3
VENV := .venv
VENV_PYTHON := $(VENV)/bin/python
ARGS ?=
# The CUDA library: warnings, spilled registers and local memory are errors. 0 for a compiler that sees it differently.
export ELBO_EXT_STRICT ?= 1
# A file that takes pytest's exit status in the place of make (.ci/run).
STATUS ?=

# Folders are among the sources, so that a file that is gone counts as a change.
SOURCES := setup.py pyproject.toml $(shell find csrc)
LIBRARY := $(wildcard elbo_ext/_C.*.so)
# What setup.py reads of the environment. The stamp of the build holds it, so that another value counts as a change.
SETTINGS := $(foreach name,CXX CUDA_HOME CUDA_PATH ELBO_EXT_CUDA ELBO_EXT_STRICT TORCH_CUDA_ARCH_LIST,$(name)=$($(name)))
CHANGED := $(if $(LIBRARY),,always)
ifneq ($(strip $(SETTINGS)),$(strip $(shell cat $(VENV)/built 2> /dev/null)))
CHANGED := always
endif

.PHONY: help build test test-emulator test-torch test-headers wheel test-wheel quick lint format demo bench clean always
.DELETE_ON_ERROR:

help:
	@echo 'make test    run the tests                    ARGS="-k kl" are options of pytest'
	@echo 'make quick   run those of them that take less than a minute together, for work on a formula'
	@echo 'make lint    ruff, mypy and clang-format        make format does what they can do by themselves'
	@echo 'make wheel          build a wheel into dist; make test-wheel runs the tests with it in a clean environment'
	@echo 'make test-headers   compile against the oldest torch (downloads 80 MB)'
	@echo 'make test-torch     run the tests with another torch, TORCH=oldest, newest or 2.12.1 (downloads it)'
	@echo 'make test-emulator  run the CUDA kernels on the CPU, in many orders and under sanitizers: tests/README.md'
	@echo 'make demo    train a VAE on handwritten digits  ARGS="--epochs 10" are options of python -m elbo_ext.demo'
	@echo '                                                ARGS=bound measures what theory says about the bound'
	@echo '                                                ARGS=counts compares likelihoods of counts on held-out data'
	@echo 'make bench   measure speed and memory           ARGS="--quick" are options of python -m benchmarks'
	@echo 'make build   only create $(VENV) and compile the package'
	@echo 'make clean   remove $(VENV) and everything that was built'
	@echo 'PYTHON=python3.12 chooses the Python that $(VENV) is created with, CXX=clang++ the compiler.'

test: build
	@$(VENV_PYTHON) -m pytest -q $(ARGS) $(if $(STATUS),; echo $$? > '$(STATUS)')

quick: build
	@$(VENV_PYTHON) -m pytest -q -m quick tests/values tests/gradients tests/build/test_registry.py $(ARGS)

# All of them, whatever the first ones find. They read the sources and need no build; mypy has torch in $(VENV).
CXX_FILES = $(shell find csrc -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu')
lint: $(VENV)/requirements
	@failed=; \
	$(VENV)/bin/ruff check --quiet . || failed=1; \
	$(VENV)/bin/ruff format --quiet --check . || failed=1; \
	$(VENV)/bin/mypy --no-error-summary || failed=1; \
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES) || failed=1; \
	[ -z "$$failed" ]

format: $(VENV)/requirements
	@$(VENV)/bin/ruff check --silent --fix --exit-zero .
	@$(VENV)/bin/ruff format .
	@$(VENV)/bin/clang-format -i $(CXX_FILES)

# The whole suite with another torch: oldest, newest, or a version. The first needs no more than the headers of the oldest.
TORCH ?= oldest
test-torch: build
	@$(VENV_PYTHON) tests/build/with_torch.py $(TORCH) $(ARGS)

test-headers: build
	@$(VENV_PYTHON) -m pytest -q -n 0 -m download $(ARGS) $(if $(STATUS),; echo $$? > '$(STATUS)')

test-emulator: build
	@$(VENV_PYTHON) -m pytest -q tests/emulator -m 'slow or not slow' $(ARGS) $(if $(STATUS),; echo $$? > '$(STATUS)')

# A wheel for any torch from 2.11 on, repaired to bring along what is not torch's; and the suite with it, in a virtual
# environment of its own, without the sources. PLATFORM is what auditwheel is asked for: what this machine's C library allows.
PLATFORM ?= auto
wheel: build
	@rm -rf dist build/wheel
	@$(VENV_PYTHON) -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation -w build/wheel .
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(VENV_PYTHON) -m auditwheel repair --plat $(PLATFORM) --exclude 'libtorch*' -w dist build/wheel/*.whl

test-wheel: wheel
	@$(VENV_PYTHON) tests/build/with_wheel.py dist $(ARGS)

demo: build
	@$(VENV_PYTHON) -m elbo_ext.demo $(ARGS)

bench: build
	@$(VENV_PYTHON) -m benchmarks $(ARGS)

build: $(VENV)/built

# Each stamp appears when its step is done, so that a step that was interrupted is done again, and bears the time when
# the step began, so that a change made meanwhile counts.
$(VENV)/built: $(VENV)/requirements $(SOURCES) $(CHANGED)
	@echo 'Compiling elbo_ext ...'
	@echo '$(SETTINGS)' > $@.begun
	@$(VENV_PYTHON) setup.py -q egg_info build_ext --inplace
	@mv $@.begun $@

$(VENV)/requirements: $(VENV)/created constraints.txt
	@echo 'Installing the packages of constraints.txt into $(VENV) (torch is large) ...'
	@touch $@.begun
	@$(VENV_PYTHON) -m pip install --quiet --disable-pip-version-check -r constraints.txt
	@mv $@.begun $@

$(VENV)/created:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; \
	  v >= (3, 10) or sys.exit("elbo_ext needs Python >= 3.10; $(PYTHON) is %d.%d. Set PYTHON=..." % v)'
	@echo 'Creating $(VENV) ...'
	@$(PYTHON) -m venv --clear $(VENV)
	@echo '$(CURDIR)' > "$$($(VENV_PYTHON) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/elbo_ext.pth"
	@touch $@

clean:
	rm -rf $(VENV) .venv-torch-* .venv-wheel build dist elbo_ext.egg-info elbo_ext/_C.*.so elbo_ext/_cuda.so .pytest_cache .hypothesis benchmark-results \
	  .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
