"""What machine this is, and what it can do at most: the ceilings that rates are compared with."""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from fastpair.backend import memory_budget, thread_count
from fastpair.files import page_aligned
from fastpair.staging import writing

Summary = dict[str, Any]

SHORTEST = 0.03
"""Seconds that one repeat of a probe takes at least."""

REPEATS = 3

LEAST_STREAM, MOST_STREAM = 1 << 28, 1 << 30
"""Bytes of the memory that is read: four times the last cache, within these."""

RANDOM_BLOCK = 512
"""Bytes of the blocks that are read in random order: a float32 row of 128 columns."""

MOST_RANDOM = 1 << 29
"""Bytes that are read at random, about: a tenth of a second."""

DISK_BYTES, DISK_BLOCK = 1 << 27, 1 << 22
"""Bytes of the file that is written and read to measure the disk, and of one call."""

MATRIX_ROWS = 2048
"""Rows and columns of the matrices whose product shows what BLAS does."""

WIDE_BLAS = ("SkylakeX", "Cooperlake", "SapphireRapids")
"""What OpenBLAS calls the CPUs for which it uses AVX-512."""

_FEATURES = {
    "avx2": "AVX2",
    "fma": "FMA",
    "avx512f": "AVX-512",
    "avx512vnni": "AVX-512 VNNI",
    "avx512bf16": "AVX-512 BF16",
    "avx512fp16": "AVX-512 FP16",
    "avxvnni": "AVX-VNNI",
    "amx-int8": "AMX-INT8",
    "amx-bf16": "AMX-BF16",
    "neon": "NEON",
    "dotprod": "dot product",
    "i8mm": "I8MM",
    "bf16": "BF16",
}


# --- what machine this is ------------------------------------------------------------------------


def describe_machine() -> Summary:
    """Return what is known of this machine and its software, in values that JSON can hold.

    Sizes are bytes. What cannot be found out is None.
    """
    from fastpair.kernels.simd import cpu_features
    from fastpair.kernels.tile import TILE_COLUMNS, TILE_ROWS

    has = set(cpu_features().split(","))
    return {
        "cpu": _cpu_model(),
        "architecture": platform.machine(),
        "cores": {
            "present": os.cpu_count(),
            "usable": thread_count(),
            "quota": _cpu_quota(),
        },
        "instruction_sets": [name for key, name in _FEATURES.items() if f"+{key}" in has],
        "kernel_features": cpu_features(),
        "register_tile": [TILE_ROWS, TILE_COLUMNS],
        "caches": _caches(),
        "memory": {
            "total": _memory_total(),
            "usable": int(memory_budget() / 0.8),
            "huge_pages": _chosen("/sys/kernel/mm/transparent_hugepage/enabled"),
        },
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "blas": describe_blas(),
        "system": f"{platform.system()} {platform.release()}",
        "versions": _versions(),
    }


def describe_blas() -> Summary:
    """Return which library multiplies NumPy's matrices, and whether it knew this CPU.

    ``narrow`` is True where OpenBLAS took the CPU for one without AVX-512 though it has that.
    """
    from threadpoolctl import threadpool_info

    from fastpair.kernels.simd import cpu_features

    found = [entry for entry in threadpool_info() if entry.get("user_api") == "blas"]
    # SciPy may bring a second one; NumPy's is the one that multiplies here
    entry = next((e for e in found if "numpy" in e.get("filepath", "")), found[0] if found else {})
    built_for = entry.get("architecture")
    # what OPENBLAS_CORETYPE may name needs these three
    wide = all(f"+avx512{part}" in cpu_features() for part in ("f", "dq", "vl"))
    return {
        "library": entry.get("internal_api"),
        "version": entry.get("version"),
        "architecture": built_for,
        "told": os.environ.get("OPENBLAS_CORETYPE"),
        "threads": entry.get("num_threads"),
        "narrow": bool(entry.get("internal_api") == "openblas" and wide)
        and built_for not in WIDE_BLAS,
    }


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("model name", "Model"):
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _text(path: str | Path) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _chosen(path: str) -> str | None:
    """Return the word in brackets of a setting such as ``always [madvise] never``."""
    text = _text(path)
    return None if text is None else text.partition("[")[2].partition("]")[0] or text


