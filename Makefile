# The README's commands. Each makes the environment on first use.
PYTHON ?= python3
VENV ?= .venv
# A version that `pip install` finds as a wheel for any platform; override for another build: make demo TORCH=torch==2.6.0
TORCH ?= torch==2.13.0
DATA ?=
# Processes of `make test`; a file of tests stays in one.
JOBS ?= 2
ARGS ?=
PARTS ?=

READY := $(VENV)/ready

.PHONY: demo test bench gpu-check lint clean

demo: $(READY)
	$(VENV)/bin/hubert-ecg demo $(if $(DATA),--data_path $(DATA)) $(ARGS)

test: $(READY)
	$(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

# Rows of this device end up in benchmarks/results/.
bench: $(VENV)/peers
	mkdir -p build
	$(VENV)/bin/python -m pytest benchmarks -q -s --benchmark-columns=median,iqr,rounds --benchmark-sort=name \
		--benchmark-json=build/benchmarks.json $(ARGS)
	$(VENV)/bin/python benchmarks/rows.py compare build/benchmarks.json
	$(VENV)/bin/python benchmarks/rows.py keep build/benchmarks.json

# On a machine with a GPU, in the environment of PYTHON, which has torch, nvcc, cmake and ninja. PARTS= names some of
# build cuda tests features model steps use memcheck racecheck.
gpu-check:
	$(PYTHON) .ci/gpu.py $(PARTS) $(if $(ARGS),-- $(ARGS))

# What ours is timed against, beyond what the tests need.
$(VENV)/peers: $(READY)
	$(VENV)/bin/pip install --disable-pip-version-check -e ".[bench]"
	touch $(VENV)/peers

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror csrc/*
	$(VENV)/bin/mypy

clean:
	rm -rf build dist $(VENV)

# Editable, so that the tests run the tree they stand in; native code is rebuilt when it changed.
$(READY): pyproject.toml CMakeLists.txt $(wildcard csrc/*)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --disable-pip-version-check "$(TORCH)"
	$(VENV)/bin/pip install --disable-pip-version-check -e ".[dev,formats]"
	# Kaldi's definition in plain Python, for parity tests; out of sight, because its binary fits another torch.
	$(VENV)/bin/pip install --disable-pip-version-check --no-deps --upgrade --target $(VENV)/torchaudio torchaudio==2.7.1
	@$(VENV)/bin/hubert-ecg info | grep "^cuda"
	touch $(READY)
