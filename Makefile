# Every target installs what it needs, into $(VENV). Only `make gpu` uses the Python that is there: it is for a machine
# with a GPU and no network.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=

RUN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
VENV_TRITON36 := .venv-triton36
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check
# a worker for each core
PYTEST := -m pytest -n auto --dist worksteal

EXTENSION := fused_lora/_C.abi3.so
CPP := '*.cpp' '*.h' '*.cu' '*.cuh'

.DEFAULT_GOAL := help
.PHONY: help install demo test test-triton36 test-torch test-install test-peft zoo bench native wheel host gpu docs report scaling models sanitize lint format types clean

help:
	@echo 'make demo           the main job: fine-tune a real network on MNIST with the fused layer (a few minutes on a CPU)'
	@echo 'make test           the whole test suite; ARGS="-k layer" for a part'
	@echo 'make bench          pytest benchmarks/ --benchmark-only; ARGS=--quick for two minutes of it'
	@echo 'make host           what a call costs the host, layer by layer; needs no GPU; ARGS=--quick'
	@echo 'make gpu            on a machine with a GPU: kernel tests, races, sanitizer, timing table; ARGS="--only races"'
	@echo 'make report         README tables and docs plots from benchmarks/results/; make docs builds the pages into site/'
	@echo 'make scaling        how a layer grows with its sizes, into benchmarks/results/scaling/'
	@echo 'make models         a training step of whole models, into benchmarks/results/models/'
	@echo 'make native         build the optional compiled extension, for the CPU and the GPUs that are here'
	@echo 'make wheel          a wheel with the extension for every GPU, into dist/; it installs without nvcc'
	@echo 'make sanitize       the compiled extension under ASan and UBSan, over fuzzed operands; its CUDA kernels on the host'
	@echo 'make lint types     ruff, clang-format; mypy.  make format fixes what lint finds'
	@echo 'make test-triton36  the kernel tests on Triton 3.6'
	@echo 'make test-torch     the suite on another PyTorch and its Triton; TORCH=2.14.1, or 2.8.0 with the parts that run there'
	@echo 'make test-install   the wheel alone in a bare environment: fused-lora info, and the README up to PEFT'
	@echo "make test-peft      PEFT's own LoRA tests, unfused and fused, and gradients compared (five minutes on two cores)"
	@echo "make zoo            150 small models of other libraries, adapted and compared: docs/zoo.md; ARGS=\"--only llama\""

install: $(INSTALLED)

$(INSTALLED): pyproject.toml setup.py constraints.txt
	@echo 'Installing into $(VENV) (PyTorch is large: minutes on a slow network) ...'
	@test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	@$(RUN)/python $(PIP_INSTALL) -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(INSTALLED)
	$(RUN)/fused-lora demo $(ARGS)

test: $(INSTALLED)
	$(RUN)/python $(PYTEST) $(ARGS)

bench: $(INSTALLED)
	$(RUN)/python -m pytest benchmarks/ --benchmark-only $(ARGS)

native: $(INSTALLED)
	FUSED_LORA_BUILD_EXT=1 $(RUN)/python $(PIP_INSTALL) -c constraints.txt --no-build-isolation --no-deps -e . $(ARGS)

# of the PyTorch that is installed here: C++ extensions are for one version of it
wheel: $(INSTALLED)
	FUSED_LORA_BUILD_EXT=1 FUSED_LORA_CUDA_ARCHS=all $(RUN)/python -m pip wheel --disable-pip-version-check \
		--no-build-isolation --no-deps --wheel-dir dist . $(ARGS)

# with the extension, built anew where its sources have changed
host: $(EXTENSION)
	$(RUN)/fused-lora bench --host $(ARGS)

$(EXTENSION): $(INSTALLED) setup.py $(wildcard csrc/*.* csrc/*/*.* csrc/*/*/*.*)
	$(MAKE) native
	@touch $@

# CUDA kernels run on the shim of the tests: without a GPU, and without nvcc
SANITIZED := build/sanitized
SANITIZE := -std=c++17 -O1 -fno-sanitize-recover=all -Wall -Wno-unknown-pragmas -Wno-psabi \
	-Itests/cuda_shim -Icsrc/cuda/kernels
