"""What people hold their arrays in: NumPy, CuPy, pandas, polars, Arrow and DLPack, all to NumPy.

No library is imported to look at a value: one that a value comes from is there already. Names and
indexes of frames say nothing here: rows go by their place.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastpair.errors import ArgumentError, DataError

ArrayLike = Any
"""NumPy, CuPy, pandas, polars, Arrow, anything with DLPack on the CPU, or nested lists."""


def as_array(value: ArrayLike, name: str) -> np.ndarray:
    """Return a value as a NumPy array, without a copy where its memory can be used as it is.

    Parameters
    ----------
    value : see `ArrayLike`. What is on a GPU is copied here.
    name : what messages call it.

    Raises
    ------
    ArgumentError : the value is none of these, is sparse, or has missing entries.
    """
    if isinstance(value, np.ndarray):
        if np.ma.is_masked(value):
            raise _missing(name)
        return np.asarray(value)  # a memory map or a subclass as what it is
    library = _library(value)
    if library == "scipy" and hasattr(value, "tocsr"):
        raise ArgumentError(f"{name} is sparse ({_type(value)}), expected dense numbers: toarray()")
    if library == "cupy":
        return value.get()
    if library == "pyarrow":
        return _of_arrow(value, name)
    if library == "polars":
        return _of_polars(value, name)
    if library == "pandas":
        return _of_pandas(value, name)
    if hasattr(value, "__array__") or isinstance(value, (list, tuple)) or np.isscalar(value):
        return _of_anything(value, name)
    if hasattr(value, "__dlpack__"):
        return _of_dlpack(value, name)
    raise ArgumentError(
        f"{name} is a {_type(value)}, expected an array of NumPy, CuPy, pandas, polars, Arrow or "
        "anything with DLPack"
    )


def on_device(value: ArrayLike) -> bool:
    """Whether a value's memory is on a GPU."""
    return not isinstance(value, np.ndarray) and hasattr(value, "__cuda_array_interface__")


def as_matrix(value: ArrayLike, name: str) -> np.ndarray:
    """Return embeddings (N, n) as finite float32 or float64, other numbers as float64.

    A frame or table has one column a dimension, or is one column of lists of one length.

    Raises
    ------
    ArgumentError : another shape, or no real numbers.
    DataError : NaN, infinity or a missing entry.
    """
    array = as_array(value, name)
    if array.ndim != 2 or array.shape[1] == 0:
        raise ArgumentError(f"{name} have shape {array.shape}, expected (rows, columns)")
    return as_numbers(array, name)


