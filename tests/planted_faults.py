"""Plants faults into the kernels' sources, one at a time: each must make a test fail.

    python tests/planted_faults.py [words of the names of faults]

A fault is a small change that a slip of the hand could make. One that no test finds fails the
script, and so does one that fits nowhere any more. Each runs the tests that ought to find it, until
the first that fails, in a process of its own on the sources as they would then be.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import simulated_gpu
from hypothesis import Phase, settings

from fastpair import agreement, gpu_matrix, matrix, scoring  # noqa: F401  forked processes have it
from fastpair.kernels import cpu, gpu, gpu_tiles  # noqa: F401

TESTS = Path(__file__).parent
MOST_SECONDS = 600

# A first failure is enough: no smaller example is looked for.
phases = [Phase.explicit, Phase.generate]
settings.register_profile("fault", derandomize=True, deadline=None, phases=phases)


class Fault(NamedTuple):
    name: str
    file: str
    before: str
    after: str
    tests: str  # file::name, or file and words for pytest -k


BITS = "test_gpu_kernels.py -k the_bits_are_those"
HELD = "test_gpu_kernels.py -k rows_of_every_length"
LINKED = "test_gpu_kernels.py -k every_link"
RANGE = "test_gpu_kernels.py -k rows_out_of_range"
INT8 = "test_gpu_kernels.py -k int8_sums"
LARGE = "test_gpu_kernels.py -k beyond_2_gigabytes"
NETWORK = "test_gpu_kernels.py -k networks_have"
TILES = "test_gpu_tiles.py -k values_are_those"
BEST = "test_gpu_tiles.py -k best_are_kept"
SORTED = "test_gpu_tiles.py -k power_of_two"
HITS = "test_gpu_tiles.py -k hits_are_counted"
PLACES = "test_gpu_tiles.py -k found_at_its_place"
MATRIX = "test_gpu_matrix.py -k every_link_and_every_result"
TIES = "test_gpu_matrix.py -k ties_go_to"
WHOLE_ROWS = "test_gpu_matrix.py -k not_proven"

FAULTS = [
    Fault(
        "a lost shuffle step",
        "pairs.cu",
        "for (int apart = FP_NATURAL / 2; apart > 0;",
        "for (int apart = FP_NATURAL / 2; apart > 1;",
        BITS,
    ),
    Fault(
        "lanes added in another order",
        "pairs.cu",
        "  for (int width = FP_COLUMNS / 2; width > 0; width /= 2)\n#pragma unroll\n"
        "    for (int n = 0; n < width; ++n) lanes.sums[n] += lanes.sums[n + width];",
        "  for (int width = 1; width < FP_COLUMNS; ++width) lanes.sums[0] += lanes.sums[width];",
        BITS,
    ),
    Fault(
        "the sign of a minus run forgotten",
        "pairs.cu",
        "lane = MINUS ? lane - term : lane + term;",
        "lane = lane + term;",
        BITS,
    ),
    Fault(
        "a product rounded before it is added",
        "pairs.cu",
        "lane = fmaf(MINUS ? -l[n] : l[n], r[n], lane);",
        "lane = lane + (MINUS ? -l[n] : l[n]) * r[n];",
        BITS,
    ),
    Fault(
        "a half not swapped",
        "pairs.cu",
        "load_columns(left + half, other_l);",
        "load_columns(left, other_l);",
        BITS,
    ),
    Fault(
        "biases added last",
        "pairs.cu",
        "(constants.constant + bias) + weigh(lanes, constants, scales)",
        "constants.constant + (bias + weigh(lanes, constants, scales))",
        BITS,
    ),
    Fault(
        "the low half of a word in the high number",
        "pairs.cu",
        "high = __uint_as_float(word & 0xffff0000u);",
        "high = __uint_as_float(word);",
        BITS,
    ),
    Fault(
        "a misaligned load",
        "pairs.cu",
        "const int own = lane % FP_NATURAL * 16;",
        "const int own = lane % FP_NATURAL * 8;",
        BITS,
    ),
    Fault(
        "threads that leave before a shuffle",
        "pairs.cu",
        "    Lanes lanes = {};\n    float bias",
        "    if (!usable) continue;\n    Lanes lanes = {};\n    float bias",
        RANGE,
    ),
    Fault(
        "a write past the list",
        "pairs.cu",
        "if (lane != 0 || pair >= list.count) continue;",
        "if (lane != 0) continue;",
        BITS,
    ),
    Fault(
        "the next pair of another group",
        "pairs.cu",
        "next = load_pair(left, right, pair + list.round_step, list)",
        "next = load_pair(left, right, pair + 1, list)",
        BITS,
    ),
    Fault(
        "one row too many allowed",
        "pairs.cu",
        "(u64)current.right < (u64)right_count;",
        "(u64)current.right <= (u64)right_count;",
        RANGE,
    ),
    Fault(
        "any bad pair told, not the first",
        "pairs.cu",
        "if (!usable) atomicMin(first_bad, (u64)pair);",
        "if (!usable) *first_bad = (u64)pair;",
        RANGE,
    ),
    Fault(
        "a place in the table of 32 bits",
        "pairs.cu",
        "right_rows + current.right * layout.row_bytes",
        "right_rows + (u32)((u32)current.right * (u32)layout.row_bytes)",
        LARGE,
    ),
    Fault(
        "the sign of a held row turned too late",
        "pairs.cu",
        "if (vector >= layout.runs[0]) negate(",
        "if (vector > layout.runs[0]) negate(",
        HELD,
    ),
    Fault(
        "a held row that is never replaced",
        "pairs.cu",
        "if (held.number == number) return;",
        "if (held.number >= 0) return;",
        HELD,
    ),
    Fault(
        "a row longer than what is held",
        "pairs.cu",
        "if (layout.runs[0] + layout.runs[1] <= FP_HELD * FP_SUBGROUPS) {",
        "{",
        HELD,
    ),
    Fault(
        "a product of squares taken once",
        "pairs.cu",
        "squares - 2u * (u32)add_dot",
        "squares - (u32)add_dot",
        INT8,
    ),
    Fault(
        "distances of bytes as if they had no sign",
        "pairs.cu",
        "__vsadu4(x ^ 0x80808080u, y ^ 0x80808080u)",
        "__vsadu4(x, y)",
        INT8,
    ),
    Fault(
        "a scale not squared",
        "pairs.cu",
        "if (segment == 4) scale = scale * scale;",
        "",
        BITS,
    ),
    Fault(
        "a root of a negative number",
        "device.cuh",
        "const float below = fminf(raw, 0.0f);",
        "const float below = raw;",
        LINKED,
    ),
    Fault(
        "a link in float32 that needs float64",
        "device.cuh",
        "value = (float)exp((double)below);",
        "value = expf(below);",
        LINKED,
    ),
    Fault(
        "row numbers of 8 bytes read as 4",
        "device.cuh",
        "if (bytes == 4)",
        "if (bytes >= 4)",
        BITS,
    ),
    Fault(
        "a tile filled while it is read",
        "network.cu",
        "__syncthreads();  // before the tiles are filled again, and before `previous` is read",
        "",
        NETWORK,
    ),
    Fault(
        "a tile read before it is filled",
        "network.cu",
        "      __syncthreads();\n#pragma unroll\n      for (int k = 0; k < FP_STEP; ++k) {",
        "#pragma unroll\n      for (int k = 0; k < FP_STEP; ++k) {",
        NETWORK,
    ),
    Fault(
        "a last layer that is not whole",
        "network.cu",
        "__syncthreads();  // the last layer is whole",
        "",
        NETWORK,
    ),
    Fault(
        "rows turned while they are read",
        "network.cu",
        "__syncthreads();  // and its rows are not needed any more",
        "",
        NETWORK,
    ),
    Fault(
        "a layer that reads what it writes",
        "network.cu",
        "float* const outputs = hidden + layer % 2 * half;",
        "float* const outputs = hidden;",
        NETWORK,
    ),
    Fault(
        "one order counted twice",
        "network.cu",
        "sides[thread] = turned;  // the other order",
        "",
        NETWORK,
    ),
    Fault(
        "units that share a scratch",
        "network.cu",
        "scratch + (i64)blockIdx.x * 2 * half",
        "scratch + (i64)blockIdx.x * half",
        NETWORK + " or two_streams",
    ),
    Fault(
        "a bias of the wrong row",
        "tiles.cu",
        "const float bias = here < t.left_count ? left_bias[here] : 0.0f;",
        "const float bias = here < t.left_count ? left_bias[here / 2] : 0.0f;",
        TILES,
    ),
    Fault(
        "the sign boundary of maxima one step late",
        "tiles.cu",
        "if (word < t.products + t.plus)",
        "if (word <= t.products + t.plus)",
        TILES,
    ),
    Fault(
        "a tile of tiles.cu filled while it is read",
        "tiles.cu",
        "      add_maxima(lefts, rights, false, sums);\n    __syncthreads();",
        "      add_maxima(lefts, rights, false, sums);",
        TILES,
    ),
    Fault(
        "a tile of tiles.cu read before it is filled",
        "tiles.cu",
        "    __syncthreads();\n    add_products(lefts, rights, sums);",
        "    add_products(lefts, rights, sums);",
        TILES,
    ),
    Fault(
        "rows of a last tile past the table",
        "tiles.cu",
        "if (row >= t.left_count || column >= t.right_count) return false;",
        "if (column >= t.right_count) return false;",
        MATRIX,
    ),
    Fault(
        "an entity paired with itself",
        "tiles.cu",
        "t.one_table == 1 ? apart != 0",
        "t.one_table == 1 ? true",
        MATRIX,
    ),
    Fault(
        "a range that loses half its warp",
        "tiles.cu",
        "for (int apart = 16; apart > 0; apart >>= 1) {\n    const u32 low",
        "for (int apart = 8; apart > 0; apart >>= 1) {\n    const u32 low",
        MATRIX,
    ),
    Fault(
        "a fragment's registers in another order",
        "tiles.cu",
        "half + (n >> 1) * 4];",
        "half + (n & 1) * 4];",
        PLACES,
    ),
    Fault(
        "a fragment's rows by the wrong lanes",
        "tiles.cu",
        "(i & 1) * 8 + ((threadIdx.x & 31) >> 2)",
        "(i & 1) * 8 + (threadIdx.x & 3)",
        PLACES,
    ),
    Fault(
        "maxima taken for products",
        "tiles.cu",
        "if (first + row < count && word + four < products)",
        "if (first + row < count)",
        TILES,
    ),
    Fault(
        "a triangle with its diagonal",
        "tiles.cu",
        "apart != 0 : apart > 0",
        "apart != 0 : apart >= 0",
        HITS,
    ),
    Fault(
        "a tile left out of a triangle that begins within it",
        "tiles.cu",
        "return t.one_table == 2 && t.right_first + column + TILE - 1 <",
        "return t.one_table == 2 && t.right_first + column <",
        "test_gpu_matrix.py -k portions",
    ),
    Fault(
        "a list with one place too many",
        "tiles.cu",
        "if (at >= list.capacity) return;",
        "if (at > list.capacity) return;",
        HITS,
    ),
    Fault(
        "a row without room that says nothing",
        "tiles.cu",
        "  else atomicMax(overflow, 1u);",
        "",
        TIES,
    ),
    Fault(
        "a partner offered as itself",
        "tiles.cu",
        "overflow, other, value, t.left_first + r);",
        "overflow, other, value, t.right_first + c);",
        TIES,
    ),
    Fault(
        "an entity among its own best",
        "select.cu",
        "|| itself + chosen[row] == column) return;",
        ") return;",
        WHOLE_ROWS,
    ),
    Fault(
        "candidates that are not forgotten",
        "select.cu",
        "if (row < rows) counts[row] = kept[row];",
        "if (row + 1 < rows) counts[row] = kept[row];",
        "test_gpu_tiles.py -k forgotten",
    ),
    Fault(
        "keys sorted the wrong way",
        "select.cu",
        "if (((n & run) == 0) == (x < y)) { keys[n] = y; keys[other] = x; }",
        "if (((n & run) == 0) == (x > y)) { keys[n] = y; keys[other] = x; }",
        BEST,
    ),
    Fault(
        "a step of sorting without a barrier",
        "select.cu",
        "        }\n      }\n      __syncthreads();",
        "        }\n      }",
        BEST,
    ),
    Fault(
        "a floor one place too high",
        "select.cu",
        "floors[row] = value_of(own[keep - 1]);",
        "floors[row] = value_of(own[keep / 2]);",
        BEST,
    ),
    Fault(
        "ties that go to the higher column",
        "device.cuh",
        "return (u64)ordered(value) << 32 | (u32)~column;",
        "return (u64)ordered(value) << 32 | column;",
        BEST,
    ),
]


def read_with(fault):
    """Return a `read_source` that plants a fault."""
    read = gpu.read_source

    def read_planted(name):
        source = read(name)
        return source.replace(fault.before, fault.after)

    return read_planted


def fits(fault):
    """Whether a fault's text is found once in its file."""
    file, needed = fault.file, "pairs.cu"
    source = gpu.read_source(needed if file.endswith(".cuh") else file)
    return source.count(fault.before) == 1


def run(fault):
    """Run the tests of a fault in a process of its own; return whether one fails."""
    child = os.fork()
    if child == 0:
        os.environ["HYPOTHESIS_PROFILE"] = "fault"
        gpu.read_source = gpu_tiles.read_source = read_with(fault)
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        file, *words = fault.tests.split(" -k ")
        choice = ["-k", words[0]] if words else []
        quiet = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:faulthandler"]
        os._exit(pytest.main([*quiet, *choice, str(TESTS / file)]))
    limit = time.monotonic() + MOST_SECONDS
    while time.monotonic() < limit:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return code == 1 or code < 0  # a test failed, or the kernel crashed
        time.sleep(0.1)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return True  # a kernel that never ends


def main():
    chosen = [f for f in FAULTS if all(word in f.name for word in sys.argv[1:])]
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder  # what is built here is of no use later
        simulated_gpu.compiled_header()
        for fault in chosen:
            started = time.monotonic()
            what = "fits nowhere" if not fits(fault) else "found" if run(fault) else "NOT FOUND"
            wrong += what != "found"
            print(f"{what:12} {time.monotonic() - started:5.1f} s  {fault.name}", flush=True)
    print(f"{len(chosen) - wrong} of {len(chosen)} faults were found")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