sanitize: $(INSTALLED)
	@mkdir -p $(SANITIZED)
	$(CXX) $(SANITIZE) -g -fsanitize=address,undefined -o $(SANITIZED)/fuzz tests/cuda_shim/fuzz.cpp
	$(SANITIZED)/fuzz 1 60
	$(CXX) $(SANITIZE) -fsanitize=address -Icsrc/cuda/hopper -o $(SANITIZED)/fuzz_hopper tests/cuda_shim/fuzz_hopper.cpp
	$(SANITIZED)/fuzz_hopper 1 20
	$(RUN)/python tests/sanitize.py $(ARGS)

report: $(INSTALLED)
	$(RUN)/python -m tools.draw
	$(RUN)/python -m tools.publish $(ARGS)

scaling: $(INSTALLED)
	$(RUN)/python -m tools.scaling $(ARGS)

models: $(INSTALLED)
	$(RUN)/python -m tools.models $(ARGS)

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(RUN)/mkdocs build $(ARGS)

gpu:
	$(PYTHON) -m tools.gpu $(ARGS)

lint: $(INSTALLED)
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/clang-format --dry-run --Werror $$(git ls-files $(CPP))

format: $(INSTALLED)
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .
	$(RUN)/clang-format -i $$(git ls-files $(CPP))

types: $(INSTALLED)
	$(RUN)/mypy

# Triton 3.6 is what torch 2.9 to 2.11 bring; its interpreter needs numpy < 2.4
test-triton36: pyproject.toml
	@test -x $(VENV_TRITON36)/bin/python || $(PYTHON) -m venv $(VENV_TRITON36)
	@$(VENV_TRITON36)/bin/python $(PIP_INSTALL) torch==2.13.0 triton==3.6.0 'numpy<2.4' regex safetensors pytest pytest-xdist
	$(VENV_TRITON36)/bin/python $(PYTEST) tests/kernels tests/test_plans_triton.py $(ARGS)

# another PyTorch with the Triton that it brings: 2.8.0 is the oldest that is supported, 2.14.1 the newest that is proved.
# From the pinned one on it is the whole suite; on older ones, which the neighbours in the dev extra no longer take, what
# depends on PyTorch alone
TORCH ?= 2.8.0
VENV_TORCH ?= .venv-torch$(TORCH)
ON_OLDER := tests/test_compile.py tests/test_compile_cuda.py tests/test_layer.py tests/test_functional.py \
	tests/test_plans.py tests/test_plans_triton.py tests/test_imports.py tests/kernels/test_workspace.py \
	tests/kernels/test_compiled.py
test-torch:
	@test -x $(VENV_TORCH)/bin/python || $(PYTHON) -m venv $(VENV_TORCH)
	@if printf '2.13.0\n%s\n' $(TORCH) | sort --check=quiet --version-sort; then \
		grep -v '^torch==\|^triton==' constraints.txt > $(VENV_TORCH)/constraints.txt; \
		$(VENV_TORCH)/bin/python $(PIP_INSTALL) -c $(VENV_TORCH)/constraints.txt torch==$(TORCH) -e '.[dev]' && \
		$(VENV_TORCH)/bin/python $(PYTEST) $(ARGS); \
	else \
		$(VENV_TORCH)/bin/python $(PIP_INSTALL) torch==$(TORCH) 'numpy<2.4' jinja2 regex safetensors peft hypothesis \
			setuptools pytest && \
		$(VENV_TORCH)/bin/python -m pytest $(ON_OLDER) $(ARGS); \
	fi

# a build needs setuptools, which PyTorch brings
test-install: $(INSTALLED)
	$(RUN)/python tests/bare_install.py

# the tests are those in the source distribution of the PEFT that is installed
test-peft: $(INSTALLED)
	@$(RUN)/python $(PIP_INSTALL) -c constraints.txt -e '.[peft-suite]'
	$(RUN)/python tests/peft_suite/run.py $(ARGS)

# PyPI's torchvision is for one PyTorch, and that is the newest that is tested
VENV_ZOO := .venv-zoo
zoo:
	@test -x $(VENV_ZOO)/bin/python || $(PYTHON) -m venv $(VENV_ZOO)
	@$(VENV_ZOO)/bin/python $(PIP_INSTALL) torch==2.14.1 torchvision==0.29.1 timm==1.0.31 transformers==5.24.0 peft==0.21.2 \
		regex safetensors tqdm matplotlib==3.11.2
	$(VENV_ZOO)/bin/python -m tools.zoo $(ARGS)

clean:
	rm -rf $(VENV) $(VENV_TRITON36) $(VENV_ZOO) .venv-torch* build dist *.egg-info demo-output site
