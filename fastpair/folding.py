"""Model + embeddings -> table + plan: the only place where the formula meets a row's layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from threading import Lock

import numpy as np

from fastpair.backend import one_blas_thread, run_ordered, thread_count
from fastpair.errors import ArgumentError, DataError
from fastpair.heads import Folded
from fastpair.kernels import LANES, PRECISIONS, SEGMENTS, Plan, RowLayout, aligned_empty
from fastpair.kernels.reference import widen
from fastpair.model import FOLDED_TOGETHER, Model

LARGEST_TERM = 1e37
"""What the terms of a segment may sum to: far enough below the end of float32 for all segments."""

MOST_INT8_COLUMNS = 32_768
"""Columns of one run of an int8 row: more could overflow its 32-bit sums."""


class Folder:
    """Folds blocks of embeddings into rows of one layout.

    Parameters
    ----------
    model : the model to fold.
    columns : number of columns of the embeddings.
    precision : "float32", "float16", "bfloat16" or "int8".
    side : "both"; "left" or "right" in asymmetric models.
    threads : number of threads; default one for each processor.

    Raises
    ------
    ArgumentError : an unknown precision, a model for another number of columns, a side that the
        model does not have.
    """

    def __init__(
        self,
        model: Model,
        columns: int,
        precision: str = "float32",
        *,
        side: str = "both",
        threads: int | None = None,
    ) -> None:
        if precision not in PRECISIONS:
            known = ", ".join(PRECISIONS)
            raise ArgumentError(f"precision is {precision!r}, expected one of {known}")
        model.check_embeddings(columns)
        if model.network is not None and precision != "float32":
            raise ArgumentError(
                f"precision is {precision} but the head {model.heads[0]} is a network, whose table "
                "is float32"
            )
        self.model, self.side = model, side
        self.threads = thread_count(threads)
        probe = model.fold(np.zeros((1, columns)), side)
        shape = _gather(probe)
        self._signs = {name: signs for name, (_, signs) in shape.items()}
        counts = tuple(
            (int((signs > 0).sum()), int((signs < 0).sum()))
            for signs in (self._signs.get(name, np.empty(0)) for name in SEGMENTS)
        )
        has_bias = probe.bias is not None
        if precision == "int8" and max(max(pair) for pair in counts) > MOST_INT8_COLUMNS:
            raise ArgumentError(
                f"precision int8 takes at most {MOST_INT8_COLUMNS} columns of one sign, "
                "the model folds to more: use bfloat16"
            )
        self.plan = Plan(
            layout=RowLayout(counts, has_bias, precision),
            constant=model.constant,
            link=model.link,
            slope=model.slope,
            offset=model.offset,
            network=model.network,
        )
        self._lock = Lock()  # for what threads note together
        self._peaks = np.zeros(len(SEGMENTS))
        self._stored_norm: dict[str, float] = {}
        self._error_norm: dict[str, float] = {}

    @property
    def needs_survey(self) -> bool:
        """Whether every block must be shown to `survey` before the first is folded.

        In int8 tables, all segments but products share one scale a table, set by its greatest
        number.
        """
        return self.plan.precision == "int8" and any(name != "product" for name in self._signs)

    def survey(self, embeddings: np.ndarray) -> None:
        """Take note of the greatest numbers of a block (rows, columns)."""

        def note(_start: int, _stop: int, folded: Folded) -> None:
            for name, (values, _) in _gather(folded).items():
                number, peak = SEGMENTS.index(name), np.abs(values).max(initial=0)
                with self._lock:
                    self._peaks[number] = max(self._peaks[number], peak)

        self._each_piece(embeddings, note)
        self.settle(self._peaks)

    @property
    def peaks(self) -> np.ndarray:
        """The greatest number of each segment that `survey` has seen, (5,)."""
        return self._peaks.copy()

    def settle(self, peaks: np.ndarray) -> None:
        """Take these greatest numbers of segments (5,) for those of all blocks."""
        scales = self._scales(np.asarray(peaks), 0)
        self.plan = self.plan.with_scales(tuple(float(scale) for scale in scales))

    def fold(self, embeddings: np.ndarray, first_row: int = 0) -> np.ndarray:
        """Fold a block of embeddings (rows, columns) into rows of ``plan.layout.dtype`` (rows,).

        A row's bits do not depend on the block that it comes in, nor on the number of threads.

        Raises
        ------
        DataError : a row folds to a number that the precision cannot hold; `first_row` counts it.
        """
        rows = np.zeros(len(embeddings), dtype=self.plan.layout.dtype)

        def store(start: int, stop: int, folded: Folded) -> None:
            piece = rows[start:stop]
            if self.plan.layout.bias and folded.bias is not None:
                bias = self._checked(folded.bias[: len(piece), None], np.float32, first_row + start)
                piece["bias"] = bias[:, 0]
            for name, (values, signs) in _gather(folded).items():
                self._store(piece, name, values[: len(piece)], signs, first_row + start)

        self._each_piece(embeddings, store)
        return rows

    def _each_piece(self, embeddings: np.ndarray, use: Callable[[int, int, Folded], None]) -> None:
        """Fold a block in threads, and let each use (start, stop, folded rows and padding).

        What is used is gone afterwards: the memory of a piece serves the next one too. The error
        of the first piece that has one is raised.
        """
        free: list[np.ndarray] = []

        def fold_piece(start: int) -> None:
            stop = min(start + FOLDED_TOGETHER, len(embeddings))
            try:
                piece = free.pop()
            except IndexError:
                piece = np.empty((FOLDED_TOGETHER, embeddings.shape[1]))
            piece[: stop - start] = embeddings[start:stop]
            piece[stop - start :] = 0
            bad = np.flatnonzero(~np.isfinite(piece).all(axis=1))
            if len(bad):
                raise DataError(f"row {start + bad[0]} of the embeddings holds NaN or infinity")
            use(start, stop, self.model.fold(piece, self.side))
            free.append(piece)

        starts = range(0, len(embeddings), FOLDED_TOGETHER)
        with one_blas_thread():
            for _ in run_ordered(fold_piece, starts, self.threads):
                pass

    def _store(
        self, rows: np.ndarray, name: str, values: np.ndarray, signs: np.ndarray, first_row: int
    ) -> None:
        """Write one segment of some rows: scaled, rounded, positive run first, both padded."""
        precision = self.plan.precision
        flat = values.reshape(len(rows), -1)
        scale: np.ndarray | float = 1.0
        if precision == "int8":
            scale = self.plan.segment_scales[SEGMENTS.index(name)]
            if name == "product":
                peak = np.abs(flat).max(axis=1, initial=0)
                rows["scale"] = self._scales(peak, first_row)
                scale = rows["scale"].astype(np.float64)[:, None]
        stored = self._rounded(flat / scale, first_row)
        self._note_norms(name, flat, widen(stored, precision) * scale)
        # values of mirrored segments are (rows, 2, m): both halves keep the order of the signs
        stored = stored.reshape(values.shape)
        start = 0
        for sign in (1, -1):
            run = stored[..., signs == sign]
            if run.shape[-1] == 0:
                continue
            padded = -(-run.shape[-1] // LANES) * LANES
            for half in run.reshape(len(rows), -1, run.shape[-1]).swapaxes(0, 1):
                rows[name][:, start : start + run.shape[-1]] = half
                start += padded

    def _note_norms(self, name: str, exact: np.ndarray, stored: np.ndarray) -> None:
        """Keep the greatest size of a row and of its rounding error; they bound a score's error."""
        quadratic = name in ("product", "squared")
        for norms, rows in ((self._stored_norm, stored), (self._error_norm, stored - exact)):
            sizes = np.sqrt((rows**2).sum(1)) if quadratic else np.abs(rows).sum(1)
            greatest = float(sizes.max(initial=0))
            if (4 * greatest**2 if quadratic else 4 * greatest) > LARGEST_TERM:
                raise DataError(
                    f"the embeddings are so large (a row of {name} columns of length "
                    f"{greatest:.3g}) that scores would leave the range of float32: scale them down"
                )
            with self._lock:
                norms[name] = max(norms.get(name, 0.0), greatest)

    def _scales(self, peaks: np.ndarray, first_row: int) -> np.ndarray:
        """Return the int8 scales (n,) float32 for the greatest numbers of n rows or segments."""
        scales = self._checked((peaks / 127)[:, None], np.float32, first_row)[:, 0]
        return np.where(scales > 0, scales, np.float32(1))

    def _rounded(self, values: np.ndarray, first_row: int) -> np.ndarray:
        precision = self.plan.precision
        if precision == "int8":
            return np.clip(np.rint(values), -127, 127).astype(np.int8)
        if precision == "bfloat16":
            bits = self._checked(values, np.float32, first_row).view(np.uint32)
            nearest = bits + 0x7FFF + ((bits >> 16) & 1)  # to nearest, ties to even
            return (nearest >> 16).astype(np.uint16)
        return self._checked(values, np.dtype(PRECISIONS[precision]), first_row)

    def _checked(
        self, values: np.ndarray, dtype: np.typing.DTypeLike, first_row: int
    ) -> np.ndarray:
        with np.errstate(over="ignore"):
            rounded = values.astype(dtype)
        bad = ~np.isfinite(rounded).all(axis=1)
        if bad.any():
            row = first_row + int(np.flatnonzero(bad)[0])
            raise DataError(
                f"row {row} folds to a number that {self.plan.precision} cannot hold: "
                "scale the embeddings down or use a precision with a larger range"
            )
        return rounded

    @property
    def norms(self) -> dict[str, tuple[float, float]]:
        """By segment, the greatest size of a row folded so far and of its rounding error."""
        return {name: (size, self._error_norm[name]) for name, size in self._stored_norm.items()}

    def note_norms(self, norms: Mapping[str, Sequence[float]]) -> None:
        """Take notice of `norms` of rows that were folded elsewhere."""
        for name, (size, error) in norms.items():
            self._stored_norm[name] = max(self._stored_norm.get(name, 0.0), size)
            self._error_norm[name] = max(self._error_norm.get(name, 0.0), error)

    def raw_error_bound(self) -> float:
        """Return how far the stored precision can move a raw score, from the rows folded so far.

        With stored rows p + d, p' + d': a product moves by at most |d| |p' + d'| + |p + d| |d'| +
        |d| |d'|, a squared difference (of e - e') by (|d| + |d'|) (2 |e - e'| + |d| + |d'|), and
        maxima and absolute differences by the sum of both rows' errors.
        """
        if self.plan.network is not None:
            return self._network_error_bound()
        bound = 0.0
        for name, error in self._error_norm.items():
            size = self._stored_norm[name]
            if name == "product":
                bound += 2 * error * size + error * error
            elif name == "squared":
                bound += 2 * error * (4 * size + 6 * error)
            else:
                bound += 2 * error
        return bound

    def _network_error_bound(self) -> float:
        """Follow the stored rows' errors through the layers, by the norms of their matrices."""
        network = self.plan.network
        assert network is not None
        error, size = self._error_norm.get("product", 0.0), self._stored_norm.get("product", 0.0)
        moved = 2**0.5 * error
        if network.form == "features":
            moved = ((2 * error * size + error * error) ** 2 + 2 * (2 * error) ** 2) ** 0.5
        direct = 0.0 if network.direct is None else float(np.linalg.norm(network.direct))
        bound = moved * direct
        for matrix, _ in network.layers:
            moved *= float(np.linalg.norm(matrix, 2))
        return bound + moved * float(np.linalg.norm(network.output))


