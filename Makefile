# make demo: from a fresh clone to a trained GPT-2.
# make test: linters, type checks and the fast tests.   make test-slow: the slow tests.
# make test-oldest: the fast tests with the oldest versions that pyproject.toml allows; on a machine without a GPU, put
# UV_TORCH_BACKEND=cpu before it to save gigabytes.   make versions: test and test-oldest, and a table of the outcomes.
# make study: a small comparison of activations, from its plan to a report.
# make gpu: all GPU measurements in half an hour; ARGS="--device cpu --quick" tries them out without a GPU.
# make verify: a table of how exact everything is, and the tests that show it.
# make peers: the test suites of transformers and timm, from their source distributions, with the family in the models.
# make coverage: the lines and branches of hf_gem that the fast tests run.
# make mutants: small changes in the arithmetic, the names and the statistics that no test notices.
# make fuzz: random bytes for the readers of names, plans and records; on Linux, ARGS="--seconds 600".
# make docs: the documentation site, in site/.
# make bench: the CPU benchmarks and the table of their goals, in less than ten minutes.
PYTHON ?= python3
VENV ?= .venv
# The torch to install, e.g. `make demo TORCH=torch==2.11.0`. If PYTHON already has torch, that one is used.
TORCH ?= torch
# Number of processes for the tests, with one thread each.
JOBS ?= 2
DEMO_ARGS ?=
ARGS ?=

RUN = $(VENV)/bin
READY = $(VENV)/.ready
OLDEST = $(VENV)-oldest
# The interpreter of Triton 3.6, which comes with torch 2.11, does not work with newer versions.
BESIDE_OLDEST = numpy<2.4

.PHONY: demo test test-slow test-oldest versions coverage mutants fuzz lint verify docs bench gpu peers study setup clean

# Without OMP_NUM_THREADS, accelerate's launcher gives a process only one thread.
demo: $(READY)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$$(getconf _NPROCESSORS_ONLN)} $(RUN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		recipes/gpt2_pretrain.py --preset demo --hidden_act gem_n2 $(DEMO_ARGS)

test: lint
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest -n $(JOBS) -m "not slow" --junitxml=build/tests/newest.xml $(TEST_ARGS)

test-slow: $(READY)
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest -n $(JOBS) -m slow $(TEST_ARGS)

test-oldest: $(OLDEST)/.ready
	HF_GEM_OLDEST=1 OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n $(JOBS) -m "not slow" \
		--junitxml=build/tests/oldest.xml $(TEST_ARGS)

versions: test-oldest test
	$(RUN)/python -m tests.versions --oldest $(OLDEST) build/tests/oldest.xml --newest $(VENV) build/tests/newest.xml

coverage: $(READY)
	$(RUN)/python -m coverage erase
	OMP_NUM_THREADS=1 $(RUN)/python -m coverage run -m pytest -n $(JOBS) -m "not slow" $(TEST_ARGS)
	$(RUN)/python -m coverage combine --quiet
	$(RUN)/python -m coverage report

mutants: $(READY)
	OMP_NUM_THREADS=1 $(RUN)/python -m tests.mutation.run $(ARGS)

fuzz: $(READY)
	$(RUN)/python -c 'import atheris' 2>/dev/null || $(RUN)/python -m pip install --quiet atheris
	OMP_NUM_THREADS=1 $(RUN)/python -m tests.fuzz.run $(ARGS)

lint: $(READY)
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

verify: $(READY)
	$(RUN)/python -m benchmarks.verify --device cpu --tests $(ARGS)

# Strict: a warning fails, but with --quiet none would. The variable silences an advertisement of the theme.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(RUN)/mkdocs build --strict $(ARGS)

bench: $(READY)
	$(RUN)/python -m benchmarks.activation --device cpu --rounds 60
	$(RUN)/python -m benchmarks.memory --device cpu
	$(RUN)/python -m benchmarks.sweep --device cpu --largest 22 --step 2 --rounds 5
	$(RUN)/python -m benchmarks.train_step --device cpu --models gpt2
	$(RUN)/python -m benchmarks.report

# Uses the environment of make setup if there is one, and otherwise that of PYTHON, which may have no network.
gpu:
	$(if $(wildcard $(RUN)/python),$(RUN)/python,$(PYTHON)) -m benchmarks.gpu $(ARGS)

peers: $(READY)
	$(RUN)/python -m tests.peers.run $(ARGS)

study: $(READY)
	OMP_NUM_THREADS=1 $(RUN)/python recipes/compare.py --plan recipes/plans/smoke.yaml --jobs $(JOBS) $(STUDY_ARGS)

setup: $(READY)

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("got Python " + sys.version.split()[0] \
		+ ". hf_gem needs 3.10 or newer. Name another one with make PYTHON=python3.12")'
	$(PYTHON) -m venv $$($(PYTHON) -c 'import torch' 2>/dev/null && echo --system-site-packages) $(VENV)
	$(RUN)/python -c 'import torch' 2>/dev/null || $(RUN)/python -m pip install --quiet "$(TORCH)"
	@# timm's torchvision could pull in another torch, so pin this one.
	$(RUN)/python -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' > $(VENV)/torch.txt
	$(RUN)/python -m pip install --quiet --constraint $(VENV)/torch.txt --editable ".[train,dev]"
	touch $@

$(OLDEST)/.ready: pyproject.toml
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet uv
	@# A constraint, since a requirement would get the oldest version too.
	echo "$(BESIDE_OLDEST)" > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/uv pip install --quiet --python $(OLDEST)/bin/python --resolution lowest-direct --editable ".[train,dev]" \
		--constraints $(OLDEST)/constraints.txt
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) .pytest_cache .mypy_cache .ruff_cache site
