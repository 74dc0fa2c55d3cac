"""Plants faults into the kernels' sources, one at a time: each must make a test fail.

    python tests/planted_faults.py [--jobs N] [words of the names of faults]

A fault is a small change that a slip of the hand could make. One that no test finds fails the
script, and so does one that fits nowhere any more. Each runs the tests that ought to find it, until
the first that fails, in a process of its own on the sources as they would then be.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import simulated_gpu
import test_network  # noqa: F401  forked processes have it
from hypothesis import Phase, settings

from fastpair import (  # noqa: F401  forked processes have it
    agreement,
    gpu_lookup,
    gpu_matrix,
    matrix,
    scoring,
)
from fastpair.kernels import cpu, gpu, gpu_attention, gpu_tiles  # noqa: F401

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


PAIRS = "test_gpu_kernels.py -k every_link and identity"
LINKED = "test_gpu_kernels.py -k every_link and float32"
HELD = "test_gpu_kernels.py -k rows_of_every_length and float32 and None"
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
ENDS = "test_gpu_matrix.py -k ends_of_a_histogram"
PORTIONS = "test_gpu_matrix.py -k do_not_depend_on_portions"
TIES = "test_gpu_matrix.py -k ties_go_to"
WHOLE_ROWS = "test_gpu_matrix.py -k not_proven"
LOOKUP = "test_gpu_lookup.py -k softmax_means and identity"

FAULTS = [
    Fault(
        "a lost shuffle step",
        "pairs.cu",
        "for (int apart = FP_NATURAL / 2; apart > 0;",
        "for (int apart = FP_NATURAL / 2; apart > 1;",
        PAIRS + " and float32",
    ),
    Fault(
        "lanes added in another order",
        "pairs.cu",
        "  for (int width = FP_COLUMNS / 2; width > 0; width /= 2)\n#pragma unroll\n"
        "    for (int n = 0; n < width; ++n) lanes.sums[n] += lanes.sums[n + width];",
        "  for (int width = 1; width < FP_COLUMNS; ++width) lanes.sums[0] += lanes.sums[width];",
        PAIRS + " and float32",
    ),
    Fault(
        "the sign of a minus run forgotten",
        "pairs.cu",
        "lane = MINUS ? lane - term : lane + term;",
        "lane = lane + term;",
        PAIRS + " and float32",
    ),
    Fault(
        "a product rounded before it is added",
        "pairs.cu",
        "lane = fmaf(MINUS ? -l[n] : l[n], r[n], lane);",
        "lane = lane + (MINUS ? -l[n] : l[n]) * r[n];",
        PAIRS + " and float32",
    ),
    Fault(
        "a half not swapped",
        "pairs.cu",
        "load_columns(left + half, other_l);",
        "load_columns(left, other_l);",
        PAIRS + " and float32",
    ),
    Fault(
        "biases added last",
        "pairs.cu",
        "(constants.constant + bias) + weigh(lanes, constants, scales)",
        "constants.constant + (bias + weigh(lanes, constants, scales))",
        PAIRS + " and float32",
    ),
    Fault(
        "the low half of a word in the high number",
        "pairs.cu",
        "high = __uint_as_float(word & 0xffff0000u);",
        "high = __uint_as_float(word);",
        PAIRS + " and bfloat16",
    ),
    Fault(
        "a misaligned load",
        "pairs.cu",
        "own = lane % FP_NATURAL * 16;",
        "own = lane % FP_NATURAL * 8;",
        PAIRS + " and float32",
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
        PAIRS + " and float32",
    ),
    Fault(
        "the next pair of another group",
        "pairs.cu",
        "next = load_pair(left, right, pair + list.round_step, list)",
        "next = load_pair(left, right, pair + 1, list)",
        HELD,
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
        "right_rows + (int)((u32)current.right * (u32)layout.row_bytes)",
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
        PAIRS + " and int8",
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
        "value = (float)-log1p(-t + sqrt(t * (t - 2.0)));",
        "value = -log1pf((float)(-t + sqrt(t * (t - 2.0))));",
        LINKED,
    ),
    Fault(
        "row numbers of 8 bytes read as 4",
        "device.cuh",
        "if (bytes == 4)",
        "if (bytes >= 4)",
        PAIRS + " and float32",
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
        PORTIONS,
    ),
    Fault(
        "a range that loses half its warp",
        "tiles.cu",
        "for (int apart = 16; apart > 0; apart >>= 1) {\n    const u32 low",
        "for (int apart = 8; apart > 0; apart >>= 1) {\n    const u32 low",
        ENDS,
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
        "sums that are not scaled down",
        "attention.cu",
        "        output[i][j] *= before;\n",
        "",
        LOOKUP,
    ),
    Fault(
        "a total that forgets what was before",
        "attention.cu",
        "total[own] = fmaf(total[own], before, sum);",
        "total[own] = sum;",
        LOOKUP,
    ),
    Fault(
        "a greatest score of half a row",
        "attention.cu",
        "for (int apart = 8; apart > 0; apart >>= 1)",
        "for (int apart = 4; apart > 0; apart >>= 1)",
        LOOKUP,
    ),
    Fault(
        "values filled while they are read",
        "attention.cu",
        "      add_products(space + k * PITCH, some, scores);\n      __syncthreads();",
        "      add_products(space + k * PITCH, some, scores);",
        LOOKUP,
    ),
    Fault(
        "values and weights read before they are there",
        "attention.cu",
        "      __syncthreads();\n      add_products(space + k * PITCH, some, scores);",
        "      add_products(space + k * PITCH, some, scores);",
        LOOKUP,
    ),
    Fault(
        "keys past the end that count",
        "attention.cu",
        "if (own_column(j) >= keys || own_column(j)",
        "if (own_column(j)",
        LOOKUP,
    ),
    Fault(
        "a query among its own keys",
        "attention.cu",
        "|| own_column(j) - own_row(i) == itself)",
        ")",
        "test_gpu_lookup.py -k its_own_key",
    ),
    Fault(
        "a span added as it is",
        "attention.cu",
        "fmaf(output, old, outputs[own * lookup.width + column] * scale)",
        "fmaf(output, old, outputs[own * lookup.width + column])",
        LOOKUP,
    ),
    Fault(
        "roots by tiles alone",
        "attention.cu",
        "return !(raw <= -64.0f * slack);",
        "return false;",
        "test_gpu_lookup.py -k root_near and float32",
    ),
    Fault(
        "a tile that may overflow and decides",
        "attention.cu",
        "if (!(slack < -LOWEST)) return true;",
        "",
        "test_gpu_lookup.py -k that_overflow",
    ),
    Fault(
        "the pair kernel of another query",
        "attention.cu",
        "rows.left + (row + i) * layout.row_bytes",
        "rows.left + i * layout.row_bytes",
        "test_gpu_lookup.py -k root_near and float32",
    ),
    Fault(
        "ties that go to the higher column",
        "device.cuh",
        "return (u64)ordered(value) << 32 | (u32)~column;",
        "return (u64)ordered(value) << 32 | column;",
        "test_gpu_matrix.py -k ties_go_to_the_lower_index",
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


def start(fault, output):
    """Run the tests of a fault in a process that writes to a file; return its number."""
    child = os.fork()
    if child:
        return child
    os.environ["HYPOTHESIS_PROFILE"] = "fault"
    gpu.read_source = gpu_tiles.read_source = gpu_attention.read_source = read_with(fault)
    target = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(target, 1)
    os.dup2(target, 2)
    file, words = fault.tests.split(" -k ")
    quiet = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:faulthandler"]
    signal.alarm(MOST_SECONDS)  # a kernel may never end
    os._exit(pytest.main([*quiet, "-k", words, str(TESTS / file)]))


def run_all(faults, jobs, folder):
    """Yield (fault, whether a test failed or the process crashed), as they end.

    What else a process ends with is shown: the tests passed, or could not run.
    """
    waiting, running = list(faults), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            output = Path(folder) / f"{len(waiting)}.txt"
            fault = waiting.pop(0)
            running[start(fault, output)] = fault, output
        child, status = os.wait()
        code = os.waitstatus_to_exitcode(status)
        fault, output = running.pop(child)
        found = code == pytest.ExitCode.TESTS_FAILED or code < 0
        if not found:
            print(f"pytest ended with {code}:\n{output.read_text()[-2000:]}")
        yield fault, found


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("words", nargs="*")
    options = parser.parse_args()
    chosen = [fault for fault in FAULTS if all(word in fault.name for word in options.words)]
    lost = [fault for fault in chosen if not fits(fault)]
    for fault in lost:
        print(f"fits nowhere: {fault.name}")
    started, found = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder  # what is built here is of no use later
        simulated_gpu.compiled_header()
        for fault, failed in run_all([f for f in chosen if f not in lost], options.jobs, folder):
            found += failed
            seconds = time.monotonic() - started
            print(
                f"{seconds:5.0f} s  {'found' if failed else 'NOT FOUND'}: {fault.name}", flush=True
            )
    print(f"{found} of {len(chosen)} faults were found")
    sys.exit(found < len(chosen))


if __name__ == "__main__":
    main()