def as_numbers(array: np.ndarray, name: str) -> np.ndarray:
    """Return an array of any shape as finite float32 or float64."""
    if array.dtype == object:
        array = _of_objects(array, name)
    if array.dtype.kind == "c":
        raise ArgumentError(f"Complex data not supported: {name} are {array.dtype}")
    if array.dtype.kind not in "fiub":
        raise ArgumentError(f"{name} are {array.dtype}, expected real numbers")
    if array.dtype not in (np.float32, np.float64):
        array = array.astype(np.float64)
    if not array.size:
        return array
    rows = array.reshape(len(array), -1)
    step = max(1, (1 << 22) // max(1, rows.shape[1]))
    for start in range(0, len(rows), step):
        finite = np.isfinite(rows[start : start + step]).all(axis=1)
        if not finite.all():
            row = start + int(np.argmin(finite))
            raise DataError(f"row {row} of the {name} holds NaN or infinity")
    return array


def as_row_numbers(value: ArrayLike, name: str, count: int | None = None) -> np.ndarray:
    """Return row numbers of any shape, int32 or int64, from 0 to `count` - 1 (None: unchecked).

    Raises
    ------
    ArgumentError : they are no whole numbers.
    DataError : one is out of range.
    """
    array = as_array(value, name)
    if array.dtype == object:
        array = _of_objects(array, name)
    if array.size == 0 and array.dtype.kind == "f":
        array = array.astype(np.int64)  # what an empty list becomes
    if array.dtype.kind not in "iu":
        raise ArgumentError(f"{name} are {array.dtype}, expected row numbers (integers)")
    if count is not None and array.size:
        least, most = int(array.min()), int(array.max())
        if least < 0 or most >= count:
            wrong = least if least < 0 else most
            raise DataError(f"{name} hold the row number {wrong}, expected 0 to {count - 1}")
    return array if array.dtype in (np.int32, np.int64) else array.astype(np.int64)


def as_columns(value: ArrayLike, name: str) -> tuple[Any, Any]:
    """Return the two columns of pairs: of (M, 2) arrays and frames, or a tuple (left, right).

    Arrays on a GPU stay there.

    Raises
    ------
    ArgumentError : there are not two columns of one length.
    """
    if isinstance(value, tuple) and len(value) == 2 and not np.isscalar(value[0]):
        left, right = value
        if not on_device(left) or not on_device(right):
            left, right = as_array(left, f"left {name}"), as_array(right, f"right {name}")
        shapes = _shape(left), _shape(right)
        if len(shapes[0]) != 1 or shapes[0] != shapes[1]:
            raise ArgumentError(
                f"the two sides of {name} have shapes {shapes[0]} and {shapes[1]}, expected "
                "(M,) twice"
            )
        return left, right
    array = value if on_device(value) else as_array(value, name)
    shape = _shape(array)
    if shape == (0,):
        array, shape = np.empty((0, 2), np.int64), (0, 2)
    if len(shape) != 2 or shape[1] != 2:
        raise ArgumentError(f"{name} have shape {shape}, expected (M, 2), or a tuple (left, right)")
    if on_device(array):  # kernels take contiguous columns alone
        return tuple(_contiguous(array[:, number]) for number in (0, 1))  # type: ignore[return-value]
    return array[:, 0], array[:, 1]


def _shape(array: Any) -> tuple[int, ...]:
    """Return the shape of an array, here or on a GPU."""
    if isinstance(array, np.ndarray):
        return array.shape
    return tuple(array.__cuda_array_interface__["shape"])


def _contiguous(column: Any) -> Any:
    """Copy a column on a GPU there, in the words of PyTorch or of CuPy."""
    return column.contiguous() if hasattr(column, "contiguous") else column.copy()


# --- one library after the other ------------------------------------------------------------------


def _library(value: Any) -> str:
    """Name the library that a value's class comes from, subclasses of others included."""
    known = ("cupy", "pandas", "polars", "pyarrow", "scipy")
    for kind in type(value).__mro__:
        library = kind.__module__.partition(".")[0]
        if library in known:
            return library
    return ""


def _type(value: Any) -> str:
    kind = type(value)
    return f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")


def _of_anything(value: Any, name: str) -> np.ndarray:
    try:
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        words = " ".join(str(error).split())
        raise ArgumentError(f"{name} cannot be read as an array: {words}") from error


def _of_dlpack(value: Any, name: str) -> np.ndarray:
    try:
        return np.from_dlpack(value)
    except (BufferError, RuntimeError, TypeError) as error:
        raise ArgumentError(
            f"{name} is a {_type(value)} that NumPy cannot read ({error}): copy it to the CPU first"
        ) from error


def _missing(name: str) -> DataError:
    return DataError(f"{name} have missing entries: fill or drop them first")


def _of_objects(array: np.ndarray, name: str) -> np.ndarray:
    """Turn an array of objects that are numbers, or lists of one length, into numbers."""
    try:
        if array.ndim == 1 and len(array) and not np.isscalar(array[0]) and array[0] is not None:
            array = np.stack([np.asarray(row) for row in array])
        if array.dtype == object:
            array = array.astype(np.float64)
    except (TypeError, ValueError) as error:
        words = " ".join(str(error).split())
        raise ArgumentError(f"{name} are no numbers: {words}") from error
    return array


def _of_pandas(value: Any, name: str) -> np.ndarray:
    columns = [value] if not hasattr(value, "columns") else [column for _, column in value.items()]
    if columns and all(hasattr(column.dtype, "pyarrow_dtype") for column in columns):
        import pyarrow as pa

        held = [column.array.__arrow_array__() for column in columns]
        if not hasattr(value, "columns"):
            return _of_arrow(held[0], name)
        return _of_arrow(pa.table(held, [str(number) for number in range(len(held))]), name)
    if hasattr(value, "columns"):
        if value.shape[1] == 1 and value.iloc[:, 0].dtype == object:
            return _lists(value.iloc[:, 0].to_numpy(), name)
        without_nan = any(kind.kind not in "fc" for kind in value.dtypes)
        if without_nan and bool(value.isna().to_numpy().any()):
            raise _missing(name)
        if any(hasattr(kind, "numpy_dtype") for kind in value.dtypes):  # pandas' own numbers
            kinds = [getattr(kind, "numpy_dtype", kind) for kind in value.dtypes]
            return value.to_numpy(dtype=np.result_type(*kinds))
        return value.to_numpy()
    if value.dtype == object:
        return _lists(value.to_numpy(), name)
    if bool(value.isna().any()) and value.dtype.kind not in "fc":
        raise _missing(name)
    return value.to_numpy(dtype=getattr(value.dtype, "numpy_dtype", None))


def _lists(column: np.ndarray, name: str) -> np.ndarray:
    """Return a column of lists of one length as a matrix; of anything else, as it is."""
    if len(column) and isinstance(column[0], (list, tuple, np.ndarray)):
        return _of_objects(column, name)
    return column


def _of_polars(value: Any, name: str) -> np.ndarray:
    if hasattr(value, "collect"):
        raise ArgumentError(f"{name} is a lazy frame of polars: collect() it first")
    columns = value.get_columns() if hasattr(value, "get_columns") else [value]
    if any(column.null_count() for column in columns):
        raise _missing(name)
    if len(columns) == 1 and columns[0].dtype.is_nested():
        return _of_arrow(columns[0].to_arrow(), name)
    return value.to_numpy()


def _of_arrow(value: Any, name: str) -> np.ndarray:
    import pyarrow as pa

    if isinstance(value, (pa.Table, pa.RecordBatch)):
        if value.num_columns == 1:
            column = _of_arrow(value.column(0), name)
            return column[:, None] if column.ndim == 1 else column
        columns = [_of_arrow(column, name) for column in value.columns]
        if not columns or any(column.ndim != 1 for column in columns):
            raise ArgumentError(f"{name} mix lists and numbers, or have no column")
        return np.stack(columns, axis=1)
    if isinstance(value, pa.Tensor):
        return value.to_numpy()
    if isinstance(value, pa.ChunkedArray):
        value = value.combine_chunks()
        if isinstance(value, pa.ChunkedArray):  # of no chunk, or of more than fits one
            value = pa.concat_arrays(value.chunks)
    if not isinstance(value, pa.Array):
        raise ArgumentError(f"{name} is a {_type(value)}, expected an Arrow table or array")
    if value.null_count:
        raise _missing(name)
    if pa.types.is_dictionary(value.type):
        value = value.dictionary_decode()
    kind = value.type
    if pa.types.is_fixed_size_list(kind):
        return _of_arrow(value.flatten(), name).reshape(len(value), kind.list_size)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        lengths = set(np.unique(value.value_lengths().to_numpy(zero_copy_only=False)))
        if len(lengths) > 1:
            raise ArgumentError(f"{name} are lists of {len(lengths)} lengths, expected one length")
        width = int(lengths.pop()) if lengths else 0
        return _of_arrow(value.flatten(), name).reshape(len(value), width)
    return value.to_numpy(zero_copy_only=False)


def check_out(out: Any, shape: tuple[int, ...], dtype: Any, name: str = "out") -> np.ndarray:
    """Refuse an array that results of this shape and type cannot be written into.

    Raises
    ------
    ArgumentError : it is no writable NumPy array of this shape and type.
    """
    wanted = np.dtype(dtype)
    found = type(out).__name__
    if isinstance(out, np.ndarray):
        if out.shape == shape and out.dtype == wanted and out.flags.writeable:
            return out
        found = f"{out.dtype} of shape {out.shape}"
        if not out.flags.writeable:
            found += ", read-only"
    raise ArgumentError(
        f"{name} is {found}, expected a writable NumPy array of {wanted} and shape {shape}"
    )
