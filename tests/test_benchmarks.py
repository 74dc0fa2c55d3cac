"""The benchmark suites run, tiny, and their report says what was stored. Nothing here is timed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SUITES = ROOT / "benchmarks"

pytest.importorskip("pytest_benchmark")
pytestmark = pytest.mark.skipif(
    not (SUITES / "conftest.py").exists(), reason="the benchmarks are not beside the tests"
)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """What a run of everything that needs no peer stores, at a thousandth of the sizes."""
    path = tmp_path_factory.mktemp("benchmarks") / "run.json"
    command = [sys.executable, "-m", "pytest", str(SUITES), "--benchmark-only", "-q"]
    command += ["--scale", "0.001", "--rounds", "3", f"--benchmark-json={path}"]
    command += ["-k", "fastpair or NumPy or SciPy or scikit or multiply or memory or usearch"]
    command += ["-p", "no:cacheprovider"]
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    run = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    return path


def test_every_work_has_times_of_fastpair_and_of_a_peer(stored):
    run = json.loads(stored.read_text())
    assert len(run["works"]) == 10
    for title, work in run["works"].items():
        names = [
            entry["extra_info"]["contender"]
            for entry in run["benchmarks"]
            if entry["group"] == title
        ]
        assert "fastpair" in names
        assert len(names) > 1
        assert work["failed"] == []


def test_every_contender_keeps_each_of_its_rounds(stored):
    for entry in json.loads(stored.read_text())["benchmarks"]:
        assert len(entry["stats"]["data"]) == 3
        assert min(entry["stats"]["data"]) > 0


def test_a_run_stores_the_machine_but_not_its_name(stored):
    machine = json.loads(stored.read_text())["machine_info"]
    assert machine["cores"] >= 1
    assert machine["versions"]["numpy"]
    assert any(pool["internal_api"] == "openblas" for pool in machine["thread_pools"])
    assert "node" not in machine


def test_the_report_has_every_bar_and_every_contender(stored):
    run = json.loads(stored.read_text())
    command = [sys.executable, str(SUITES / "report.py"), "--print", str(stored)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for title, work in run["works"].items():
        assert text.count(f"| {title} |") == len(work["bars"])
    for entry in run["benchmarks"]:
        assert f"| {entry['extra_info']['contender']} |" in text
    assert "say nothing" in text  # a trial is not mistaken for a measurement


def test_a_missing_peer_is_listed(tmp_path):
    work = {
        "sizes": {"entities": 2},
        "bars": [{"factor": 8, "against": ["other"], "ours": "fastpair", "by": "pairs", "aim": 15}],
        "absent": {"third": "cannot do it"},
        "missing": {"other": "no module"},
        "failed": ["fourth"],
        "scale": 1,
    }
    machine = {
        "cpu": {"brand_raw": "a processor"},
        "cores": 2,
        "memory": 2**30,
        "versions": {"other": None},
        "python_version": "3.11",
        "thread_pools": [],
    }
    ours = {"contender": "fastpair", "share": 1.0, "amounts": {"pairs": 4}, "remark": ""}
    stats = {"median": 2.0, "min": 1.0, "max": 3.0, "rounds": 3, "data": [1.0, 2.0, 3.0]}
    entry = {"group": "some work", "extra_info": ours, "stats": stats}
    run = {"works": {"some work": work}, "benchmarks": [entry], "machine_info": machine}
    path = tmp_path / "run.json"
    path.write_text(json.dumps({**run, "datetime": "2020-01-01T00:00:00"}))
    command = [sys.executable, str(SUITES / "report.py"), "--print", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "| other | missing |" in text
    assert "| third | | | | | cannot do it |" in text
    assert "| fourth | failed |" in text
    assert "| fastpair / other | at least 8 x, aim 15 x | not measured |" in text
