# make demo     learn, score and search on real data, in this folder
# make test     the fast tests
# make fuzz     damaged files of every format, tens of thousands, for about ten minutes
# make lint     ruff and mypy
# make docs     the site of docs/, into build/docs: no network, and it needs none to be read
# make wheel    the package, tested as it is installed
# make release-check   equal bytes from equal sources, and the wheel works alone
# make kill-check   every output killed 25 times and resumed, some minutes
# make gpu-check    the kernels of GPUs: sanitizers, planted faults, other compilers (an hour)
# make bench    speed, side by side with what people use today

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
RUN ?= build/bench.json
# Compiling kernels takes most of the time, one core a process.
PARALLEL ?= -n auto --maxprocesses 4
# What an installed package can get wrong: missing files, the command, compiling where it lies.
INSTALLED := tests/test_cli.py tests/test_files.py tests/test_kernels.py tests/test_network.py \
	tests/test_scoring.py tests/test_train_command.py

.PHONY: demo test fuzz kill-check lint docs wheel release-check gpu-check bench clean

demo: .venv/ready
	$(BIN)/fastpair demo

test: .venv/ready
	$(BIN)/pytest $(PARALLEL)

kill-check: .venv/ready
	FASTPAIR_KILLS=25 $(BIN)/pytest -s tests/test_kills.py

fuzz: .venv/ready
	HYPOTHESIS_PROFILE=search $(BIN)/pytest tests/test_damage.py

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/types && mkdir -p build/types
	cp -r fastpair build/types/fastpair && cp -r kernels build/types/fastpair/kernels
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p fastpair

# Warnings are errors, also for links and names that lead nowhere.
docs: .venv/ready
	$(BIN)/sphinx-build -q -E -W --keep-going -n -b html docs build/docs
	$(BIN)/python docs/offline.py build/docs

# Some tests run in another folder, on the wheel in an environment of its own.
wheel: .venv/ready
	rm -rf build/wheel dist && mkdir -p build/wheel
	$(BIN)/python -m build --outdir dist .
	$(PYTHON) -m venv build/wheel/venv
	build/wheel/venv/bin/python -m pip install -q -c constraints.txt dist/*.whl \
		pytest pytest-xdist hypothesis
	cp -r tests pyproject.toml build/wheel/
	cd build/wheel && venv/bin/pytest $(PARALLEL) $(INSTALLED)

release-check: .venv/ready
	$(BIN)/python tests/release_check.py

# The oldest and the newest compiler that are supported, beside that of the tests.
NVRTC := nvidia-cuda-nvrtc-cu12==12.9.86 nvidia-cuda-nvrtc==13.5.37

gpu-check: .venv/ready
	FASTPAIR_SANITIZE=address,undefined ASAN_OPTIONS=detect_leaks=0 \
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
		$(BIN)/pytest -p no:faulthandler tests/test_simulated_gpu.py tests/test_gpu_kernels.py \
		tests/test_gpu_tiles.py tests/test_gpu_lookup.py
	$(BIN)/python tests/planted_faults.py
	$(BIN)/python tests/compile_gpu.py
	for wheel in $(NVRTC); do \
		$(BIN)/python -m pip install -q --upgrade --target build/$$wheel $$wheel && \
		$(BIN)/python tests/compile_gpu.py --nvrtc build/$$wheel || exit 1; \
	done

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
