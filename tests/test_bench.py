"""``fastpair bench``: ceilings are positive, rows complete, and wrong kernels are found out."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import layouts, random_plan, random_table, some_layout

from fastpair import bench_compile
from fastpair.agreement import Case, agreement, backends, cases, check_agreement, compare
from fastpair.bench import bench
from fastpair.bench_against import compare_benches
from fastpair.bench_figures import FIGURES, NUMPY, PRECISION_HEADS, Figure, markdown, speed_label
from fastpair.bench_given import Deciding
from fastpair.bench_plot import draw_roofline, points
from fastpair.bench_report import print_bench
from fastpair.bench_works import FILE, WORKS, first_pairs, measure
from fastpair.energy import Counter
from fastpair.errors import AgreementError, ArgumentError, DataError, FileError
from fastpair.files import read_table, write_embeddings, write_model, write_pairs
from fastpair.heads import HEADS, find_head
from fastpair.jobs import project
from fastpair.kernels import LINKS, PRECISIONS, cpu, limits, pairs, reference
from fastpair.machine import describe_machine, measure_limits, read_bandwidth
from fastpair.model import Branch, Model
from fastpair.refolding import refold

BRIEF = {
    "fastpair.bench.COMPILED_SHARE": 0.0,
    "fastpair.bench.LONGEST_ROW": 0.0,
    "fastpair.bench.LONGEST_START": 0.1,
    "fastpair.bench_figures.LONGEST_FIGURE": 0.0,
    "fastpair.machine.MOST_STREAM": 1 << 22,
    "fastpair.machine.LEAST_STREAM": 1 << 20,
    "fastpair.machine.SHORTEST": 1e-3,
}
"""What makes a run short whose numbers nobody reads."""

PROGRAM = "".join(
    f"import {(parts := name.rpartition('.'))[0]} as room; room.{parts[2]} = {value}\n"
    for name, value in BRIEF.items()
)
FASTPAIR = [sys.executable, "-c", PROGRAM + "from fastpair.cli import main; main()"]
TINY = ["--entities", "300", "--columns", "20", "--pairs", "5000", "--threads", "2"]

ENOUGH = 600
"""Seconds that no run of such sizes needs, even if it compiles."""


def run(*arguments, **environment):
    return subprocess.run(
        [*FASTPAIR, "bench", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


@pytest.fixture(autouse=True, scope="module")
def brief():
    with pytest.MonkeyPatch.context() as patched:
        for name, value in BRIEF.items():
            patched.setattr(name, value)
        yield


@pytest.fixture(scope="module")
def found(brief):
    return bench(entities=300, columns=20, pairs=5000, threads=2, seconds=ENOUGH)


# --- the command ---


def test_the_command_prints_json_with_every_row():
    done = run(*TINY, "--seconds", ENOUGH, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["skipped"] == []
    expected = {(work, precision) for work in WORKS for precision in PRECISIONS}
    assert {(row["work"], row["precision"]) for row in found["rows"]} == expected
    for row in found["rows"]:
        rate = row["pairs_per_second"]
        assert 0 < rate["least"] <= rate["median"] <= rate["greatest"]
        assert rate["repeats"] >= 3
        assert row["share"] > 0
        assert (row["share_of_random"] is None) == (row["work"] not in ("pairs", "stream"))
        assert row["binds"] in ("memory", "arithmetic")
    heads = {(row["head"], row["precision"], row["backend"]) for row in found["agreement"]}
    assert heads == {
        (head, precision, backend.name)
        for head in HEADS
        for precision in PRECISIONS
        for backend in backends()
        if not backend.missing and (head != "mlp" or precision == "float32")
    }
    assert {row["wrong"] for row in found["agreement"]} == {0}
    assert found["settings"]["entities"] == 300
    assert found["settings"]["seed"] == 0


def test_the_command_prints_tables_of_a_given_table(tmp_path):
    table = written_table(tmp_path, precision="bfloat16")
    done = run("--table", table, "--pairs", 1000, "--seconds", ENOUGH)
    assert done.returncode == 0, done.stderr
    for words in ("processor", "BLAS", "multiply-add", "HDF5 to HDF5"):
        assert words in done.stdout
    assert "bfloat16" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e.h5", "m.h5", "t.h5"]


def test_what_cannot_be_measured_is_refused_in_a_sentence(tmp_path):
    (tmp_path / "bad.h5").write_text("not a table")
    done = run("--table", tmp_path / "bad.h5")
    assert done.returncode == 1
    assert done.stderr.startswith("fastpair: ")
    assert len(done.stderr.strip().splitlines()) == 1
    assert run("--pairs", 0).returncode == 2


def written_table(folder, head="cosine+absdiff", rows=120, threshold=None, ids=None, **options):
    """A table file of a model with random weights."""
    rng = np.random.default_rng(0)
    branches = [Branch(name, find_head(name).initial(12, rng)) for name in head.split("+")]
    embeddings = rng.normal(size=(rows, 12))
    write_embeddings(folder / "e.h5", [(0, embeddings)], embeddings.shape, ids=ids, overwrite=True)
    model = Model(branches, input_columns=12, threshold=threshold)
    write_model(folder / "m.h5", model, overwrite=True)
    project(folder / "m.h5", folder / "e.h5", folder / "t.h5", overwrite=True, **options)
    return folder / "t.h5"


@pytest.mark.parametrize(
    ("head", "precision", "measured"),
    [
        ("cosine+absdiff", "float32", list(PRECISIONS)),
        ("cosine+absdiff", "float16", ["float16"]),
        ("mlp", "float32", ["float32"]),
    ],
)
def test_a_given_table_is_measured_in_what_it_can_be(
    tmp_path, found, monkeypatch, head, precision, measured
):
    monkeypatch.setattr("fastpair.bench.measure_limits", lambda threads: found["limits"])
    table = written_table(tmp_path, head, precision=precision)
    own = bench(table, pairs=500, seconds=ENOUGH)
    assert [row["precision"] for row in own["rows"]] == [p for p in measured for _ in WORKS]
    assert own["skipped"] == []
    assert {"the table"} < {row["head"] for row in own["agreement"]}
    assert own["settings"]["entities"] == 120


# --- a pair file of the user's own ---


@pytest.fixture
def limits_known(found, monkeypatch):
    monkeypatch.setattr("fastpair.bench.measure_limits", lambda threads: found["limits"])
    monkeypatch.setattr("fastpair.bench.measure_disk", lambda folder: found["limits"]["disk"])
    start = found["limits"]["start"]
    monkeypatch.setattr("fastpair.bench._measure_start", lambda folder, count: start)
    monkeypatch.setattr("fastpair.bench.cases", lambda: iter(()))


def test_the_pairs_of_a_file_are_scored_as_they_are_read(tmp_path, limits_known):
    table = written_table(tmp_path, ids=pa.array([f"thing {n}" for n in range(120)]))
    pairs = tmp_path / "pairs.csv"
    keys = [f"thing {n % 120},thing {n * 7 % 120}" for n in range(3000)]
    pairs.write_text("\n".join(["id_a,id_b", *keys]) + "\n")
    found = bench(table, pair_file=pairs, pairs=500, device="cpu", seconds=ENOUGH)
    json.dumps(found, allow_nan=False)
    (row,) = [row for row in found["rows"] if row["work"] == FILE]
    assert (row["pairs"], row["precision"]) == (3000, "float32")
    assert {row["pairs"] for row in found["rows"] if row["work"] == "pairs"} == {500}
    assert found["settings"]["pair_file"] == str(pairs)
    print_bench(found)


def test_the_pairs_in_memory_are_those_of_the_file(tmp_path, limits_known, monkeypatch):
    table = written_table(tmp_path)
    left = np.arange(100, dtype=np.int32)
    write_pairs(tmp_path / "p.h5", [(left, left + 20, None)], 100)
    seen = []

    def row(works, name, slot, size=None):
        seen.append((works.left.tolist(), works.right.tolist()))
        return {}

    monkeypatch.setattr("fastpair.bench_works.Works.row", row)
    bench(table, pair_file=tmp_path / "p.h5", device="cpu", seconds=ENOUGH)
    assert seen == [(left.tolist(), (left + 20).tolist())] * len(seen)
    assert len(seen) == len(PRECISIONS) * len(WORKS) + 1


def test_a_pair_file_without_its_table_is_refused_in_one_sentence(tmp_path):
    done = run("--pairs", tmp_path / "pairs.csv")
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert "goes with --table" in done.stderr


def test_a_pair_that_is_not_of_the_table_is_refused(tmp_path, limits_known):
    left = np.full(10, 120, np.int32)
    write_pairs(tmp_path / "p.h5", [(left, left, None)], 10)
    with pytest.raises(DataError, match="120"):
        bench(written_table(tmp_path), pair_file=tmp_path / "p.h5", device="cpu")


@given(sizes=st.lists(st.integers(1, 9), min_size=1), share=st.floats(0, 1))
def test_the_first_pairs_of_blocks_are_as_many_as_asked_for(sizes, share):
    from fastpair.pairs import PairBlock

    ends = np.arange(sum(sizes), dtype=np.int32)
    starts = [0, *itertools.accumulate(sizes)]
    blocks = [
        PairBlock(a, ends[a:b], -ends[a:b], None, None, None) for a, b in itertools.pairwise(starts)
    ]
    count = max(1, int(share * len(ends)))
    cut = list(first_pairs(blocks, count))
    np.testing.assert_array_equal(np.concatenate([block.left for block in cut]), ends[:count])
    np.testing.assert_array_equal(np.concatenate([block.right for block in cut]), -ends[:count])


# --- decisions at the model's own threshold ---


def test_decisions_are_compared_at_the_threshold_of_the_model(tmp_path, limits_known, capsys):
    table = written_table(tmp_path, head="absdiff", rows=3000, threshold=-9.0)
    found = bench(table, pairs=500, device="cpu", seconds=ENOUGH)
    rows = [row for row in found["agreement"] if row["head"] == "the table"]
    assert {row["threshold"] for row in rows} == {-9.0}
    assert found["settings"]["threshold"] == -9.0
    kinds = {(row["precision"], row["backend"]) for row in rows if row["flipped"] is not None}
    names = ("CPU pairs", "CPU dense tiles", "CPU threshold")
    assert kinds == {(precision, name) for precision in PRECISIONS for name in names}
    changed = {
        precision: {row["flipped_in_all"] for row in rows if row["precision"] == precision} - {None}
        for precision in PRECISIONS
    }
    for counts in changed.values():
        assert len(counts) == 1  # a score has the same decision on every backend
    assert changed["float32"] == {0}
    assert min(changed["int8"]) > max(changed["float16"])
    assert {row["wrong"] for row in rows} == {0}
    print_bench(found)
    printed = " ".join(capsys.readouterr().out.split())
    assert "at -9: the model's threshold" in printed
    assert str(max(changed["int8"])) in printed


def test_decisions_without_a_threshold_say_so(tmp_path, limits_known, capsys):
    print_bench(bench(written_table(tmp_path), pairs=500, device="cpu", seconds=ENOUGH))
    assert "the table has no threshold" in " ".join(capsys.readouterr().out.split())


def test_scores_near_the_threshold_are_looked_for(tmp_path):
    table = read_table(written_table(tmp_path, head="absdiff", rows=3000, threshold=-9.0))
    deciding = Deciding(table, 2)
    assert len(np.unique(deciding.chosen)) == len(deciding.chosen) <= 256
    near = np.mean(np.abs(deciding.truth + 9) < 0.01)
    everywhere = reference.score_matrix(table.rows[:300], table.rows[:300], table.plan)
    assert near > 1.5 * np.mean(np.abs(everywhere + 9) < 0.01)


# --- energy ---


def test_rates_carry_the_energy_that_the_system_shows(monkeypatch, limits_known, capsys):
    class Rising:
        value = 0

        def read(self):
            self.value += 7_000_000
            return self.value

    counter = Counter("package-0", Rising().read)
    monkeypatch.setattr("fastpair.bench.cpu_counters", lambda: ([counter], ""))
    found = bench(entities=300, columns=20, pairs=5000, device="cpu", seconds=ENOUGH)
    assert found["energy"] == {"counters": ["package-0"], "notes": []}
    for row in [*found["rows"], *found["figures"]["speed"].values()]:
        used = row["joules_per_million_pairs"]
        assert used["median"] == pytest.approx(7e6 / row["pairs"])
        assert used["repeats"] == row["pairs_per_second"]["repeats"]
    print_bench(found)
    printed = capsys.readouterr().out
    assert "J/million" in printed
    assert "package-0" in printed
    assert "J per million" in markdown(found)


def test_a_system_without_counters_of_energy_is_said_in_a_line(monkeypatch, limits_known, capsys):
    monkeypatch.setattr("fastpair.bench.cpu_counters", lambda: ([], "energy is not shown"))
    found = bench(entities=300, columns=20, pairs=5000, device="cpu", seconds=ENOUGH)
    assert {row["joules_per_million_pairs"] for row in found["rows"]} == {None}
    print_bench(found)
    printed = capsys.readouterr().out
    assert printed.count("energy is not shown") == 1
    assert "J/million" not in printed


# --- the figures of the README ---


def readme_tables():
    """The two tables of the README: lists of cells."""
    path = Path(__file__).parents[1] / "README.md"
    if not path.exists():
        pytest.skip("the documents are not beside the tests here")
    text = path.read_text()
    marked = re.search(r"<!-- figures: begin -->\n(.*)<!-- figures: end -->", text, re.DOTALL)[1]
    return [
        [[cell.strip() for cell in line.strip("| ").split("|")] for line in table.splitlines()]
        for table in marked.strip().split("\n\n")
    ]


def test_every_figure_of_the_readme_is_in_the_json(found):
    from fastpair.cli import commands

    options = {one.name: one.default for one in commands.commands["bench"].params}
    shape = options["entities"], options["columns"]
    keys = {speed_label(one, one.shape(*shape)): one.key for one in FIGURES}
    speed, precision = readme_tables()
    assert [tuple(cells[:3]) for cells in speed[2:]] == list(keys)
    assert list(found["figures"]["speed"]) == list(keys.values())
    assert [cells[0].strip("`") for cells in precision[2:]] == list(found["figures"]["precision"])
    for errors in found["figures"]["precision"].values():
        assert set(precision[0][1:]) == set(errors)


def test_the_tables_of_the_readme_are_those_that_the_command_prints(found):
    printed = markdown({**found, "energy": {"counters": [], "notes": []}}).split("\n\n")
    for table, lines in zip(readme_tables(), printed, strict=True):
        head = [cell.strip() for cell in lines.splitlines()[0].strip("| ").split("|")]
        assert table[0] == head
        assert len(table) == len(lines.splitlines())


def test_a_precision_is_as_far_from_float64_as_its_digits_say(found):
    for errors in found["figures"]["precision"].values():
        order = ["float32", "float16", "bfloat16", "int8"]
        sizes = [errors[name]["rms"] for name in order]
        assert sizes == sorted(sizes)
        assert errors[NUMPY]["greatest"] < 1e-4
        for one in errors.values():
            assert 0 < one["rms"] <= one["greatest"]


@given(layout=layouts, link=st.sampled_from(LINKS), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=20)
def test_a_table_folded_again_is_the_same_table_rounded(layout, link, seed):
    rng = np.random.default_rng(seed)
    plan = random_plan(rng, replace(layout, precision="float32"), link)
    plan = plan.with_scales((1.0,) * 5)
    rows = random_table(rng, 12, plan)
    again, same = refold(rows, plan, "float32")
    assert same == plan
    assert again.tobytes() == rows.tobytes()
    for precision, unit in (("float16", 2**-10), ("bfloat16", 2**-7), ("int8", 1 / 100)):
        rounded, rounded_plan = refold(rows, plan, precision)
        assert rounded_plan.layout == replace(plan.layout, precision=precision)
        new = reference.unpack_rows(rounded, rounded_plan)
        old = reference.unpack_rows(rows, plan)
        assert new.keys() == old.keys()
        for name, values in old.items():
            assert np.abs(new[name] - values).max(initial=0) <= unit * np.abs(values).max(initial=0)


def test_only_a_float32_table_is_folded_again():
    plan = random_plan(np.random.default_rng(0), some_layout("int8"))
    with pytest.raises(ArgumentError, match="int8"):
        refold(random_table(np.random.default_rng(0), 3, plan), plan, "float32")


@pytest.mark.parametrize("name", ["entities", "columns", "pairs", "seconds"])
def test_sizes_that_are_too_small_are_refused(name):
    with pytest.raises(ArgumentError, match=f"{name} is 0"):
        bench(**{name: 0})


def test_a_table_without_pairs_is_refused(tmp_path):
    write_embeddings(tmp_path / "e.h5", [(0, np.ones((1, 4)))], (1, 4))
    project("dot", tmp_path / "e.h5", tmp_path / "t.h5")
    with pytest.raises(ArgumentError, match="at least 2"):
        bench(tmp_path / "t.h5")


def test_a_full_disk_is_said_before_files_are_written(monkeypatch):
    class Usage:
        free = 1 << 20

    monkeypatch.setattr("shutil.disk_usage", lambda folder: Usage)
    monkeypatch.setattr("fastpair.bench.measure_limits", lambda threads: {})
    monkeypatch.setattr("fastpair.bench._agree", lambda *arguments: [])
    with pytest.raises(FileError, match=r"1 MiB free.*TMPDIR"):
        bench(entities=1000, columns=400, pairs=10)


def test_a_temporary_folder_that_cannot_be_made_is_said(monkeypatch):
    def full(**options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryDirectory", full)
    monkeypatch.setattr("fastpair.bench.measure_limits", lambda threads: {})
    monkeypatch.setattr("fastpair.bench._agree", lambda *arguments: [])
    with pytest.raises(FileError, match="No space left"):
        bench(entities=10, columns=4, pairs=10)


def test_what_compiles_holds_every_kernel_that_is_called():
    works = {figure.work for figure in FIGURES}
    names = [name for share in bench_compile.SHARES for name in share]
    assert sorted(names) == sorted([*works, *PRECISION_HEADS, *PRECISIONS])


@pytest.fixture
def marks(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_compile, "_mark", lambda name: tmp_path / name)
    return tmp_path


def test_what_is_compiled_is_known_for_one_installation(monkeypatch):
    from fastpair.kernels import simd

    here = bench_compile._mark("max")
    assert here.parent == simd.cache_folder()
    monkeypatch.setattr(simd, "__file__", "/elsewhere/simd.py")
    assert bench_compile._mark("max") != here


def test_every_figure_is_called_once_to_be_compiled(marks, monkeypatch):
    made = []
    for name in ("precision_errors", "agreement"):
        monkeypatch.setattr(bench_compile, name, lambda *given, name=name: made.append(name))
    real = bench_compile.call
    monkeypatch.setattr(bench_compile, "call", lambda figure: made.append(figure) or real(figure))
    for _ in range(2):
        for number in range(len(bench_compile.SHARES)):
            bench_compile.compile_share(number)
    assert sorted(figure.key for figure in made if isinstance(figure, Figure)) == sorted(
        figure.key for figure in FIGURES
    )
    assert made.count("precision_errors") == len(PRECISION_HEADS)
    assert made.count("agreement") == len(PRECISIONS)


def test_compiling_is_stopped_in_time_and_goes_on_in_the_next_run(marks, monkeypatch):
    begun = []
    real = subprocess.Popen

    def begin(*given, **options):
        begun.append(real(*given, **options))
        return begun[-1]

    monkeypatch.setattr(subprocess, "Popen", begin)
    monkeypatch.setattr(bench_compile, "PROGRAM", "import time; time.sleep(600)  # {}")
    assert not bench_compile.compile_kernels(time.perf_counter() + 0.1)
    assert [one.returncode for one in begun] == [-signal.SIGKILL] * len(bench_compile.SHARES)
    for name in bench_compile.SHARES[0]:
        (marks / name).touch()
    monkeypatch.setattr(bench_compile, "PROGRAM", "import sys; sys.exit({})")
    assert bench_compile.compile_kernels(time.perf_counter() + 60)
    assert [one.returncode for one in begun[2:]] == [1]


def test_nothing_is_compiled_ahead_where_it_cannot_be_kept(monkeypatch):
    monkeypatch.setattr("fastpair.kernels.simd.cache_folder", lambda: None)
    monkeypatch.setattr(subprocess, "Popen", None)
    assert not bench_compile.compile_kernels(time.perf_counter() + 60)


def test_what_there_is_no_time_for_is_named(found, monkeypatch, capsys):
    monkeypatch.setattr("fastpair.bench.measure_limits", lambda threads: found["limits"])
    short = bench(entities=300, columns=20, pairs=500, seconds=1e-3)
    assert short["rows"] == []
    assert short["figures"] == {"speed": {}, "precision": {}}
    figures = len(FIGURES) + len(PRECISION_HEADS)
    assert len(short["skipped"]) == 1 + len(PRECISIONS) + figures
    print_bench(short)
    printed = capsys.readouterr().out
    assert "skipped" in printed
    for title in ("What fastpair does", "figures of the README", "Error against", "Agreement with"):
        assert title not in " ".join(printed.split())
    print_bench(found)
    printed = capsys.readouterr().out
    for title in ("What fastpair does", "figures of the README", "Error against", "Agreement with"):
        assert title in " ".join(printed.split())


def test_a_narrow_blas_and_a_scan_are_shown(found, capsys):
    blas = {**found["machine"]["blas"], "narrow": True, "architecture": "Haswell"}
    rows = [{**row, "scan": "int8"} for row in found["rows"]]
    print_bench({**found, "machine": {**found["machine"], "blas": blas}, "rows": rows})
    printed = capsys.readouterr().out
    assert "OPENBLAS_CORETYPE=SkylakeX" in printed
    assert "scan" in printed


# --- beside an earlier run ---


def changed(found, factor, share=None, **more):
    """The same run, its rows faster or slower."""
    rows = [
        {
            **row,
            "pairs_per_second": {
                key: value if key == "repeats" else factor * value
                for key, value in row["pairs_per_second"].items()
            },
            "share": row["share"] * (factor if share is None else share),
            **more,
        }
        for row in found["rows"]
    ]
    return {**found, "rows": rows}


@pytest.mark.parametrize(
    ("factor", "share", "verdict"),
    [
        (0.01, None, "slower"),
        (100.0, None, "faster"),
        (1.0, None, "same"),
        (0.01, 1.0, "same"),  # the machine was slower, and we as much
        (100.0, 0.99, "same"),
    ],
)
def test_a_change_is_told_where_rates_and_shares_say_so(found, factor, share, verdict):
    compared = compare_benches(changed(found, factor, share), found)
    assert {row["verdict"] for row in compared["rows"]} == {verdict}
    assert len(compared["rows"]) == len(found["rows"])
    for row in compared["rows"]:
        assert row["ratio"] == pytest.approx(factor)
    assert compared["machines"] is None


def test_what_cannot_be_compared_is_named(found):
    fewer = {**found, "rows": found["rows"][1:]}
    first = found["rows"][0]
    name = f"{first['work']} {first['precision']} {first['device']}"
    assert compare_benches(fewer, found)["only_earlier"] == [name]
    assert compare_benches(found, fewer)["only_now"] == [name]
    other = compare_benches(found, changed(found, 1.0, row_bytes=1))
    assert len(other["other_size"]) == len(found["rows"])
    assert other["rows"] == []
    machine = {**found["machine"], "cpu": "another"}
    assert compare_benches({**found, "machine": machine}, found)["machines"][1] == "another"
    with pytest.raises(DataError, match="fastpair bench --json"):
        compare_benches(found, {"rows": 3})


def test_the_comparison_is_printed(found, capsys):
    slower = changed(found, 0.01)
    print_bench({**slower, "against": compare_benches(slower, found)})
    printed = capsys.readouterr().out
    assert printed.count("slower") == len(found["rows"])
    assert "0.01" in printed


def test_the_roofline_has_every_row_under_what_was_measured(found, tmp_path):
    pytest.importorskip("matplotlib")
    marks = points(found)
    assert len(marks) == len(found["rows"])
    for mark, row in zip(marks, found["rows"], strict=True):
        rate = row["pairs_per_second"]["median"]
        moved = row["bytes_per_second"] / rate
        assert mark["operations"]["median"] == pytest.approx(row["operations_per_second"])
        assert mark["intensity"] == pytest.approx(row["operations_per_second"] / rate / moved)
    for name in ("a.png", "a.svg"):
        draw_roofline(found, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    drawn = (tmp_path / "a.svg").read_text()
    draw_roofline(found, tmp_path / "again.svg")
    assert drawn.startswith("<?xml")


def test_a_picture_that_cannot_be_is_refused_before_anything_is_measured(tmp_path):
    there = tmp_path / "there.png"
    there.write_bytes(b"mine")
    for path, words in ((tmp_path / "a.bmp", "expected one of"), (there, "exists already")):
        done = run(*TINY, "--plot", path)
        assert done.returncode == 1
        assert words in done.stderr
        assert done.stdout == ""
    assert there.read_bytes() == b"mine"


# --- the machine and its ceilings ---


def test_the_machine_is_described_in_what_json_holds():
    machine = describe_machine()
    json.dumps(machine, allow_nan=False)
    assert machine["cpu"]
    assert machine["cores"]["usable"] >= 1
    assert machine["versions"]["numpy"] == np.__version__


def test_ceilings_are_positive_and_in_order(monkeypatch):
    monkeypatch.setattr("fastpair.machine.MATRIX_ROWS", 64)
    monkeypatch.setattr("fastpair.machine.stream_bytes", lambda: 1 << 22)
    found = measure_limits(2)
    assert found.pop("threads") == 2
    for name in ("fma", "maximum", "read", "random", "copy", "matrix_product"):
        assert found[name] is not None
    for measured in filter(None, found.values()):
        for key in ("one", "all"):
            one = measured[key]
            assert 0 < one["least"] <= one["median"] <= one["greatest"]


@pytest.mark.parametrize("name", ["fma", "maximum", "bfloat16", "int8"])
def test_a_probe_does_the_arithmetic_that_it_counts(name):
    if name not in limits.arithmetic_probes():
        pytest.skip("this CPU has no such instruction")
    probe = limits.arithmetic_probes()[name]
    steps = 1000
    chains = probe.run(steps)
    # every lane starts at x = 1 (four ones in int8), and each step adds what a step adds
    start = probe.inputs[0, 0]
    terms = {"fma": 2.0**-20, "maximum": 2.0**-20, "bfloat16": 2 * 2.0**-20, "int8": 4}[name]
    np.testing.assert_allclose(chains, float(start) + steps * terms, rtol=1e-6)
    per_lane = {"fma": 2, "maximum": 2, "bfloat16": 4, "int8": 8}[name]
    assert probe.operations == per_lane * chains.size


def test_probes_of_memory_see_every_byte():
    data = np.zeros(1 << 16, np.uint8)
    data.view(np.float32)[:] = 1
    assert limits.read(data) == len(data) / 4
    assert limits.read(data, 3) == 3 * len(data) / 4
    order = np.arange(128, dtype=np.int32)[::-1].copy()
    assert limits.read_blocks(data, order, 512) == len(data) / 4
    target = np.zeros_like(data)
    limits.copy(data, target)
    assert target.tobytes() == data.tobytes()
    assert read_bandwidth(data, 3)["least"] > 0


@given(
    least=st.integers(1, 100),
    more=st.integers(0, 10**6),
    slot=st.floats(-1, 10),
    power=st.sampled_from([1, 2]),
    speed=st.floats(1e2, 1e9),
)
def test_a_row_has_three_repeats_of_a_size_in_its_bounds(least, more, slot, power, speed):
    sizes = []

    def work(size):
        sizes.append(size)
        return size**power / speed

    size, seconds = measure(work, least, least + more, slot, power)
    assert least <= size <= least + more
    assert 3 <= len(seconds) <= 7
    assert set(sizes[-3:]) == {size}


# --- agreement ---


def small_cases(**options):
    return list(cases(entities=40, columns=20, **options))


def test_every_backend_agrees_on_every_head_and_precision():
    rows = agreement(backends(), small_cases(seed=1))
    check_agreement(rows)
    assert len(rows) > 4 * 4 * (len(HEADS) - 1)


@settings(max_examples=20)
@given(layout=layouts, link=st.sampled_from(LINKS), seed=st.integers(0, 2**32 - 1))
def test_every_backend_agrees_on_every_layout_and_link(layout, link, seed):
    rng = np.random.default_rng(seed)
    plan = random_plan(rng, layout, link)
    check_agreement(agreement(backends(), [Case("any", random_table(rng, 20, plan), plan)]))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_one_wrong_number_of_a_kernel_is_found(precision, monkeypatch):
    right = cpu.table_arguments

    def perturbed(left, other, plan, *more):
        return right(left, other, replace(plan, constant=plan.constant + 1e-3), *more)

    for module in (cpu, pairs):
        monkeypatch.setattr(module, "table_arguments", perturbed)
    rows = agreement(backends(), small_cases(heads=["absdiff"], precisions=[precision]))
    by_name = {row["backend"]: row for row in rows}
    for name in ("CPU pairs", "CPU top-k", "CPU threshold"):  # scored by the pair kernel
        assert by_name[name]["bound"] > 1
        assert by_name[name]["wrong"] > 0
    with pytest.raises(AgreementError, match="absdiff"):
        check_agreement(rows)


@pytest.mark.parametrize("name", ["CPU pairs", "CPU dense tiles", "CPU top-k", "CPU threshold"])
@pytest.mark.parametrize("head", ["dot", "rbf"])
def test_one_wrong_pair_is_found(name, head):
    (backend,) = [one for one in backends() if one.name == name]

    def wrong(case, plan):
        scores = backend.run(case, plan)
        row, column = np.argwhere(~np.isnan(scores) & (np.abs(case.raw) > 1))[0]
        scores[row, column] *= 1.001
        return scores

    (case,) = small_cases(heads=[head], precisions=["float32"])
    assert compare(case, backend)["wrong"] == 0
    assert compare(case, replace(backend, run=wrong))["wrong"] > 0


@pytest.mark.parametrize("name", ["CPU pairs", "CPU dense tiles"])
def test_a_score_that_is_no_number_is_found(name):
    (backend,) = [one for one in backends() if one.name == name]

    def wrong(case, plan):
        scores = backend.run(case, plan)
        scores[np.unravel_index(np.argmin(case.raw), case.raw.shape)] = np.nan
        return scores

    (case,) = small_cases(heads=["dot"], precisions=["float32"])
    assert compare(case, replace(backend, run=wrong))["wrong"] > 0


def test_a_pair_that_a_result_lacks_or_should_lack_is_found():
    (case,) = small_cases(heads=["dot"], precisions=["float32"])
    for name in ("CPU top-k", "CPU threshold"):
        (backend,) = [one for one in backends() if one.name == name]

        def without_first(case, plan, backend=backend):
            scores = backend.run(case, plan)
            scores[tuple(np.argwhere(~np.isnan(scores))[0])] = np.nan
            return scores

        def with_worst(case, plan, backend=backend):
            scores = backend.run(case, plan)
            row = int(np.flatnonzero((~np.isnan(scores)).any(axis=1))[0])
            worst = int(np.argmin(case.raw[row]))
            scores[row, int(np.nanargmax(scores[row]))] = np.nan
            scores[row, worst] = case.raw[row, worst]
            return scores

        for run_wrong in (without_first, with_worst):
            assert compare(case, replace(backend, run=run_wrong))["wrong"] > 0


def test_a_wrong_machine_ends_the_command_with_a_sentence(monkeypatch, found):
    from click.testing import CliRunner

    from fastpair.cli import commands

    worse = [{**row, "wrong": 1, "bound": 7.0} for row in found["agreement"]]
    monkeypatch.setattr("fastpair.bench.bench", lambda **options: {**found, "agreement": worse})
    done = CliRunner().invoke(commands, ["bench"])
    assert isinstance(done.exception, AgreementError)
    assert "7 times" in str(done.exception)


def test_a_missing_backend_says_why(monkeypatch):
    monkeypatch.setattr("fastpair.device._driver", lambda: None)
    missing = [one for one in backends() if one.missing]
    assert [one.name for one in missing] == [
        f"GPU {work}" for work in ("pairs", "dense tiles", "top-k", "threshold")
    ]
    assert all("install" in one.missing for one in missing)
    assert agreement(missing, small_cases(heads=["dot"], precisions=["float32"])) == []
    with pytest.raises(AgreementError, match="missing"):
        missing[0].run(None, None)
