"""Compiles every GPU kernel for real devices with NVRTC, which needs neither a GPU nor a driver.

    python tests/compile_gpu.py [--quick] [--write] [--nvrtc FOLDER] [--jobs N]

Fails on a stack frame, a spilled register, more registers than two blocks of 256 threads may have,
and on a number of registers other than in `gpu_registers.json`, which has a section for each
version of NVRTC (registers differ between them) with the kernels of the choice `quick`. All other
kernels, and versions without a section, are held to the limits alone. ``--quick`` compiles that
choice, ``--write`` puts its registers into the table. ``--nvrtc`` is where another version lies.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import importlib
import importlib.util
import itertools
import json
import multiprocessing
import os
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from fastpair.kernels import gpu

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
"""Devices: A100, H100 and H200, B200."""

MOST_REGISTERS = 65536 // (2 * gpu.THREADS)
REGISTERS = Path(__file__).with_name("gpu_registers.json")

_ENTRY = re.compile(
    r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
    r"(\d+) bytes spill loads.*?Used (\d+) registers",
    re.DOTALL,
)


def find_nvrtc():
    """Return the library of the wheel nvidia-cuda-nvrtc, or None; FASTPAIR_NVRTC is its folder."""
    package = importlib.util.find_spec("nvidia")
    folders = list(package.submodule_search_locations or ()) if package else []
    if "FASTPAIR_NVRTC" in os.environ:
        folders = [os.environ["FASTPAIR_NVRTC"]]
    found = [path for folder in folders for path in Path(folder).glob("**/libnvrtc.so.*")]
    return min((path for path in found if "alt" not in path.name), default=None)


class Nvrtc:
    """NVIDIA's compiler, as a library."""

    def __init__(self, path):
        for part in path.parent.glob("libnvrtc-builtins.so.*"):
            ctypes.CDLL(str(part), ctypes.RTLD_GLOBAL)  # it is looked for by its bare name
        self.library = ctypes.CDLL(str(path))

    @property
    def version(self):
        """Return what registers depend on, about: such as ``13.0``."""
        numbers = ctypes.c_int(), ctypes.c_int()
        self.library.nvrtcVersion(*map(ctypes.byref, numbers))
        return ".".join(str(number.value) for number in numbers)

    def compile(self, source, options):
        """Return the compiler's report; what it refuses is a ValueError."""
        program = ctypes.c_void_p()
        handle = ctypes.byref(program)
        self.library.nvrtcCreateProgram(handle, source.encode(), b"kernel.cu", 0, None, None)
        given = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
        failed = self.library.nvrtcCompileProgram(program, len(options), given)
        size = ctypes.c_size_t()
        self.library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        self.library.nvrtcGetProgramLog(program, log)
        self.library.nvrtcDestroyProgram(handle)
        if failed:
            raise ValueError(log.value.decode())
        return log.value.decode()


def programs():
    """Return every (file, options) that may be compiled; a file's kernels come together.

    They are what the function ``variants`` of each ``kernels/gpu*.py`` yields.
    """
    names = sorted(path.stem for path in Path(gpu.__file__).parent.glob("gpu*.py"))
    modules = [importlib.import_module(f"fastpair.kernels.{name}") for name in names]
    makers = [module.variants for module in modules if hasattr(module, "variants")]
    variants = itertools.chain.from_iterable(maker() for maker in makers)
    return list(dict.fromkeys((file, options) for file, _, options in variants))


def quick(file, options, architecture):
    """Tell whether a program is compiled in every test run: half a minute of one core in all.

    For sm_90 what scores pairs by natural groups, all pairs in every form, and lookups of two
    precisions; for the others a sample. `make gpu-check` compiles the rest.
    """
    plain = "-DFP_LINK=0" in options
    if file == "attention.cu" and {"-DFP_PRECISION=1", "-DFP_PRECISION=2"} & set(options):
        return False
    if file != "pairs.cu":
        return architecture == "sm_90" or file == "network.cu"
    natural = any(f"-DFP_LANES={n}" in options for n in (2, 4))
    return natural and (architecture == "sm_90" or (plain and "-DFP_PRECISION=0" in options))


@functools.cache
def _nvrtc():
    return Nvrtc(find_nvrtc())


def compile_program(program):
    """Return {name: (stack frame, spill stores, spill loads, registers)} of a program's kernels."""
    file, options, architecture = program
    report = ["--ptxas-options=-v", "--ptxas-options=--warn-on-spills"]
    log = _nvrtc().compile(
        gpu.read_source(file), [f"--gpu-architecture={architecture}", *report, *options]
    )
    defines = " ".join(o.removeprefix("-DFP_") for o in options if o.startswith("-D"))
    found = {}
    for name, *numbers in _ENTRY.findall(log):
        found[f"{architecture} {file} {name} {defines}".strip()] = tuple(map(int, numbers))
    if not found:
        raise ValueError(f"no kernel in the report of {file} {options}:\n{log[:2000]}")
    return found


def compile_all(chosen, jobs):
    """Return the report of programs (file, options, architecture), compiled by `jobs` processes."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context) as pool:
        reports = list(pool.map(compile_program, chosen, chunksize=4))
    return {name: numbers for report in reports for name, numbers in report.items()}


def complaints(report, expected):
    """Yield a sentence for each kernel that breaks a limit or differs from the table."""
    for name, (*local, registers) in report.items():
        if any(local):
            yield f"{name}: stack frame, spill stores and loads of {local} bytes, expected none"
        elif registers > MOST_REGISTERS:
            yield f"{name}: {registers} registers, expected at most {MOST_REGISTERS}"
        elif expected.get(name, registers) != registers:
            yield f"{name}: {registers} registers, the table says {expected[name]}"
    for name in sorted(expected.keys() - report.keys()):
        yield f"{name}: in the table, but nothing compiles it"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--nvrtc")
    options = parser.parse_args()
    if options.nvrtc:
        os.environ["FASTPAIR_NVRTC"] = options.nvrtc
    if options.write and not options.quick:
        sys.exit("--write goes with --quick")
    if find_nvrtc() is None:
        sys.exit("there is no NVRTC: pip install nvidia-cuda-nvrtc")
    version, started = _nvrtc().version, time.monotonic()
    tables = json.loads(REGISTERS.read_text()) if REGISTERS.exists() else {}
    chosen = [
        (*program, architecture)
        for architecture, program in itertools.product(ARCHITECTURES, programs())
        if not options.quick or quick(*program, architecture)
    ]
    report = compile_all(chosen, options.jobs)
    found = list(complaints(report, {} if options.write else tables.get(version, {})))
    print(*found, sep="\n")
    seconds = time.monotonic() - started
    known = "" if version in tables else ", a version without a table"
    print(
        f"NVRTC {version}{known}: {len(chosen)} programs, {len(report)} kernels, "
        f"{seconds:.0f} s, {len(found)} complaints"
    )
    if options.write:
        tables[version] = {name: numbers[-1] for name, numbers in sorted(report.items())}
        REGISTERS.write_text(json.dumps(tables, indent=0, sort_keys=True) + "\n")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
