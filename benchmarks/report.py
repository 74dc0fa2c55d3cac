"""Turn stored runs into the tables of benchmarks/README.md.

    python benchmarks/report.py build/bench.json

Several files may be given, each from a run of some of the works; a later file takes the place of an
earlier one where both have a work.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

import click

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
UNITS = {"pairs": (1e6, "million pairs/s"), "bytes": (1e9, "GB/s"), "operations": (1e9, "GFLOP/s")}
"""What is counted -> what a rate is divided by, and its name."""

Work = dict[str, Any]


def read_runs(paths: list[Path]) -> dict[str, Work]:
    """Return the works by title, each with its entries by contender and the machine it ran on."""
    works: dict[str, Work] = {}
    for path in paths:
        run = json.loads(path.read_text())
        for title, work in run["works"].items():
            entries = {
                entry["extra_info"]["contender"]: {**entry["extra_info"], **entry["stats"]}
                for entry in run["benchmarks"]
                if entry["group"] == title
            }
            machine = {**run["machine_info"], "date": run["datetime"][:10]}
            works[title] = {**work, "entries": entries, "machine": machine}
    return works


def rate(entry: dict[str, Any], by: str) -> float:
    """Return what a contender does a second, by its median."""
    return float(entry["amounts"][by] / entry["median"])


def ratio(ours: dict[str, Any], theirs: dict[str, Any], by: str = "pairs") -> float:
    """Return how much more ours does a second: the median of the ratios of each round.

    What slows the machine down for a while slows both in that round.
    """
    amounts = ours["amounts"][by] / theirs["amounts"][by]
    rounds = zip(ours["data"], theirs["data"], strict=False)
    return float(amounts * median(their / own for own, their in rounds))


def bar_line(title: str, work: Work, bar: dict[str, Any]) -> str:
    """Return a line of the table of bars: what was asked, what was measured."""
    entries, by = work["entries"], bar["by"]
    share = by != "pairs"
    asked = [f"at least {_factor(bar['factor'], share)}"] if bar["factor"] else []
    asked += [f"aim {_factor(bar['aim'], share)}"] if bar["aim"] else []
    measured, met = "not measured", ""
    present = [name for name in bar["against"] if name in entries]
    if bar["ours"] in entries and present:
        ratios = {name: ratio(entries[bar["ours"]], entries[name], by) for name in present}
        best = min(ratios, key=lambda name: ratios[name])
        measured = f"**{_factor(ratios[best], share)}**"
        measured += f" ({best})" if len(bar["against"]) > 1 else ""
        lacking = [name for name in bar["against"] if name not in entries]
        measured += f"; without {', '.join(lacking)}" if lacking else ""
        if bar["factor"]:
            met = "yes" if ratios[best] >= bar["factor"] else "no"
    against = " or ".join(bar["against"])
    demand = ", ".join(asked) or "for the record"
    return f"| {title} | {bar['ours']} / {against} | {demand} | {measured} | {met} |"


def _factor(number: float, share: bool) -> str:
    return f"{number:.0%}" if share else f"{number:.3g} x"


def work_lines(title: str, work: Work) -> list[str]:
    """Return the section of one work: every contender, and who is missing."""
    entries = work["entries"]
    ours = entries.get("fastpair")
    sizes = ", ".join(f"{name} {value:,}" for name, value in work["sizes"].items())
    lines = [
        f"### {title[0].upper()}{title[1:]}",
        "",
        f"Ran with {sizes}.",
        "",
        "| contender | seconds, median (least to greatest) | rounds | rate | fastpair is faster "
        "by | remarks |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["median"]):
        seconds = f"{entry['median']:.3g} ({entry['min']:.3g} to {entry['max']:.3g})"
        faster = ""
        if ours is not None and entry["amounts"]["pairs"]:
            faster = f"{ratio(ours, entry):.3g} x"
        remarks = [entry["remark"]] if entry["remark"] else []
        if entry["share"] < 1:
            remarks.append(f"timed on {entry['share']:.3g} of the work")
        row = (name, seconds, entry["rounds"], _rates(entry), faster, "; ".join(remarks))
        lines.append("| " + " | ".join(map(str, row)) + " |")
    lines += [f"| {name} | missing | | | | not installed |" for name in work["missing"]]
    lines += [f"| {name} | failed | | | | see the run |" for name in work["failed"]]
    lines += [f"| {name} | | | | | {why} |" for name, why in work["absent"].items()]
    return [*lines, ""]


def _rates(entry: dict[str, Any]) -> str:
    rates = []
    for by, (unit, name) in UNITS.items():
        if entry["amounts"].get(by):
            rates.append(f"{rate(entry, by) / unit:.3g} {name}")
    return ", ".join(rates)


def machine_lines(works: dict[str, Work]) -> list[str]:
    """Return what the runs ran on, once if it was the same for all."""
    lines = []
    for machine in {json.dumps(_machine(work)): _machine(work) for work in works.values()}.values():
        versions = ", ".join(f"{n} {v or 'missing'}" for n, v in machine["versions"].items())
        lines += [
            f"{machine['cpu']}, {machine['cores']} cores, {machine['memory'] / 2**30:.0f} GiB, "
            f"Python {machine['python']}, {machine['date']}.",
            f"{versions}.",
        ]
    pools = sorted({_pool(p) for w in works.values() for p in w["machine"]["thread_pools"]})
    return [*lines, f"Thread pools: {'; '.join(pools)}.", ""]


def _machine(work: Work) -> dict[str, Any]:
    machine = work["machine"]
    kept = {name: machine[name] for name in ("cores", "memory", "versions", "date")}
    return {**kept, "cpu": machine["cpu"]["brand_raw"], "python": machine["python_version"]}


def _pool(pool: dict[str, Any]) -> str:
    parts = [pool["internal_api"], pool["version"] or "", pool.get("architecture", "")]
    library = pool["library"].split("-")[0].split(".")[0]
    return f"{' '.join(part for part in parts if part)} ({library}, {pool['num_threads']} threads)"


def tables(works: dict[str, Work]) -> str:
    """Return all tables as Markdown."""
    bars = [bar_line(title, work, bar) for title, work in works.items() for bar in work["bars"]]
    small = min((work["scale"] for work in works.values()), default=1)
    lines = machine_lines(works)
    if small < 1:
        lines += [f"A trial at {small} of the sizes: these numbers say nothing.", ""]
    lines += ["| work | ours / theirs | bar | measured | met |", "| --- | --- | --- | --- | --- |"]
    lines += [*bars, ""]
    for title, work in works.items():
        lines += work_lines(title, work)
    rounds = [e["rounds"] for work in works.values() for e in work["entries"].values()]
    lines.append(f"Rounds of every contender: {median(rounds):.0f}, unless its line says less.")
    return "\n".join(lines)


def insert(text: str, tables: str) -> str:
    """Put the tables between their marks in a text."""
    if BEGIN not in text or END not in text:
        raise click.ClickException(f"the file has no lines {BEGIN} and {END}")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}"


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--print", "only_print", is_flag=True, help="Write to standard output instead.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default=README)
def main(runs: tuple[Path, ...], only_print: bool, output: Path) -> None:
    """Write the tables of stored runs into the README of the benchmarks."""
    text = tables(read_runs(list(runs)))
    if only_print:
        click.echo(text)
    else:
        output.write_text(insert(output.read_text(), text))


if __name__ == "__main__":
    main()