def _cpu_quota() -> float | None:
    """Return how many cores' worth of time a control group allows, or None without a limit."""
    groups = (_text("/proc/self/cgroup") or "").splitlines()
    own = next((line[3:] for line in groups if line.startswith("0::")), "/")
    for folder in (f"/sys/fs/cgroup{own.rstrip('/')}", "/sys/fs/cgroup"):
        words = (_text(f"{folder}/cpu.max") or "").split()
        if len(words) == 2 and words[0].isdigit():
            return int(words[0]) / int(words[1])
    folder = "/sys/fs/cgroup/cpu"
    quota, period = (_text(f"{folder}/cpu.cfs_{name}_us") for name in ("quota", "period"))
    if quota and period and quota.isdigit() and period.isdigit():
        return int(quota) / int(period)
    return None


def _caches() -> dict[str, int]:
    """Return the bytes of the caches of the first core by level: ``L1``, ``L2``, ``L3``."""
    caches = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind = _text(folder / "level"), _text(folder / "type")
        size = _text(folder / "size") or ""
        if level and kind != "Instruction" and size[:-1].isdigit() and size[-1] in "KM":
            caches[f"L{level}"] = int(size[:-1]) * (1 << 10 if size[-1] == "K" else 1 << 20)
    return caches


def _memory_total() -> int | None:
    for line in (_text("/proc/meminfo") or "").splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    return None


def _versions() -> dict[str, str | None]:
    names = ("fastpair", "numpy", "numba", "llvmlite", "h5py", "scipy", "pyarrow")
    found: dict[str, str | None] = {"python": sys.version.split()[0]}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


# --- what it can do at most ----------------------------------------------------------------------


def spread(values: list[float]) -> Summary:
    """Return the median, least and greatest of some repeats, and how many they are."""
    return {
        "median": statistics.median(values),
        "least": min(values),
        "greatest": max(values),
        "repeats": len(values),
    }


def side_by_side(work: Callable[[int], object], threads: int) -> float:
    """Run ``work(0)`` to ``work(threads - 1)`` at once, each in a thread; return the seconds."""
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda _: None, range(threads)))  # the threads are there before the clock
        begun = time.perf_counter()
        list(pool.map(work, range(threads)))
        return time.perf_counter() - begun


def measure_limits(threads: int | None = None) -> Summary:
    """Measure the ceilings of arithmetic and memory, on one core and on all.

    Parameters
    ----------
    threads : what "all" means; default one for each processor.

    Returns
    -------
    limits : the `spread` of operations or bytes a second of ``one`` core and ``all``, by name:
        ``fma``, ``maximum``, ``bfloat16``, ``int8`` (None where the CPU has no such instruction),
        ``matrix_product``, ``read``, ``random`` (blocks of `RANDOM_BLOCK` bytes) and ``copy`` (a
        byte is counted twice, read and written).
    """
    count = thread_count(threads)
    several = {"one": 1, "all": count}
    return {
        **_arithmetic_limits(several),
        **_memory_limits(several),
        "matrix_product": {name: _matrix_product(n) for name, n in several.items()},
        "threads": count,
    }


def _rates(work: Callable[[int], object], threads: int, amount: float) -> Summary:
    """Return the `spread` of `amount` divided by the seconds of work in threads."""
    return spread([amount / side_by_side(work, threads) for _ in range(REPEATS)])


def _arithmetic_limits(several: dict[str, int]) -> Summary:
    from fastpair.kernels.limits import Probe, arithmetic_probes

    def measured(probe: Probe) -> Summary:
        probe.run(1)
        count = 1 << 16

        def work(_: int) -> object:
            return probe.run(count)

        while side_by_side(work, 1) < SHORTEST:
            count *= 2
        return {key: _rates(work, n, n * count * probe.operations) for key, n in several.items()}

    limits: Summary = dict.fromkeys(("fma", "maximum", "bfloat16", "int8"))
    return {**limits, **{name: measured(probe) for name, probe in arithmetic_probes().items()}}


