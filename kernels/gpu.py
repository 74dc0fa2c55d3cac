"""GPUs: what the rest asks of a device, its sources, tables that lie on it, and pairs scored there.

Host code talks to a `Runtime`, whose one real form is `CupyRuntime`; CuPy is imported there and
nowhere else, on use. Tests run the same host code and the same sources on a runtime of their own.
Everything that a runtime does to a stream is asynchronous. Whoever hands an array to a stream, of
the host or of the device, keeps it, and a host array unchanged, until the stream has passed.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from importlib import resources
from typing import Any, Protocol

import numpy as np
import numpy.typing

from fastpair.kernels import LINKS, PRECISIONS, Network, Plan, RowLayout
from fastpair.kernels.gpu_compiler import load_module

BASE_OPTIONS = ("--std=c++17", "--fmad=false", "--ftz=false", "--prec-sqrt=true")
"""What every kernel is compiled with: fused multiply-adds are written out, roots are exact."""

THREADS = 256
"""Threads of a block, of every kernel."""

NETWORK_TILE = 64
"""Pairs, and units, that a block of network.cu works on together."""

_MOST_NETWORK_BLOCKS, _SCRATCH_BYTES = 528, 128 << 20


class OutOfDeviceMemory(Exception):
    """The device has no room for an array; it never leaves the rooms that work with devices."""


# --- the runtime ---------------------------------------------------------------------------------


class Kernel(Protocol):
    """A compiled kernel."""

    def __call__(
        self,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        arguments: tuple[Any, ...],
        stream: Any,
    ) -> None:
        """Launch `grid` blocks of `block` threads in a stream.

        Arguments are device arrays, None (a null pointer), NumPy scalars of the exact type that
        the kernel declares, and structured NumPy arrays of one element, passed by value.
        """


class Runtime(Protocol):
    """What fastpair asks of a device.

    Device arrays know ``shape``, ``dtype``, ``nbytes``, ``len`` and cuts ``[a:b]`` along the first
    axis, which are views; nothing else of them is used. Work on a stream is asynchronous.
    """

    number: int
    name: str
    capability: str
    """Such as "90": what the device can be compiled for."""

    def free_memory(self) -> int:
        """Bytes of the device that `empty` may still give, about."""

    def empty(self, shape: int | tuple[int, ...], dtype: np.typing.DTypeLike) -> Any:
        """Return a contiguous device array, not filled, or raise `OutOfDeviceMemory`."""

    def pinned(self, shape: int | tuple[int, ...], dtype: np.typing.DTypeLike) -> np.ndarray:
        """Return a page-locked array of the host, not filled; only such copies overlap."""

    def stream(self) -> Any:
        """Return a new stream that no other waits for."""

    def upload(self, target: Any, source: np.ndarray, stream: Any) -> None:
        """Copy a contiguous array of the host to a device array of its shape and type."""

    def download(self, target: np.ndarray, source: Any, stream: Any) -> None:
        """Copy a device array to a contiguous array of the host of its shape and type."""

    def fill(self, target: Any, byte: int, stream: Any) -> None:
        """Set all bytes of a device array."""

    def record(self, stream: Any) -> Any:
        """Return an event that happens when the stream has passed this point."""

    def wait(self, stream: Any, event: Any) -> None:
        """Let a stream wait for an event of another."""

    def synchronize(self, stream_or_event: Any) -> None:
        """Let the host wait for all work of a stream so far, or for an event."""

    def kernel(self, source: str, name: str, options: tuple[str, ...]) -> Kernel:
        """Return a kernel of a source, compiled once."""

    def adopt(self, array: Any) -> Any:
        """Return a device array of memory that another library holds on this device, not copied.

        Raises ValueError where it lies on another device or is not contiguous.
        """


class CupyRuntime:
    """A CUDA device, through CuPy.

    Parameters
    ----------
    number : int
        Device number, from 0.
    """

    def __init__(self, number: int = 0) -> None:
        import cupy

        self._cupy, self.number = cupy, number
        properties = cupy.cuda.runtime.getDeviceProperties(number)
        self.name = properties["name"].decode()
        self.capability = f"{properties['major']}{properties['minor']}"
        self._modules: dict[tuple[str, tuple[str, ...]], Any] = {}
        self._kernels: dict[tuple[str, str, tuple[str, ...]], Any] = {}

    def _here(self) -> Any:
        """The device as a context: the current one belongs to the thread."""
        return self._cupy.cuda.Device(self.number)

    def free_memory(self) -> int:
        """See `Runtime`."""
        with self._here() as device:
            kept = self._cupy.get_default_memory_pool().free_bytes()
            return int(device.mem_info[0]) + int(kept)

    def empty(self, shape: int | tuple[int, ...], dtype: np.typing.DTypeLike) -> Any:
        """See `Runtime`."""
        try:
            with self._here():
                return self._cupy.empty(shape, dtype)
        except self._cupy.cuda.memory.OutOfMemoryError as error:
            raise OutOfDeviceMemory(str(error)) from error

    def pinned(self, shape: int | tuple[int, ...], dtype: np.typing.DTypeLike) -> np.ndarray:
        """See `Runtime`."""
        count = int(np.prod(shape, dtype=np.int64))
        # CuPy keeps what is dropped, for arrays of the same size alone: so there are few sizes
        size = 1 << max(0, count * np.dtype(dtype).itemsize - 1).bit_length()
        with self._here():
            memory = self._cupy.cuda.alloc_pinned_memory(size)
        return np.frombuffer(memory, dtype, count).reshape(shape)

    def stream(self) -> Any:
        """See `Runtime`."""
        with self._here():
            return self._cupy.cuda.Stream(non_blocking=True)

    def upload(self, target: Any, source: np.ndarray, stream: Any) -> None:
        """See `Runtime`."""
        kind = self._cupy.cuda.runtime.memcpyHostToDevice
        self._copy(target.data.ptr, source.ctypes.data, target, source, kind, stream)

    def download(self, target: np.ndarray, source: Any, stream: Any) -> None:
        """See `Runtime`."""
        kind = self._cupy.cuda.runtime.memcpyDeviceToHost
        self._copy(target.ctypes.data, source.data.ptr, source, target, kind, stream)

    def _copy(
        self, to: int, start: int, device: Any, host: np.ndarray, kind: int, stream: Any
    ) -> None:
        if (device.shape, device.dtype) != (host.shape, host.dtype) or not host.flags.c_contiguous:
            raise ValueError(f"no copy between {device.shape} and {host.shape}, {host.dtype}")
        with self._here():
            self._cupy.cuda.runtime.memcpyAsync(to, start, host.nbytes, kind, stream.ptr)

    def fill(self, target: Any, byte: int, stream: Any) -> None:
        """See `Runtime`."""
        with self._here():
            target.data.memset_async(byte, target.nbytes, stream)

    def record(self, stream: Any) -> Any:
        """See `Runtime`."""
        with self._here():
            event = self._cupy.cuda.Event(disable_timing=True)
            event.record(stream)
            return event

    def wait(self, stream: Any, event: Any) -> None:
        """See `Runtime`."""
        with self._here():
            stream.wait_event(event)

    def synchronize(self, stream_or_event: Any) -> None:
        """See `Runtime`."""
        with self._here():
            stream_or_event.synchronize()

    def kernel(self, source: str, name: str, options: tuple[str, ...]) -> Kernel:
        """See `Runtime`."""
        key = source, name, options
        if key not in self._kernels:
            with self._here():
                self._kernels[key] = self._module(source, options).get_function(name)
        function = self._kernels[key]

        def launch(
            grid: tuple[int, ...],
            block: tuple[int, ...],
            arguments: tuple[Any, ...],
            stream: Any,
        ) -> None:
            null = np.uint64(0)
            with self._here():
                given = tuple(null if argument is None else argument for argument in arguments)
                function(grid, block, given, stream=stream)

        return launch

    def _module(self, source: str, options: tuple[str, ...]) -> Any:
        key = source, options
        if key not in self._modules:
            self._modules[key] = load_module(self._cupy, source, options, self.capability)
        return self._modules[key]

    def adopt(self, array: Any) -> Any:
        """See `Runtime`."""
        with self._here():
            if hasattr(array, "__cuda_array_interface__"):
                found = self._cupy.asarray(array)
            else:
                found = self._cupy.from_dlpack(array)
            # What fills the array may be under way, and our streams wait for no other; a library
            # may have let the current one wait for its own.
            self._cupy.cuda.get_current_stream().synchronize()
        if found.device.id != self.number:
            raise ValueError(f"an array lies on gpu:{found.device.id}, not on gpu:{self.number}")
        aligned = 16 if found.ndim > 1 else found.dtype.itemsize  # rows are read 16 bytes at a time
        if not found.flags.c_contiguous or found.data.ptr % aligned:
            raise ValueError(
                f"an array {found.shape} on the device is not contiguous, or begins at an odd "
                "address: give a contiguous copy"
            )
        return found


# --- sources -------------------------------------------------------------------------------------


_HEADERS = {
    "pairs.cu": ("pair.cuh",),
    "tiles.cu": ("tile.cuh",),
    "attention.cu": ("pair.cuh", "tile.cuh"),
}
"""What kernel files share beside ``device.cuh``."""


@functools.cache
def read_source(name: str) -> str:
    """Return a kernel source of this package, what it shares with others pasted in front.

    So a device's compiler needs no folder of headers.
    """
    folder = resources.files("fastpair.kernels")
    names = ("device.cuh", *_HEADERS.get(name, ()), name)
    parts = [(part, folder.joinpath(part).read_text("utf-8")) for part in names]
    return "".join(f'#line 1 "{part}"\n{text}\n' for part, text in parts)


# --- plans and tables ----------------------------------------------------------------------------

LAYOUT = np.dtype(
    [("runs", "<i4", 10), ("bias_at", "<i4"), ("scale_at", "<i4"), ("row_bytes", "<i8")],
    align=True,
)
"""The struct `Layout` of device.cuh: vectors of 16 columns in the ten runs, offsets in a row."""

CONSTANTS = np.dtype(
    [("constant", "<f4"), ("slope", "<f4"), ("offset", "<f4"), ("scales", "<f4", 5)], align=True
)
"""The struct `Constants` of device.cuh."""

PAIR_LIST = np.dtype(
    [
        *((name, "<i8") for name in ("count", "group_step", "round_step")),
        *((name, "<i4") for name in ("rounds", "index_bytes")),
    ],
    align=True,
)
"""The struct `PairList` of pairs.cu: a list of pairs, and which of them a group takes."""

NETWORK_SHAPE = np.dtype(
    [
        ("pairs", "<i8"),
        *((name, "<i4") for name in ("columns", "orders", "layers", "direct", "most_units")),
        *((name, "<i4") for name in ("rounds", "index_bytes")),
    ],
    align=True,
)
"""The struct `NetworkShape` of network.cu."""


def pack_plan(plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """Return the structs `LAYOUT` and `CONSTANTS` of a plan, arrays of one element each."""
    layout, constants = np.zeros(1, LAYOUT), np.zeros(1, CONSTANTS)
    *runs, bias_at, scale_at = plan.layout.kernel_arguments()
    layout[0] = (runs, bias_at, scale_at, plan.layout.row_bytes)
    numbers = plan.kernel_constants()
    constants[0] = (*numbers[:3], numbers[3:])
    return layout, constants


class DeviceNetwork:
    """The network of a plan on a device, and room for its hidden units.

    Parameters
    ----------
    runtime, stream : as of `DeviceTable`
    plan : Plan
        A plan with a network: precision float32, link identity.
    """

    def __init__(self, runtime: Runtime, plan: Plan, stream: Any) -> None:
        network = plan.network
        if network is None or plan.precision != "float32" or plan.link != "identity":
            raise ValueError("a network needs float32 columns and the link identity")
        self.runtime, self.network = runtime, network
        inputs = network.layers[0][0].shape[1]
        self.widths = np.array([inputs, *(len(bias) for _, bias in network.layers)], np.int32)
        self.most_units = max(_padded_units(int(width)) for width in self.widths[1:])
        self._host = _pack_weights(network), self.widths  # until the stream has passed
        self.device_weights = runtime.empty(self._host[0].shape, np.float32)
        self.device_widths = runtime.empty(self.widths.shape, np.int32)
        runtime.upload(self.device_weights, self._host[0], stream)
        runtime.upload(self.device_widths, self.widths, stream)
        self._scratch: dict[int, tuple[Any, Any]] = {}

    @property
    def most_blocks(self) -> int:
        """Blocks that may run together, each with its part of the scratch."""
        return max(1, min(_MOST_NETWORK_BLOCKS, _SCRATCH_BYTES // self._block_bytes))

    @property
    def _block_bytes(self) -> int:
        return 2 * 4 * self.most_units * NETWORK_TILE

    def scratch(self, stream: Any) -> Any:
        """Room for the hidden units of all blocks; each stream has its own."""
        if id(stream) not in self._scratch:
            room = self.runtime.empty(self.most_blocks * self._block_bytes // 4, np.float32)
            self._scratch[id(stream)] = room, stream  # the number is its own while it lives
        return self._scratch[id(stream)][0]


def _padded_units(units: int) -> int:
    return -(-units // NETWORK_TILE) * NETWORK_TILE


def _pack_weights(network: Network) -> np.ndarray:
    """Return the network as network.cu reads it: layers, then output and direct."""
    parts = []
    for matrix, bias in network.layers:
        units, inputs = matrix.shape
        layer = np.zeros((1 + inputs, _padded_units(units)), np.float32)
        layer[0, :units], layer[1:, :units] = bias, matrix.T
        parts.append(layer.ravel())
    parts.append(network.output.astype(np.float32))
    if network.direct is not None:
        parts.append(network.direct.astype(np.float32))
    return np.concatenate(parts)


class DeviceTable:
    """Rows of one plan on a device.

    Rows are uint8 arrays (n, row_bytes) of the host, which are uploaded and must stay unchanged
    until `stream` has passed, or arrays that lie on the device already, which are adopted and
    must stay there as long as the table is used.

    Parameters
    ----------
    runtime : Runtime
        The device.
    left_rows, right_rows : arrays (n, row_bytes) uint8
        `right_rows` may be None: pairs are then of one table.
    plan : Plan
        The plan of both.
    stream : a stream of the runtime
        Work on the table in another stream must wait for it.

    Attributes
    ----------
    left, right : device arrays of the rows
    left_count, right_count : int
    plan : Plan
    network : DeviceNetwork, or None

    Raises
    ------
    OutOfDeviceMemory
        The device has no room for the rows.
    ValueError
        Rows are not of the plan's layout, or not what its network takes.
    """

    def __init__(
        self, runtime: Runtime, left_rows: Any, right_rows: Any, plan: Plan, stream: Any
    ) -> None:
        self.runtime, self.plan = runtime, plan
        self.network = None
        if plan.network is not None:
            self.network = DeviceNetwork(runtime, plan, stream)
        self.left = _rows_on_device(runtime, left_rows, plan, stream)
        self.right = self.left
        if right_rows is not None and right_rows is not left_rows:
            self.right = _rows_on_device(runtime, right_rows, plan, stream)

    @property
    def left_count(self) -> int:
        """Left rows."""
        return int(self.left.shape[0])

    @property
    def right_count(self) -> int:
        """Right rows."""
        return int(self.right.shape[0])


def _rows_on_device(runtime: Runtime, rows: Any, plan: Plan, stream: Any) -> Any:
    """Return rows as a device array: uploaded from the host, or adopted."""
    width = plan.layout.row_bytes
    if len(rows.shape) != 2 or rows.shape[1] != width or np.dtype(rows.dtype) != np.uint8:
        raise ValueError(f"rows {rows.shape} {rows.dtype}, expected uint8 (n, {width})")
    if not isinstance(rows, np.ndarray):
        return runtime.adopt(rows)
    if not rows.flags.c_contiguous:
        raise ValueError(f"rows {rows.shape} are not contiguous")
    target = runtime.empty(rows.shape, np.uint8)
    runtime.upload(target, rows, stream)
    return target


# --- pairs ---------------------------------------------------------------------------------------

NATURAL_LANES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 4}
"""Threads of a pair that give the bits of the contract; int8 has them with any number."""

WIDE_LANES = (8, 16, 32)
"""Threads of a pair that may be faster where rows are long; float scores keep to the bound."""

FILLING_THREADS = 1 << 18
"""Threads that keep a large device busy: with more pairs, each group of threads takes several."""

_MOST_ROUNDS, _MOST_ROUNDS_IN_RUNS = 8, 64

NETWORK_OPTIONS = (*BASE_OPTIONS, "-DFP_LINK=0")
"""What network.cu is compiled with; a network has no link."""


def score_pairs(
    runtime: Runtime,
    table: DeviceTable,
    left: Any,
    right: Any,
    scores: Any,
    first_bad: Any,
    stream: Any,
    *,
    lanes: int | None = None,
    runs: bool = False,
) -> None:
    """Fill `scores` for pairs of row numbers, in a stream.

    All arrays are of the device. By default the scores have the bits that a CPU gives them, except
    that the links exponential and negative_arcosh may be one float32 step away: they go through
    float64 functions that differ between libraries.

    Parameters
    ----------
    left, right : (m,) int32 or int64, both the same
        Row numbers.
    scores : (m,) float32
        Filled; NaN where a row number is out of range. No such row is read.
    first_bad : (1,) uint64, all ones before
        Lowered to the least pair of which a row number is out of range.
    lanes : int, optional
        Threads of a pair: that of `NATURAL_LANES` (default), or one of `WIDE_LANES`, whose float
        scores have other bits within the stated bound. Not with a network.
    runs : bool
        The same left row comes many times in a row: it is read less often then. Same bits. Of no
        use to a network.

    Raises
    ------
    ValueError
        Arrays or lanes that cannot be used.
    """
    count, index = _check_pairs(left, right, scores, first_bad)
    counts = np.int64(table.left_count), np.int64(table.right_count)
    arguments = (table.left, table.right, *counts, left, right, scores, first_bad)
    if table.network is not None:
        if lanes is not None:
            raise ValueError(f"lanes {lanes} for a network, which has none; leave them out")
        if count:
            _score_network(runtime, table.plan, table.network, arguments, (count, index), stream)
        return
    options = _pair_options(table.plan, lanes, runs)
    if not count:
        return
    threads = lanes or NATURAL_LANES[table.plan.precision]
    pairs, groups = _share_out(count, threads, index, runs)
    kernel = runtime.kernel(read_source("pairs.cu"), "score_pairs", options)
    grid = (-(-groups * threads // THREADS),)
    kernel(grid, (THREADS,), (*arguments, pairs, *pack_plan(table.plan)), stream)


def _score_network(
    runtime: Runtime,
    plan: Plan,
    network: DeviceNetwork,
    arguments: tuple[Any, ...],
    pairs: tuple[int, int],
    stream: Any,
) -> None:
    """Launch network.cu; `pairs` are how many there are and the bytes of a row number."""
    count, index = pairs
    tiles = -(-count // NETWORK_TILE)
    blocks = min(network.most_blocks, tiles)
    shape = np.zeros(1, NETWORK_SHAPE)
    shape[0] = (
        count,
        network.network.columns,
        network.network.form == "orders",
        len(network.network.layers),
        network.network.direct is not None,
        network.most_units,
        -(-tiles // blocks),
        index,
    )
    scratch = network.scratch(stream)
    given = (*arguments, network.device_weights, network.device_widths, scratch)
    kernel = runtime.kernel(read_source("network.cu"), "score_network", NETWORK_OPTIONS)
    kernel((blocks,), (THREADS,), (*given, shape, *pack_plan(plan)), stream)


def _share_out(count: int, threads: int, index: int, runs: bool) -> tuple[np.ndarray, int]:
    """Return the struct `PAIR_LIST` of a list, and how many groups of threads it takes."""
    most = _MOST_ROUNDS_IN_RUNS if runs else _MOST_ROUNDS
    rounds = max(1, min(most, count * threads // FILLING_THREADS))
    groups = -(-count // rounds)
    pairs = np.zeros(1, PAIR_LIST)
    steps = (rounds, 1) if runs else (1, groups)
    pairs[0] = (count, *steps, rounds, index)
    return pairs, groups


def _check_pairs(left: Any, right: Any, scores: Any, first_bad: Any) -> tuple[int, int]:
    """Return how many pairs there are, and the bytes of a row number."""
    kinds = {np.dtype(array.dtype) for array in (left, right)}
    if kinds not in ({np.dtype(np.int32)}, {np.dtype(np.int64)}):
        raise ValueError(f"row numbers of {kinds}, expected int32 twice or int64 twice")
    if not left.shape == right.shape == scores.shape or len(scores.shape) != 1:
        raise ValueError(f"{left.shape} and {right.shape} row numbers for {scores.shape} scores")
    if np.dtype(scores.dtype) != np.float32 or np.dtype(first_bad.dtype) != np.uint64:
        raise ValueError(f"scores {scores.dtype} and first_bad {first_bad.dtype}")
    return int(scores.shape[0]), np.dtype(left.dtype).itemsize


def _pair_options(plan: Plan, lanes: int | None, runs: bool) -> tuple[str, ...]:
    """Compiler options of the pair kernel."""
    natural = NATURAL_LANES[plan.precision]
    if lanes not in (None, natural, *WIDE_LANES):
        raise ValueError(f"lanes {lanes}, expected {natural} (the default) or one of {WIDE_LANES}")
    products_only = not any(plan.layout.runs[2:])
    return (
        *BASE_OPTIONS,
        f"-DFP_PRECISION={tuple(PRECISIONS).index(plan.precision)}",
        f"-DFP_LANES={lanes or natural}",
        f"-DFP_LINK={plan.link_code}",
        f"-DFP_PRODUCTS_ONLY={int(products_only)}",
        f"-DFP_HOLD={int(products_only and runs)}",
    )


def variants() -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Yield (source, kernel, options) of everything that this file may compile."""
    products = ((16, 0),) + ((0, 0),) * 4
    kinds = [(products, True), (products, False), (((16, 0),) * 5, False)]
    for precision, lanes, link in itertools.product(PRECISIONS, (None, *WIDE_LANES), LINKS):
        for columns, runs in kinds:
            plan = Plan(RowLayout(columns, True, precision), link=link)
            yield "pairs.cu", "score_pairs", _pair_options(plan, lanes, runs)
    yield "network.cu", "score_network", NETWORK_OPTIONS
