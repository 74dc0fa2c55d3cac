"""What ``fastpair bench`` found, in tables and a few sentences."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from fastpair.bench_works import BEST

Summary = dict[str, Any]

LIMITS = {
    "fma": ("float32 multiply-add", "Gop/s"),
    "maximum": ("float32 maximum and add", "Gop/s"),
    "bfloat16": ("bfloat16 dot product", "Gop/s"),
    "int8": ("int8 dot product", "Gop/s"),
    "matrix_product": ("NumPy float32 matrix product", "Gop/s"),
    "read": ("memory, read in order", "GB/s"),
    "random": ("memory, 512 bytes at random", "GB/s"),
    "copy": ("memory, copied: read and written", "GB/s"),
}
"""Names of `machine.measure_limits`, what they are called, and their unit."""

GPU_LIMITS = {
    "copy": ("memory, copied: read and written", "GB/s"),
    "up": ("host to device, page-locked", "GB/s"),
    "down": ("device to host, page-locked", "GB/s"),
    "both": ("both ways at once", "GB/s"),
    "up_pageable": ("host to device, plain memory", "GB/s"),
    "down_pageable": ("device to host, plain memory", "GB/s"),
    "fma": ("float32 multiply-add", "Gop/s"),
    "bfloat16": ("bfloat16 matrix product (mma.sync)", "Gop/s"),
}
"""Names of `gpu_machine.measure_gpu_limits`, what they are called, and their unit."""

WORKS = {
    "pairs": "pairs",
    "stream": "HDF5 to HDF5",
    "file": "the pair file",
    "top-k": "best {k} of all",
    "threshold": "threshold",
    "dense": "dense",
}
"""Names of `bench.WORKS` and what they are called."""


NARROWEST, NARROWEST_COMPARISON = 120, 160
"""Characters of a line: tables are not squeezed into fewer, nor those that compare two runs."""


@contextmanager
def steps() -> Iterator[Callable[[str], None]]:
    """Show on a terminal what is done next; elsewhere say nothing."""
    if not sys.stderr.isatty():
        yield lambda step: None
        return
    from rich.console import Console

    with Console(stderr=True).status("starting") as status:
        yield status.update


def print_bench(found: Summary) -> None:
    """Print what `bench.bench` returned on standard output."""
    from rich.console import Console

    console = Console(highlight=False)
    console.width = max(console.width, NARROWEST)
    for name, words in _machine_lines(found["machine"], found["settings"]["threads"]):
        console.print(f"{name:<12} {words}", markup=False, soft_wrap=True)
    console.print(_limits_table(found["limits"]))
    for sentence in _advice(found["machine"], found["limits"]):
        console.print(sentence, markup=False)
    if found["gpu"] is not None:
        console.print(_gpu_table(found["gpu"]))
    energy = found["energy"]
    _print_rows(console, _rates_table(found["rows"], found["settings"], bool(energy["counters"])))
    if found["figures"] is not None:
        _print_rows(console, _figures_table(found["figures"]["speed"], bool(energy["counters"])))
        _print_rows(console, _precision_table(found["figures"]["precision"]))
    if energy["counters"]:
        counted = ", ".join(energy["counters"])
        console.print(f"energy is all that these used meanwhile: {counted}", markup=False)
    for sentence in energy["notes"]:
        console.print(sentence, markup=False)
    _print_rows(console, _agreement_table(found["agreement"]))
    if any(row["flipped_in_all"] is not None for row in found["agreement"]):
        console.print(_decisions_table(found["agreement"], found["settings"]["threshold"]))
    if "against" in found:
        print_comparison(console, found["against"], found["settings"])
    for sentence in _missing(found["backends"]):
        console.print(sentence, markup=False)
    for sentence in skipped_lines(found):
        console.print(sentence, markup=False)
    console.print(f"{found['seconds']:.0f} s in all", markup=False)


def skipped_lines(found: Summary) -> list[str]:
    """Return a line for each thing that there was no time for, and what to do about it."""
    lines = [f"skipped: {sentence}" for sentence in found["skipped"]]
    if lines:
        lines.append(
            "Kernels that were compiled now need not be the next time: run it again, or give more "
            "--seconds."
        )
    return lines


def print_comparison(console: Any, against: Summary, settings: Summary) -> None:
    """Print what `bench_against.compare_benches` returned."""
    if against["machines"] is not None:
        before, now = against["machines"]
        console.print(f"The earlier run was on another processor: {before}, now {now}.")
    columns = ("earlier", "now", "now / earlier", "of the limit", "")
    table = _new_table("Million pairs/s beside the earlier run: median (least-greatest)", 2, "")
    for column in ("precision", *columns):
        table.add_column(column, justify="right", no_wrap=True)
    for row in against["rows"]:
        rates = [
            f"{_short(rate['median'] / 1e6)} ({_short(rate['least'] / 1e6)}-"
            f"{_short(rate['greatest'] / 1e6)})"
            for rate in (row["earlier"], row["now"])
        ]
        verdict = "" if row["verdict"] == "same" else row["verdict"]
        table.add_row(
            WORKS[row["work"]].format(k=settings["k"]),
            row["precision"],
            *rates,
            f"{row['ratio']:.2f}",
            f"{row['share_ratio']:.2f}",
            verdict,
        )
    width, console.width = console.width, max(console.width, NARROWEST_COMPARISON)
    console.print(table)
    console.width = width
    for name, words in (
        ("only_now", "not in the earlier run"),
        ("only_earlier", "only in the earlier run"),
        ("other_size", "of another size in the earlier run"),
    ):
        if against[name]:
            console.print(f"{words}: {', '.join(against[name])}", markup=False)


def _missing(backends: list[Summary]) -> Iterator[str]:
    """Yield a sentence for each reason for which backends are missing."""
    reasons: dict[str, list[str]] = {}
    for backend in backends:
        if backend["missing"]:
            reasons.setdefault(backend["missing"], []).append(backend["name"])
    for reason, names in reasons.items():
        yield f"missing: {', '.join(names)}: {reason}"


def _gpu_table(gpu: Summary) -> Any:
    machine, limits = gpu["machine"], gpu["limits"]
    title = f"gpu:{machine['number']}, {machine['name']}: median (least-greatest)"
    table = _new_table(title, 1, "", "at most", "")
    for name, (words, unit) in GPU_LIMITS.items():
        table.add_row(words, _giga(limits[name]), unit)
    return table


def _machine_lines(machine: Summary, threads: int) -> Iterator[tuple[str, str]]:
    cores, memory, blas = machine["cores"], machine["memory"], machine["blas"]
    quota = "" if cores["quota"] is None else f", a quota of {cores['quota']:g}"
    caches = ", ".join(f"{name} {_binary(size)}" for name, size in machine["caches"].items())
    yield "processor", f"{machine['cpu']} ({machine['architecture']}); {caches or 'caches unknown'}"
    usable = f"{cores['usable']} usable of {cores['present']}{quota}; {threads} threads"
    yield "cores", usable + ("" if machine["load"] is None else f"; load {machine['load']:g}")
    sets = ", ".join(machine["instruction_sets"]) or "none known"
    yield "kernels use", f"{sets}; register tile {' x '.join(map(str, machine['register_tile']))}"
    pages = memory["huge_pages"] or "unknown"
    total = "" if memory["total"] is None else f"{_binary(memory['total'])}, "
    yield "memory", f"{total}{_binary(memory['usable'])} usable; huge pages: {pages}"
    told = f", told by OPENBLAS_CORETYPE={blas['told']}" if blas["told"] else ""
    kernels = f", kernels for {blas['architecture']}{told}" if blas["architecture"] else ""
    yield "BLAS", f"{blas['library'] or 'unknown'} {blas['version'] or ''}{kernels}".strip()
    known = ((name, text) for name, text in machine["versions"].items() if text)
    yield "versions", ", ".join(f"{name} {text}" for name, text in known)


def _binary(size: float) -> str:
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size / 1024:.3g} KiB"


def _giga(measured: Summary) -> str:
    low, high = measured["least"] / 1e9, measured["greatest"] / 1e9
    return f"{measured['median'] / 1e9:.3g} ({low:.3g}-{high:.3g})"


def _print_rows(console: Any, table: Any) -> None:
    """Print a table unless there was no time for any of its rows."""
    if table.row_count:
        console.print(table)


def _new_table(title: str, left: int, *columns: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, title_style="bold")
    for number, column in enumerate(columns):
        side: Any = "left" if number < left else "right"
        table.add_column(column, justify=side, no_wrap=True)
    return table


def _limits_table(limits: Summary) -> Any:
    title = "What the machine can do at most: median (least-greatest)"
    table = _new_table(title, 1, "", "one core", f"{limits['threads']} threads", "")
    for name, (words, unit) in LIMITS.items():
        found = limits[name]
        if found is None:
            table.add_row(words, "the CPU has none", "", "")
        else:
            table.add_row(words, _giga(found["one"]), _giga(found["all"]), unit)
    for name, words in (("write", "disk, written and flushed"), ("read", "disk, read in order")):
        table.add_row(words, _giga(limits["disk"][name]), "", "GB/s")
    start = limits["start"]
    seconds = f"{start['median']:.2f} ({start['least']:.2f}-{start['greatest']:.2f})"
    table.add_row("start of a command", seconds, "", "s")
    return table


def _advice(machine: Summary, limits: Summary) -> Iterator[str]:
    """Yield what a user can do about what was found."""
    blas, cores = machine["blas"], machine["cores"]
    if blas["narrow"]:
        product, fma = (limits[name]["one"]["median"] for name in ("matrix_product", "fma"))
        yield (
            f"BLAS multiplies as on a {blas['architecture']}, without AVX-512: its matrix product "
            f"reaches {product / fma:.0%} of the multiply-add rate. Training and project may "
            "get faster with OPENBLAS_CORETYPE=SkylakeX."
        )
    quota = cores["quota"]
    if quota is not None and quota < limits["threads"]:
        yield f"The quota allows {quota:g} cores: --threads {max(1, int(quota))} may be faster."
    if machine["load"] is not None and machine["load"] > 0.5 * cores["usable"]:
        yield (
            f"The machine was busy before this run (load {machine['load']:g}): rates may be lower "
            "than it can do."
        )
    if machine["memory"]["huge_pages"] == "never":
        yield "Huge pages are switched off: random rows of large tables take longer to find."


def _rates_table(rows: list[Summary], settings: Summary, energy: bool) -> Any:
    source = settings["table"] or f"{settings['entities']:,} x {settings['columns']}, random"
    if settings["pair_file"] is not None:
        source += f", pairs of {settings['pair_file']}"
    scans = any(row["scan"] for row in rows)
    devices = len({row["device"] for row in rows}) > 1
    table = _new_table(
        f"What fastpair does: {source}",
        2 + scans + devices,
        "",
        *(["device"] if devices else []),
        "precision",
        *(["scan"] if scans else []),
        "million pairs/s",
        *(["J/million"] if energy else []),
        "does",
        "of the limit",
        "at random",
    )
    precision = None
    for row in rows:
        if precision not in (None, row["precision"]):
            table.add_section()
        precision = row["precision"]
        moved = f"{row['bytes_per_second'] / 1e9:.3g} GB/s"
        done = f"{row['operations_per_second'] / 1e9:.3g} Gop/s"
        table.add_row(
            WORKS[row["work"]].format(k=settings["k"]),
            *([row["device"]] if devices else []),
            precision,
            *([row["scan"] or ""] if scans else []),
            _rate(row),
            *([_joules(row)] if energy else []),
            done if row["binds"] == "arithmetic" else moved,
            f"{row['share']:.0%} {row['binds']}",
            "" if row["share_of_random"] is None else f"{row['share_of_random']:.0%}",
        )
    return table


def _rate(row: Summary) -> str:
    rate = row["pairs_per_second"]
    median, low, high = (_short(rate[key] / 1e6) for key in ("median", "least", "greatest"))
    return f"{median} ({low}-{high})"


def _joules(row: Summary) -> str:
    used = row["joules_per_million_pairs"]
    return "" if used is None else f"{used['median']:.3g}"


def _figures_table(speed: Summary, energy: bool) -> Any:
    """Show the figures of the README."""
    columns = ["million pairs/s", *(["J/million"] if energy else []), "of the limit"]
    table = _new_table("The figures of the README", 3, "", "table", "precision", *columns)
    for row in speed.values():
        table.add_row(
            WORKS[row["work"]].format(k=BEST),
            f"{row['entities']:,} x {row['columns']}, {row['head']}",
            row["precision"],
            _rate(row),
            *([_joules(row)] if energy else []),
            f"{row['share']:.0%} {row['binds']}",
        )
    return table


def _precision_table(precision: Summary) -> Any:
    """Show how far scores of each precision are from float64."""
    title = "Error against float64, in deviations of the scores: greatest (root mean square)"
    names = list(next(iter(precision.values()), {}))
    table = _new_table(title, 1, "", *names)
    for head, errors in precision.items():
        cells = (f"{one['greatest']:.0e} ({one['rms']:.0e})" for one in errors.values())
        table.add_row(head, *cells)
    return table


def _decisions_table(rows: list[Summary], threshold: float | None) -> Any:
    """Show the decisions that each precision and backend changes, side by side."""
    found = [row for row in rows if row["flipped_in_all"] is not None]
    whose = "a score that a tenth of them reach, for the table has no threshold"
    if threshold is not None:
        whose = "the model's threshold, many of them near it"
    title = (
        f"Decisions that differ from float64's, of {found[0]['decisions']:,}, at "
        f"{found[0]['threshold']:.4g}: {whose}"
    )
    backends = list(dict.fromkeys(row["backend"] for row in found))
    table = _new_table(title, 1, "precision", *backends)
    counts = {(row["precision"], row["backend"]): row["flipped_in_all"] for row in found}
    for precision in dict.fromkeys(row["precision"] for row in found):
        table.add_row(precision, *(str(counts[precision, backend]) for backend in backends))
    return table


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _agreement_table(rows: list[Summary]) -> Any:
    """Show the worst head of each precision and backend."""
    heads = len({row["head"] for row in rows})
    title = (
        f"Agreement with the float64 reference, before the link: the worst of {heads} heads; "
        "flipped: decisions at a score that a tenth of the pairs reach"
    )
    if any(row["flipped_in_all"] is not None for row in rows):
        title += ", of the table at its own threshold"
    columns = ("difference", "ulp", "of the bound", "flipped", "sets", "wrong")
    table = _new_table(title, 2, "", "precision", *columns)
    groups: dict[tuple[str, str], list[Summary]] = {}
    for row in rows:
        groups.setdefault((row["precision"], row["backend"]), []).append(row)
    for number, ((precision, backend), group) in enumerate(groups.items()):
        if number and backend == rows[0]["backend"]:
            table.add_section()
        worst = max(group, key=lambda row: row["bound"])
        table.add_row(
            backend,
            precision,
            f"{max(row['difference'] for row in group):.1e}",
            f"{max(row['ulp'] for row in group):.2g}",
            f"{worst['bound']:.1%}, {worst['head']}",
            *(_summed(row[key] for row in group) for key in ("flipped", "other_sets", "wrong")),
        )
    return table


def _summed(counts: Iterable[int | None]) -> str:
    known = [count for count in counts if count is not None]
    return str(sum(known)) if known else ""
