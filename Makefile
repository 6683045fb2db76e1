# make demo: a fresh clone to a trained GPT-2.
# make test: linters, types and the tests that one waits for.   make test-slow: those that take long.
# make test-oldest: the tests that one waits for, with the oldest versions that pyproject.toml allows; where there is no
# GPU, UV_TORCH_BACKEND=cpu in front spares gigabytes.   make versions: both, and the table of their outcomes.
# make study: a small comparison of activations, from its plan to a report.
# make gpu: all that is measured on a GPU, in half an hour; ARGS="--device cpu --quick" tries it out without one.
# make verify: how exact everything is, in one table, and the tests that show it.
# make coverage: which lines and branches of hf_gem the tests that one waits for go through.
# make mutants: what no test notices, of small changes in the arithmetic, the names and the statistics.
# make fuzz: the readers of names, plans and records against made-up input; on Linux, ARGS="--seconds 600".
# make peers: the test suites of transformers and timm with the family in their models, from their source distributions.
# make bench: the benchmarks of the CPU and the table of their goals, in less than ten minutes.
PYTHON ?= python3
VENV ?= .venv
# What to install as torch, e.g. `make demo TORCH=torch==2.11.0`; one that PYTHON already has is used as it is.
TORCH ?= torch
# Tests run in this many processes, one thread each.
JOBS ?= 2
DEMO_ARGS ?=
ARGS ?=

RUN = $(VENV)/bin
READY = $(VENV)/.ready
OLDEST = $(VENV)-oldest

.PHONY: demo test test-slow test-oldest versions coverage mutants fuzz lint verify bench gpu peers study setup clean

# Without OMP_NUM_THREADS, accelerate's launcher gives a process one thread.
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

bench: $(READY)
	$(RUN)/python -m benchmarks.activation --device cpu --rounds 60
	$(RUN)/python -m benchmarks.memory --device cpu
	$(RUN)/python -m benchmarks.sweep --device cpu --largest 22 --step 2 --rounds 5
	$(RUN)/python -m benchmarks.train_step --device cpu --models gpt2
	$(RUN)/python -m benchmarks.report

# In the environment of make setup where there is one, and otherwise in that of PYTHON, which may have no network.
gpu:
	$(if $(wildcard $(RUN)/python),$(RUN)/python,$(PYTHON)) -m benchmarks.gpu $(ARGS)

peers: $(READY)
	$(RUN)/python -m tests.peers.run $(ARGS)

study: $(READY)
	OMP_NUM_THREADS=1 $(RUN)/python recipes/compare.py --plan recipes/plans/smoke.yaml --jobs $(JOBS) $(STUDY_ARGS)

setup: $(READY)

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("hf_gem needs Python 3.10 or newer, got " \
		+ sys.version.split()[0] + "; name another one with make PYTHON=python3.12")'
	$(PYTHON) -m venv $$($(PYTHON) -c 'import torch' 2>/dev/null && echo --system-site-packages) $(VENV)
	$(RUN)/python -c 'import torch' 2>/dev/null || $(RUN)/python -m pip install --quiet "$(TORCH)"
	@# timm's torchvision could ask for another torch: hold on to this one.
	$(RUN)/python -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' > $(VENV)/torch.txt
	$(RUN)/python -m pip install --quiet --constraint $(VENV)/torch.txt --editable ".[train,dev]"
	touch $@

$(OLDEST)/.ready: pyproject.toml
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet uv
	$(OLDEST)/bin/uv pip install --quiet --python $(OLDEST)/bin/python --resolution lowest-direct --editable ".[train,dev]"
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) .pytest_cache .mypy_cache .ruff_cache
