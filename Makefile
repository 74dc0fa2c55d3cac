# make demo     learn, score and search on real data, in this folder
# make test     the fast tests
# make fuzz     damaged files of every format, tens of thousands, for about ten minutes
# make lint     ruff and mypy
# make wheel    the package, tested as it is installed
# make bench    speed, side by side with what people use today

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
RUN ?= build/bench.json

.PHONY: demo test fuzz lint wheel bench clean

demo: .venv/ready
	$(BIN)/fastpair demo

test: .venv/ready
	$(BIN)/pytest

fuzz: .venv/ready
	HYPOTHESIS_PROFILE=search $(BIN)/pytest tests/test_damage.py

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/types && mkdir -p build/types
	cp -r fastpair build/types/fastpair && cp -r kernels build/types/fastpair/kernels
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p fastpair

# The tests run in another folder, on the wheel in an environment of its own.
wheel: .venv/ready
	rm -rf build/wheel dist && mkdir -p build/wheel
	$(BIN)/python -m build --outdir dist .
	$(PYTHON) -m venv build/wheel/venv
	build/wheel/venv/bin/python -m pip install -q -c constraints.txt dist/*.whl pytest hypothesis
	cp -r tests pyproject.toml build/wheel/
	cd build/wheel && venv/bin/pytest

# Peers first; chunkdot works with newer libraries than it asks for. ONLY selects works.
bench: .venv/ready
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[bench]'
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps chunkdot numba-progress || \
		echo "chunkdot does not install here: it will be missing from the table"
	mkdir -p build
	$(BIN)/pytest benchmarks --benchmark-only --benchmark-sort=name --benchmark-json=$(RUN) $(ONLY)
	@echo "Tables: $(BIN)/python benchmarks/report.py $(RUN)"

.venv/ready: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "fastpair needs Python 3.11 or newer"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist *.egg-info fastpair-demo
