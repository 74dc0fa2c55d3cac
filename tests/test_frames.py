"""What people hold arrays in: the same bits from each of them."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import fastpair
from fastpair.errors import ArgumentError, DataError
from fastpair.frames import as_array, as_columns, as_matrix, as_row_numbers, on_device

RNG = np.random.default_rng(0)
X = RNG.normal(size=(30, 5)).astype(np.float32)
PAIRS = RNG.integers(0, 30, (80, 2))
NAMES = [f"c{number}" for number in range(5)]


class FakeCupy:
    """What CuPy's arrays show of themselves; their memory is here."""

    __module__ = "cupy"

    def __init__(self, array):
        self.array, self.shape, self.ndim = array, array.shape, array.ndim
        self.__cuda_array_interface__ = array.__array_interface__

    def get(self):
        return self.array

    def copy(self):
        return FakeCupy(self.array.copy())

    def __getitem__(self, index):
        return FakeCupy(self.array[index])

    def __array__(self, *_, **__):
        raise TypeError("Implicit conversion to a NumPy array is not allowed")


class OnlyDlpack:
    """An array of another library that has DLPack and nothing else."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def arrow_table(array):
    return pa.table({f"c{n}": column for n, column in enumerate(array.T)})


def arrow_lists(array):
    flat = pa.array(array.ravel())
    return pa.FixedSizeListArray.from_arrays(flat, array.shape[1])


def pandas_frame(array):
    pandas = pytest.importorskip("pandas")
    # Neither the index nor the names of columns may matter.
    return pandas.DataFrame(array, index=np.arange(len(array))[::-1] + 5).rename(columns=str)


def pandas_nullable(array):
    kinds = {"f": "Float32" if array.dtype == np.float32 else "Float64", "i": "Int64"}
    return pandas_frame(array).astype(kinds[array.dtype.kind])


def pandas_arrow(array):
    pandas = pytest.importorskip("pandas")
    return pandas_frame(array).astype(pandas.ArrowDtype(pa.array(array[:, 0]).type))


def pandas_lists(array):
    pandas = pytest.importorskip("pandas")
    return pandas.DataFrame({"vectors": [row.tolist() for row in array]}, dtype=object)


def pandas_arrow_lists(array):
    pandas = pytest.importorskip("pandas")
    kind = pandas.ArrowDtype(pa.list_(pa.array(array[:, 0]).type, array.shape[1]))
    return pandas.DataFrame({"vectors": pandas.Series(array.tolist(), dtype=kind)})


def pandas_arrow_series(array):
    pandas = pytest.importorskip("pandas")
    return pandas.Series(
        array.tolist(), dtype=pandas.ArrowDtype(wide(array)), index=range(5, 5 + len(array))
    )


def polars_frame(array):
    polars = pytest.importorskip("polars")
    return polars.DataFrame({f"c{n}": column for n, column in enumerate(array.T)})


def polars_lists(array):
    polars = pytest.importorskip("polars")
    return polars.Series("vectors", array.tolist(), dtype=polars.List(kind_of(polars, array)))


def polars_arrays(array):
    polars = pytest.importorskip("polars")
    kind = polars.Array(kind_of(polars, array), array.shape[1])
    return polars.DataFrame({"vectors": polars.Series(array.tolist(), dtype=kind)})


def kind_of(polars, array):
    return polars.Float32 if array.dtype == np.float32 else polars.Int64


HOLDERS = {
    "list": lambda array: array.tolist(),
    "memory map": lambda array: array.view(np.memmap),
    "Fortran order": np.asfortranarray,
    "CuPy": FakeCupy,
    "DLPack": OnlyDlpack,
    "Arrow table": arrow_table,
    "Arrow batch": lambda array: arrow_table(array).to_batches()[0],
    "Arrow chunks": lambda array: pa.concat_tables(
        [arrow_table(array[:7]), arrow_table(array[7:])]
    ),
    "Arrow fixed lists": arrow_lists,
    "Arrow sliced lists": lambda array: arrow_lists(np.vstack([array[:3], array]))[3:],
    "Arrow lists": lambda array: pa.table({"v": pa.array(array.tolist(), wide(array))}),
    "Arrow tensor": pa.Tensor.from_numpy,
    "pandas": pandas_frame,
    "pandas nullable": pandas_nullable,
    "pandas over Arrow": pandas_arrow,
    "pandas lists": pandas_lists,
    "pandas lists over Arrow": pandas_arrow_lists,
    "pandas series of lists over Arrow": pandas_arrow_series,
    "polars": polars_frame,
    "polars lists": polars_lists,
    "polars arrays": polars_arrays,
}


def wide(array):
    return pa.large_list(pa.array(array[:, 0]).type)


@pytest.mark.parametrize("holder", HOLDERS)
def test_every_holder_gives_the_same_bits(holder):
    hold = HOLDERS[holder]
    plain = fastpair.score_pairs(X, PAIRS)
    assert fastpair.score_pairs(hold(X), PAIRS).tobytes() == plain.tobytes()
    assert fastpair.score_pairs(X, hold(PAIRS), device="cpu").tobytes() == plain.tobytes()
    assert fastpair.score_pairs(hold(X), hold(PAIRS), against=hold(X), device="cpu").tobytes() == (
        plain.tobytes()
    )
    best = fastpair.top_k(X, 3)
    for mine, yours in zip(fastpair.top_k(hold(X), 3), best, strict=True):
        assert mine.tobytes() == yours.tobytes()
    assert fastpair.pairwise(hold(X), hold(X)).tobytes() == fastpair.pairwise(X, X).tobytes()
    held = fastpair.lookup(hold(X), hold(X), hold(X))
    assert held.tobytes() == fastpair.lookup(X, X, X).tobytes()
    assert fastpair.fold(hold(X)).rows.tobytes() == fastpair.fold(X).rows.tobytes()
    above = fastpair.above_threshold(hold(X), 0.5, hold(X))
    assert (above != fastpair.above_threshold(X, 0.5, X)).nnz == 0
    np.testing.assert_array_equal(
        fastpair.entity_groups(hold(PAIRS)), fastpair.entity_groups(PAIRS)
    )


@pytest.mark.parametrize("holder", HOLDERS)
def test_the_estimator_learns_the_same_from_every_holder(holder):
    hold = HOLDERS[holder]
    y = np.where(RNG.random(80) < 0.5, 1, -1)
    settings = {"epochs": 1, "arms": "B"}
    rows = X.astype(np.float64) if holder in ("list", "pandas lists") else X
    plain = fastpair.PairSimilarity(preprocessor=rows, **settings).fit(PAIRS, y)
    other = fastpair.PairSimilarity(preprocessor=hold(X), **settings).fit(hold(PAIRS), y)
    assert other.model_.fingerprint() == plain.model_.fingerprint()
    wanted = plain.decision_function(PAIRS).tobytes()
    assert other.decision_function(hold(PAIRS)).tobytes() == wanted
    assert other.transform(hold(X)).tobytes() == plain.transform(X).tobytes()


@pytest.mark.parametrize("holder", ["Arrow table", "Arrow batch", "pandas", "polars"])
def test_one_column_is_one_dimension(holder):
    assert as_matrix(HOLDERS[holder](X[:, :1]), "embeddings").shape == (30, 1)
    assert as_matrix(np.ma.masked_invalid(X[:, :1]), "embeddings").shape == (30, 1)


def test_columns_of_labels_are_taken_too():
    pandas = pytest.importorskip("pandas")
    y = np.where(np.arange(80) % 3, 1, -1)
    wanted = fastpair.PairSimilarity(epochs=1, preprocessor=X).fit(PAIRS, y).model_.fingerprint()
    index = RNG.permutation(80)
    for labels in (pandas.Series(y, index=index), pa.array(y), pa.chunked_array([y[:9], y[9:]])):
        model = fastpair.PairSimilarity(epochs=1, preprocessor=X).fit(PAIRS, labels)
        assert model.model_.fingerprint() == wanted


@given(
    array=arrays(
        st.sampled_from([np.int8, np.uint16, np.int64, np.float16, np.float32, np.float64, bool]),
        st.tuples(st.integers(0, 5), st.integers(1, 4)),
    )
)
@settings(max_examples=60)
def test_numbers_of_every_type_are_embeddings_if_finite(array):
    kind = np.float32 if array.dtype == np.float32 else np.float64
    if np.isfinite(array).all():
        found = as_matrix(array, "embeddings")
        assert found.dtype == kind
        np.testing.assert_array_equal(found, array.astype(kind))
        if array.dtype == kind:
            assert np.shares_memory(found, array) or not array.size
    else:
        row = int(np.argmin(np.isfinite(array).all(axis=1)))
        with pytest.raises(DataError, match=f"row {row} of the embeddings holds NaN or infinity"):
            as_matrix(array, "embeddings")


def lazy_polars():
    return pytest.importorskip("polars").DataFrame({"a": [1.0]}).lazy()


def polars_null():
    return pytest.importorskip("polars").DataFrame({"a": [1.0, None]})


def pandas_null():
    pandas = pytest.importorskip("pandas")
    return pandas.DataFrame({"a": pandas.array([1, None], "Int64")})


def sparse():
    from scipy.sparse import csr_array

    return csr_array(np.eye(3))


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: pa.table({"a": [1.0, None]}), DataError, "missing entries"),
        (lambda: pa.table({"a": [[1.0], None]}), DataError, "missing entries"),
        (lambda: pa.table({"a": [[1.0], [None]]}), DataError, "missing entries"),
        (lambda: pa.table({"a": [[1.0], [1.0, 2.0]]}), ArgumentError, "lists of 2 lengths"),
        (lambda: pa.table({"a": [[1.0]], "b": [2.0]}), ArgumentError, "mix lists and numbers"),
        (lambda: pa.table({"a": ["x", "y"]}), ArgumentError, "no numbers"),
        (lambda: pa.field("a", pa.int8()), ArgumentError, "expected an Arrow table or array"),
        (pandas_null, DataError, "missing entries"),
        (polars_null, DataError, "missing entries"),
        (lazy_polars, ArgumentError, "collect"),
        (lambda: np.ma.masked_equal(np.eye(3), 0), DataError, "missing entries"),
        (sparse, ArgumentError, r"is sparse .* toarray"),
        (lambda: [[1.0], [1.0, 2.0]], ArgumentError, "cannot be read as an array"),
        (lambda: np.array([[1.0], ["x"]], object), ArgumentError, "no numbers"),
        (lambda: {"a": 1}, ArgumentError, "is a dict, expected an array"),
        (lambda: object(), ArgumentError, "expected an array"),
        (lambda: "text", ArgumentError, "expected .rows, columns."),
        (lambda: np.zeros((2, 2), "datetime64[s]"), ArgumentError, "real numbers"),
    ],
)  # fmt: skip
def test_what_is_no_matrix_of_numbers_is_refused_in_one_sentence(make, kind, message):
    with pytest.raises(kind, match=message) as refused:
        as_matrix(make(), "embeddings")
    assert "\n" not in str(refused.value)


def test_an_index_of_a_frame_is_not_taken_for_row_numbers():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(PAIRS, index=PAIRS[:, 0] + 1000, columns=["b", "a"])
    np.testing.assert_array_equal(np.stack(as_columns(frame, "pairs"), axis=1), PAIRS)
    with_key = pandas.DataFrame(X, columns=NAMES).set_index(NAMES[0])
    assert as_matrix(with_key, "embeddings").shape == (30, 4)


def test_what_is_on_a_gpu_stays_there_until_it_is_asked_for():
    left, right = as_columns((FakeCupy(PAIRS[:, 0]), FakeCupy(PAIRS[:, 1])), "pairs")
    assert on_device(left)
    assert on_device(right)
    first, _ = as_columns(FakeCupy(PAIRS), "pairs")
    assert on_device(first)
    assert first.array.flags.c_contiguous
    left, right = as_columns((FakeCupy(PAIRS[:, 0]), PAIRS[:, 1]), "pairs")
    assert not on_device(left)
    np.testing.assert_array_equal(as_row_numbers(FakeCupy(PAIRS), "pairs", 30), PAIRS)
    assert as_array(FakeCupy(X), "X") is X