def stream_bytes() -> int:
    """Return the bytes of the memory that is read and copied to measure its bandwidth."""
    wanted = 4 * max(_caches().values(), default=0)
    return min(max(wanted, LEAST_STREAM), MOST_STREAM)


def _memory_limits(several: dict[str, int]) -> Summary:
    from fastpair.kernels.limits import copy

    data = page_aligned((2, stream_bytes() // 2))
    data[:] = 0  # each page is there before the clock

    def copying(threads: int) -> Summary:
        parts = _parts(data.shape[1], threads)
        return _rates(lambda n: copy(data[0, parts[n]], data[1, parts[n]]), threads, data.nbytes)

    everything = data.reshape(-1)
    copy(data[0, :4096], data[1, :4096])
    return {
        "read": {key: read_bandwidth(everything, n) for key, n in several.items()},
        "random": {
            key: random_bandwidth(everything, RANDOM_BLOCK, n) for key, n in several.items()
        },
        "copy": {key: copying(n) for key, n in several.items()},
    }


def _parts(count: int, pieces: int) -> list[slice]:
    """Cut bytes into pieces of whole pages, the last one longer."""
    size = count // pieces // 4096 * 4096
    return [slice(n * size, (n + 1) * size if n + 1 < pieces else count) for n in range(pieces)]


def read_bandwidth(data: np.ndarray, threads: int) -> Summary:
    """Return the `spread` of bytes a second at which threads read `data` (n,) uint8 in order."""
    from fastpair.kernels.limits import read

    parts = _parts(data.nbytes, threads)
    rounds = 1

    def read_part(number: int) -> float:
        return read(data[parts[number]], rounds)

    while (seconds := side_by_side(read_part, threads)) < SHORTEST:
        rounds *= max(2, min(64, int(SHORTEST / max(seconds, 1e-6))))
    return _rates(read_part, threads, rounds * data.nbytes)


def random_bandwidth(data: np.ndarray, block: int, threads: int) -> Summary:
    """Return the `spread` of bytes a second at which threads read blocks of `data` at random.

    `data` is (n,) uint8, `block` a multiple of 64 bytes.
    """
    from fastpair.kernels.limits import read_blocks

    count = min(1 << 20, max(1 << 16, MOST_RANDOM // block))
    order = np.random.default_rng(0).integers(0, len(data) // block, count, dtype=np.int32)
    orders = np.array_split(order, threads)
    read_blocks(data, order[:9], block)
    return _rates(lambda n: read_blocks(data, orders[n], block), threads, count * block)


def measure_disk(folder: Path) -> Summary:
    """Return the `spread` of bytes a second at which files in `folder` are written and read.

    Under ``write``, flushed, and ``read``. What was written is dropped from memory before it is
    read, where the system allows that; a machine below this one may hold it still.

    Raises
    ------
    FileError : the folder cannot hold a file of `DISK_BYTES`.
    """
    block = bytearray(np.random.default_rng(0).bytes(DISK_BLOCK))
    path, written, found = folder / "disk.bin", [], []
    with writing(path):
        for _ in range(REPEATS):
            begun = time.perf_counter()
            with path.open("wb", buffering=0) as file:
                for _ in range(DISK_BYTES // DISK_BLOCK):
                    file.write(block)
                os.fsync(file.fileno())
                written.append(DISK_BYTES / (time.perf_counter() - begun))
            with path.open("rb", buffering=0) as file:
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                begun = time.perf_counter()
                while file.readinto(block):
                    pass
                found.append(DISK_BYTES / (time.perf_counter() - begun))
        path.unlink()
    return {"write": spread(written), "read": spread(found)}


def _matrix_product(threads: int) -> Summary:
    """Return the `spread` of operations a second of NumPy's float32 matrix product."""
    from threadpoolctl import threadpool_limits

    left = np.ones((MATRIX_ROWS, MATRIX_ROWS), np.float32)
    product = np.empty_like(left)
    seconds = []
    with threadpool_limits(threads, "blas"):
        np.matmul(left[:64], left, out=product[:64])
        for _ in range(REPEATS):
            begun = time.perf_counter()
            np.matmul(left, left, out=product)
            seconds.append(time.perf_counter() - begun)
    return spread([2 * MATRIX_ROWS**3 / s for s in seconds])
