"""Options of the suites, threads of every library, the race, and what is stored with the times."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from fastpair.backend import thread_count

CORES = thread_count()

# Libraries read these when they are first imported, so this comes before any of them.
for _name in ("OMP", "OPENBLAS", "MKL", "NUMBA"):
    os.environ[f"{_name}_NUM_THREADS"] = str(CORES)
# Numba's own pool may not be entered by two threads at once, OpenMP's may.
os.environ.setdefault("NUMBA_THREADING_LAYER_PRIORITY", "omp tbb workqueue")

from fastpair.cli import use_wide_matrix_products  # noqa: E402

use_wide_matrix_products()  # NumPy's and faiss's OpenBLAS at their best, as in fastpair itself

import pytest  # noqa: E402
from race import Results, Work, replay, run_race  # noqa: E402

PACKAGES = [
    "fastpair",
    "numpy",
    "scipy",
    "numba",
    "scikit-learn",
    "faiss-cpu",
    "torch",
    "duckdb",
    "usearch",
    "numkong",
    "chunkdot",
    "metric-learn",
    "pytest-benchmark",
]

_RESULTS = pytest.StashKey[dict[str, tuple[Work, Results]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the sizes and the rounds of a run."""
    group = parser.getgroup("fastpair benchmarks")
    group.addoption(
        "--scale",
        type=float,
        default=1.0,
        help="Multiply numbers of entities and pairs: 0.01 for a quick trial.  [default: 1]",
    )
    group.addoption(
        "--rounds", type=int, default=5, help="Rounds of every contender.  [default: 5]"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Make room for the results of works."""
    config.stash[_RESULTS] = {}


@pytest.fixture
def race(request: pytest.FixtureRequest, benchmark: Any) -> Callable[[Work, str], None]:
    """Return ``race(work, contender)``: the first call of a work times all selected contenders."""

    def run(work: Work, contender: str) -> None:
        results = request.config.stash[_RESULTS]
        if work.title not in results:
            names = [
                item.callspec.params["contender"]
                for item in request.session.items
                if isinstance(item, pytest.Function)
                and getattr(item.function, "work", None) is work
            ]
            options = request.config.option
            results[work.title] = work, run_race(work, names, options.scale, options.rounds)
        _record(benchmark, work, results[work.title][1], contender)

    return run


def _record(benchmark: Any, work: Work, results: Results, name: str) -> None:
    outcome = results.outcomes[name]
    benchmark.skipped = not outcome.durations  # it then does not miss the use of its fixture
    if outcome.missing:
        pytest.skip(f"{name} is missing: {outcome.missing}")
    if outcome.entry is None or not outcome.durations:
        pytest.fail(outcome.failure, pytrace=False)
    share = outcome.entry.share
    benchmark.extra_info.update(
        contender=name,
        share=share,
        amounts={"pairs": results.pairs, **outcome.entry.amounts},
        remark=work.contenders[name].remark,
    )
    replay(benchmark, outcome.durations)


def pytest_benchmark_update_machine_info(
    config: pytest.Config, machine_info: dict[str, Any]
) -> None:
    """Store what the times depend on; the name of the computer is left out."""
    from threadpoolctl import threadpool_info

    machine_info.pop("node", None)
    machine_info["cores"] = CORES
    machine_info["memory"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    machine_info["load_at_end"] = os.getloadavg()
    machine_info["versions"] = {name: _version(name) for name in PACKAGES}
    kept = ("internal_api", "version", "num_threads", "threading_layer", "architecture")
    machine_info["thread_pools"] = [
        {
            "library": os.path.basename(pool["filepath"]),
            **{name: pool[name] for name in kept if name in pool},
        }
        for pool in threadpool_info()
    ]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """Store the works themselves: sizes, bars, and who is missing."""
    output_json["works"] = {
        title: {
            "sizes": results.sizes,
            "bars": [bar.as_dict() for bar in work.bars],
            "absent": work.absent,
            "missing": {n: o.missing for n, o in results.outcomes.items() if o.missing},
            "failed": [n for n, o in results.outcomes.items() if o.failure],
            "scale": config.option.scale,
        }
        for title, (work, results) in config.stash[_RESULTS].items()
    }