def _gather(folded: Folded) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Concatenate the columns of each segment over the branches of a model."""
    gathered: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for part in folded.segments:
        if len(part.signs) == 0:
            continue
        values, signs = part.values, part.signs
        if part.kind in gathered:
            before, signs_before = gathered[part.kind]
            values = np.concatenate([before, values], axis=-1)
            signs = np.concatenate([signs_before, signs])
        gathered[part.kind] = (values, signs)
    return gathered


def fold(
    model: Model,
    embeddings: np.ndarray,
    precision: str = "float32",
    *,
    side: str = "both",
    threads: int | None = None,
) -> tuple[np.ndarray, Plan]:
    """Fold embeddings that are in memory.

    Parameters
    ----------
    model : a trained model or ``model.builtin(name)``.
    embeddings : (N, n) finite numbers.
    precision : "float32", "float16", "bfloat16" or "int8".
    side : "both"; "left" or "right" in asymmetric models.
    threads : number of threads; default one for each processor.

    Returns
    -------
    rows : (N, row_bytes) uint8 on a 64-byte boundary, as every kernel takes them.
    plan : what is not per entity.
    """
    embeddings = np.asarray(embeddings)
    if embeddings.ndim != 2:
        raise ArgumentError(f"embeddings have shape {embeddings.shape}, expected (rows, columns)")
    folder = Folder(model, embeddings.shape[1], precision, side=side, threads=threads)
    if folder.needs_survey:
        folder.survey(embeddings)
    rows = aligned_empty((len(embeddings), folder.plan.layout.row_bytes), np.uint8)
    rows[:] = folder.fold(embeddings).view(np.uint8).reshape(rows.shape)
    return rows, folder.plan


def common_scales(
    rows: np.ndarray, plan: Plan, scales: tuple[float, ...], out: np.ndarray | None = None
) -> np.ndarray:
    """Return int8 rows rounded again to other segment scales, which must not be smaller.

    Two int8 tables that meet in one run must share the scales of all segments but products.
    `out` may be `rows` itself; by default a new array is made.
    """
    result = aligned_empty(rows.shape, np.uint8) if out is None else out
    for start in range(0, len(rows), FOLDED_TOGETHER):
        block = rows[start : start + FOLDED_TOGETHER].copy()
        records = block.view(plan.layout.dtype)[:, 0]
        for number, name in enumerate(SEGMENTS):
            if name in plan.layout.segment_lengths and name != "product":
                ratio = plan.segment_scales[number] / scales[number]
                records[name] = np.rint(records[name] * ratio).astype(np.int8)
        result[start : start + FOLDED_TOGETHER] = block
    return result
