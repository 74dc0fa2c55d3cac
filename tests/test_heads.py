"""Heads are symmetric, know their own gradient, and fold into the formula of the kernels."""

import inspect
import sys
import textwrap

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fastpair import kernels
from fastpair.cli import commands
from fastpair.errors import ArgumentError, FileError
from fastpair.files import read_model, read_table, write_model
from fastpair.folding import fold
from fastpair.heads import (
    HEADS,
    Folded,
    Head,
    catalogue,
    find_head,
    link_slope,
    parse_heads,
    unit_rows,
)
from fastpair.model import Branch, Model
from fastpair.scoring import PairScorer
from fastpair.towers import Linear

NAMES = [
    *sorted(HEADS),
    "bilinear(rank=2)",
    "rbf(gamma=0.3)",
    "mirrored(hidden=11)",
    "concat(hidden=3)",
    "concat(hidden=6x5)",
    "mlp(hidden=6x5)",
]
ALONE = [name for name in NAMES if find_head(name).stands_alone]
FOLDING = [n for n in NAMES if "mlp" not in n and n != "concat(hidden=6x5)"]
SUMMABLE = [name for name in NAMES if name not in ALONE]
sums = st.one_of(
    st.lists(st.sampled_from(SUMMABLE), min_size=1, max_size=4),
    st.sampled_from(ALONE).map(lambda name: [name]),
)
GIVEN = {"gamma"}  # weights that are not learned


def random_weights(name: str, columns: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    start = find_head(name).initial(columns, rng)
    weights = {key: rng.normal(size=value.shape) for key, value in start.items()}
    return {key: abs(value) if key in GIVEN else value for key, value in weights.items()}


def formula(folded: Folded, i: int, j: int) -> float:
    """Evaluate the formula of `fastpair.kernels` on folded rows i and j, term by term."""
    raw = 0.0 if folded.bias is None else folded.bias[i] + folded.bias[j]
    for columns in folded.segments:
        for k, sign in enumerate(columns.signs):
            a, b = columns.values[i][..., k], columns.values[j][..., k]
            if columns.kind == "product":
                raw += sign * (a * b)
            elif columns.kind == "maximum":
                raw += sign * max(a, b)
            elif columns.kind == "absolute":
                raw += sign * abs(a - b)
            elif columns.kind == "squared":
                raw += sign * (a - b) ** 2
            else:
                raw += sign * (max(a[0], b[1]) + max(a[1], b[0]))
    return float(raw)


@pytest.mark.parametrize("name", NAMES)
def test_forward_is_what_the_name_says(name):
    plain = {
        "cosine": lambda a, b, w: w[0] * (a @ b) / np.sqrt((a @ a) * (b @ b)),
        "dot": lambda a, b, w: w[0] * (a @ b),
        "product": lambda a, b, w: sum(w * a * b),
        "absdiff": lambda a, b, w: sum(w * abs(a - b)),
        "sqdiff": lambda a, b, w: sum(w * (a - b) ** 2),
        "sum": lambda a, b, w: sum(w * (a + b)),
        "max": lambda a, b, w: sum(w * np.where(a > b, a, b)),
        "min": lambda a, b, w: sum(w * np.where(a < b, a, b)),
        "mean-interaction": lambda a, b, w: sum(w * (a * b + a + b) / 2),
        "bilinear": lambda a, b, w: a @ (w + w.T) @ b / 2,
        "bilinear(rank=2)": lambda a, b, f, w: sum(w * (f @ a) * (f @ b)),
        "plda": lambda a, b, own, cross, c: (
            a @ own @ a + b @ own @ b + a @ (cross + cross.T) @ b / 2 + c @ (a + b)
        ),
        "mahalanobis": lambda a, b, w: -np.exp(w[0]) * ((a - b) ** 2).sum(),
        "rbf": lambda a, b, g: np.exp(-np.exp(g[0]) * ((a - b) ** 2).sum()),
        "rbf(gamma=0.3)": lambda a, b, g: np.exp(-g[0] * ((a - b) ** 2).sum()),
        "hyperbolic": lambda a, b, s: -lorentz_distance(np.exp(s) * a, np.exp(s) * b),
        "mirrored": lambda a, b, p, q, c, w: (
            w @ relu(p @ a + q @ b + c) + w @ relu(p @ b + q @ a + c)
        ),
        "concat": lambda a, b, m, c, w: (
            w @ relu(m @ [*a, *b] + c) / 2 + w @ relu(m @ [*b, *a] + c) / 2
        ),
        "concat(hidden=6x5)": lambda a, b, m, c, n, d, w: (
            w @ relu(n @ relu(m @ [*a, *b] + c) + d) / 2
            + w @ relu(n @ relu(m @ [*b, *a] + c) + d) / 2
        ),
        "mlp": lambda a, b, d, m, c, w: (
            d @ [*a * b, *abs(a - b), *a + b] + w @ relu(m @ [*a * b, *abs(a - b), *a + b] + c)
        ),
        "mlp(hidden=6x5)": lambda a, b, d, m, c, n, e, w: (
            d @ [*a * b, *abs(a - b), *a + b]
            + w @ relu(n @ relu(m @ [*a * b, *abs(a - b), *a + b] + c) + e)
        ),
    }
    plain = plain.get(name) or plain[name.split("(")[0]]
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(2, 6, 5))
    weights = random_weights(name, 5, rng)
    head = find_head(name)
    raw, _ = head.forward(left, right, weights)
    expected = [plain(a, b, *weights.values()) for a, b in zip(left, right, strict=True)]
    np.testing.assert_allclose(link_slope(raw, head.link)[0], expected, rtol=1e-11)


def relu(x):
    return np.maximum(x, 0)


def lorentz_distance(a, b):
    return np.arccosh(np.sqrt(1 + a @ a) * np.sqrt(1 + b @ b) - a @ b)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_agree_with_finite_differences(name):
    rng = np.random.default_rng(1)
    head = find_head(name)
    inputs = {"left": rng.normal(size=(7, 4)), "right": rng.normal(size=(7, 4))}
    weights = random_weights(name, 4, rng)
    upstream = rng.normal(size=7)

    def value() -> float:
        return float(upstream @ head.forward(inputs["left"], inputs["right"], weights)[0])

    _, cache = head.forward(inputs["left"], inputs["right"], weights)
    d_left, d_right, d_weights = head.backward(upstream, cache, weights)
    gradients = {"left": d_left, "right": d_right, **d_weights}
    for key, array in {**inputs, **weights}.items():
        if key in GIVEN:
            assert key not in gradients
            continue
        assert gradients[key].shape == array.shape
        for index in np.ndindex(array.shape):
            kept = array[index]
            array[index] = kept + 1e-6
            above = value()
            array[index] = kept - 1e-6
            below = value()
            array[index] = kept
            assert gradients[key][index] == pytest.approx(
                (above - below) / 2e-6, rel=1e-6, abs=1e-7
            )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_swapped_pairs_score_the_same_and_types_are_kept(name, dtype):
    rng = np.random.default_rng(2)
    head = find_head(name)
    left, right = rng.normal(size=(2, 20, 9)).astype(dtype)
    weights = {k: v.astype(dtype) for k, v in random_weights(name, 9, rng).items()}
    raw, cache = head.forward(left, right, weights)
    swapped, _ = head.forward(right, left, weights)
    np.testing.assert_array_equal(raw, swapped)
    d_left, d_right, d_weights = head.backward(raw, cache, weights)
    assert {a.dtype for a in (raw, d_left, d_right, *d_weights.values())} == {np.dtype(dtype)}
    if head.reflexive == "always":
        with pytest.raises(ArgumentError, match="scaled"):
            head.scaled(weights, -2.5)
    else:
        scaled, _ = head.forward(left, right, head.scaled(weights, -2.5))
        np.testing.assert_allclose(scaled, -2.5 * raw, rtol=1e-4, atol=1e-3)


@given(
    name=st.sampled_from(FOLDING),
    z=arrays(np.float64, st.tuples(st.just(3), st.integers(1, 6)), elements=st.floats(-9, 9)),
    seed=st.integers(0, 99),
    zeroed=st.booleans(),
)
def test_fold_equals_forward(name, z, seed, zeroed):
    columns = max(z.shape[1], 2)
    z = np.pad(z, ((0, 0), (0, columns - z.shape[1])))
    weights = random_weights(name, columns, np.random.default_rng(seed))
    if zeroed:
        weights = {
            key: value if key in GIVEN else (value.T * (np.arange(len(value)) % 2)).T
            for key, value in weights.items()
        }
    head = find_head(name)
    folded = head.fold(z, head.compiled(weights))
    for columns in folded.segments:
        assert columns.kind in kernels.SEGMENTS
        assert columns.signs.dtype == np.int8
        both = (2,) if columns.kind == "mirrored" else ()
        assert columns.values.shape == (3, *both, len(columns.signs))
        assert columns.values.dtype == np.float64
    left, right = np.divmod(np.arange(9), 3)
    raw, _ = head.forward(z[left], z[right], weights)
    expected = [formula(folded, i, j) for i, j in zip(left, right, strict=True)]
    np.testing.assert_allclose(raw, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_the_layout_of_a_fold_depends_on_weights_only(name):
    rng = np.random.default_rng(3)
    weights = random_weights(name, 5, rng)
    head = find_head(name)
    weights = head.compiled(weights)
    some, zeros = head.fold(rng.normal(size=(4, 5)), weights), head.fold(np.zeros((2, 5)), weights)
    assert [c.kind for c in some.segments] == [c.kind for c in zeros.segments]
    for one, other in zip(some.segments, zeros.segments, strict=True):
        np.testing.assert_array_equal(one.signs, other.signs)


def test_the_zero_vector_has_cosine_0_with_everything():
    head, weights = find_head("cosine"), {"scale": np.ones(1)}
    zero, other = np.zeros((1, 3)), np.ones((1, 3))
    for left, right in [(zero, other), (other, zero), (zero, zero)]:
        raw, cache = head.forward(left, right, weights)
        assert raw[0] == 0
        assert all(np.isfinite(g).all() for g in head.backward(np.ones(1), cache, weights)[:2])


@pytest.mark.parametrize("size", [1e-300, 1e-30, 1.0, 1e30, 1e300])
def test_rows_of_any_length_become_unit_rows(size):
    rows, inverse = unit_rows(np.array([[3.0, 4.0], [0.0, 0.0]]) * size)
    np.testing.assert_allclose(rows, [[0.6, 0.8], [0, 0]], rtol=1e-15)
    np.testing.assert_allclose(inverse * size, [[0.2], [0]], rtol=1e-15)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_length_too_small_for_an_inverse_gives_a_unit_row_and_a_finite_inverse(dtype):
    smallest = np.finfo(dtype).smallest_subnormal
    rows, inverse = unit_rows(np.array([[0, 3 * smallest], [smallest, 0], [0, 0]], dtype))
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), [1, 1, 0], rtol=1e-6)
    assert np.isfinite(inverse).all()
    assert (inverse[:2] > 0).all()
    assert inverse[2] == 0


@pytest.mark.parametrize("name", NAMES)
def test_wrong_weights_do_not_fit(name):
    head = find_head(name)
    start = head.initial(4, np.random.default_rng(0))
    assert head.fits(start, 4)
    assert not head.fits({}, 4)
    assert not head.fits({key: np.ones((4, 5)) for key in start}, 4)
    assert not head.fits({**start, "more": np.ones(1)}, 4)


def test_gradients_of_links_agree_with_finite_differences():
    raw = -np.random.default_rng(4).exponential(size=20) - 0.01
    for link in kernels.LINKS:
        value, slope = link_slope(raw, link)
        above, below = (link_slope(raw + step, link)[0] for step in (1e-7, -1e-7))
        np.testing.assert_allclose(slope, (above - below) / 2e-7, rtol=1e-5)
        assert {a.dtype for a in link_slope(raw.astype(np.float32), link)} == {np.dtype("f4")}
        at_zero = link_slope(np.array([0.0, 1.0]), link)
        assert all(np.isfinite(part).all() for part in at_zero)
        assert value.shape == raw.shape


def test_hyperbolic_distance_of_an_entity_from_itself_is_0():
    z = np.random.default_rng(5).normal(size=(9, 4)).astype(np.float32) * 100
    head, weights = find_head("hyperbolic"), {"log_scale": np.zeros(1, np.float32)}
    raw, cache = head.forward(z, z, weights)
    assert (raw == 0).all()
    assert all(np.isfinite(g).all() for g in head.backward(np.ones(9, "f4"), cache, weights)[:2])


def test_eigenvalues_that_float32_cannot_see_are_dropped():
    head = find_head("bilinear")
    rng = np.random.default_rng(6)
    basis = rng.normal(size=(8, 3))
    weights = head.compiled({"matrix": basis @ np.diag([1.0, -2, 3]) @ basis.T})
    assert weights["signs"].tolist().count(-1) == 1
    assert weights["columns"].shape == (8, 3)
    assert (
        head.fold(rng.normal(size=(4, 8)), head.compiled({"matrix": np.zeros((8, 8))})).segments
        == []
    )


def test_sums_of_heads_are_read_with_their_options():
    heads = parse_heads("cosine + bilinear(rank=3)+absdiff")
    assert [head.name for head in heads] == ["cosine", "bilinear", "absdiff"]
    assert heads[1].initial(5, np.random.default_rng(0))["factor"].shape == (3, 5)
    for text, message in [
        ("rbf+cosine", "stands alone"),
        ("cosine(rank=3)", "no option 'rank', it has none"),
        ("bilinear(rank)", "name=number"),
        ("rbf(gamma=-1)", "gamma is -1"),
        ("bilinear(rank=9)", "rank is 9"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            parse_heads(text)[0].initial(4, np.random.default_rng(0))


def test_the_catalogue_has_a_line_for_every_head():
    rows = catalogue()
    assert [row["name"] for row in rows] == list(HEADS)
    assert all(row["formula"] and row["kind"] in ("similarity", "distance") for row in rows)


# --- a head of one's own ---


@pytest.fixture
def own_head(tmp_path, monkeypatch):
    """The example in the documentation of `Head`, as a module that can be imported."""
    text = inspect.cleandoc(Head.__doc__).split("A whole one::")[1].split("\nParameters\n")[0]
    (tmp_path / "mine.py").write_text(textwrap.dedent(text))
    monkeypatch.chdir(tmp_path)
    yield "mine:Chord"
    HEADS.pop("mine:Chord", None)
    sys.modules.pop("mine", None)


def test_a_head_of_ones_own_is_imported_by_name_and_folds(own_head):
    (head,) = parse_heads(own_head)
    rng = np.random.default_rng(7)
    z = rng.normal(size=(6, 4))
    weights = {"weight": np.array([-1.5])}
    left, right = np.divmod(np.arange(36), 6)
    folded = head.fold(z, weights)
    expected = [formula(folded, i, j) for i, j in zip(left, right, strict=True)]
    raw, cache = head.forward(z[left], z[right], weights)
    np.testing.assert_allclose(raw, expected)
    model = Model([Branch(own_head, weights, Linear(np.eye(4)))], 4)
    parts = model.to_parts()
    rows, plan = fold(model, z)
    assert Model.from_parts(*parts).fingerprint() == model.fingerprint()
    write_model("m.h5", model)
    np.save("v.npy", z)
    HEADS.pop(own_head)
    with pytest.raises(FileError, match="name its head with --head mine:Chord") as told:
        read_model("m.h5")
    assert "train it again" not in str(told.value)
    arguments = ["project", "m.h5", "v.npy", "-o", "t.h5", "--head", own_head]
    assert CliRunner().invoke(commands, arguments).exit_code == 0
    assert read_table("t.h5").rows.tobytes() == rows.tobytes()
    HEADS.pop(own_head)
    np.testing.assert_allclose(PairScorer(rows, plan)(left, right), raw, atol=1e-5)
    with pytest.raises(FileError, match="name its head with --head mine:Chord"):
        Model.from_parts(*parts)
    assert head.backward(np.ones(36), cache, weights)[2]["weight"].shape == (1,)


@pytest.mark.parametrize(
    ("name", "text"),
    [("nowhere:Head", "cannot be imported"), ("math:sin", "no subclass"), ("math:Sin", "cannot")],
)
def test_what_is_no_head_is_refused(name, text):
    with pytest.raises(ArgumentError, match=text):
        parse_heads(name)


def test_both_orders_of_a_concat_net_have_gradients_of_their_own():
    rng = np.random.default_rng(8)
    head, (left, right) = find_head("concat(hidden=4x3)"), rng.normal(size=(2, 5, 3))
    weights = random_weights("concat(hidden=4x3)", 3, rng)
    one, other, cache = head.orders(left, right, weights)
    np.testing.assert_array_equal(head.orders(right, left, weights)[0], other)
    d_one, d_other = rng.normal(size=(2, 5))
    gradients = head.backward_orders(d_one, d_other, cache, weights)[2]
    for name, array in weights.items():
        for index in np.ndindex(array.shape):
            kept, values = array[index], []
            for step in (1e-6, -1e-6):
                array[index] = kept + step
                first, second, _ = head.orders(left, right, weights)
                values.append(d_one @ first + d_other @ second)
            array[index] = kept
            slope = (values[0] - values[1]) / 2e-6
            assert gradients[name][index] == pytest.approx(slope, rel=1e-5, abs=1e-6)
    assert one.shape == (5,)


@pytest.mark.parametrize("name", ["mirrored", "concat"])
def test_networks_start_near_minus_the_absolute_difference(name):
    rng = np.random.default_rng(9)
    left, right = rng.normal(size=(2, 200, 30))
    raw = find_head(name).forward(left, right, find_head(name).initial(30, rng))[0]
    assert np.corrcoef(raw, -np.abs(left - right).sum(axis=1))[0, 1] > 0.95


@pytest.mark.parametrize("text", ["mlp(hidden=0)", "mirrored(hidden=3x4)", "concat(hidden=2.5)"])
def test_hidden_layers_that_cannot_be_are_refused(text):
    with pytest.raises(ArgumentError, match="hidden"):
        find_head(text).initial(4, np.random.default_rng(0))


def test_an_unknown_head_is_refused_with_the_known_ones():
    with pytest.raises(ArgumentError, match="no head 'cosin': choose from cosine, dot"):
        find_head("cosin")


WRONG = {
    "not symmetric": ("return weights", "return left[:, 0] * weights"),
    "not the gradient": ("[:, None] * sign", "[:, None] * sign * 2"),
    "fold": ("z * np.abs(weights", "2 * z * np.abs(weights"),
    "fails": ("return weights", "return nothing * weights"),
}


@pytest.mark.parametrize("told", WRONG)
def test_a_head_of_ones_own_that_contradicts_itself_is_refused(own_head, tmp_path, told):
    text = (tmp_path / "mine.py").read_text()
    assert WRONG[told][0] in text
    (tmp_path / "mine.py").write_text(text.replace(*WRONG[told]))
    with pytest.raises(ArgumentError, match=told):
        parse_heads(own_head)


def test_the_fold_of_a_row_may_not_depend_on_other_rows(own_head, tmp_path):
    text = (tmp_path / "mine.py").read_text()
    (tmp_path / "mine.py").write_text(text.replace("z * np.abs(w", "(z - z.mean(0)) * np.abs(w"))
    with pytest.raises(ArgumentError, match="fold"):
        parse_heads(own_head)


@pytest.mark.parametrize("base", [head.__name__ for head in HEADS.values()])
def test_a_head_of_ones_own_can_build_on_any_head_of_fastpairs(own_head, tmp_path, base):
    text = f"from fastpair import heads\nclass Chord(heads.{base}):\n    pass\n"
    (tmp_path / "mine.py").write_text(text)
    assert parse_heads(own_head)[0].name == own_head


def test_weights_that_are_not_learned_are_left_as_they_are(own_head, tmp_path):
    text = "from fastpair import heads\nclass Chord(heads.Rbf):\n    options = {'gamma': 0.001}\n"
    (tmp_path / "mine.py").write_text(text)
    assert parse_heads(own_head)[0].settings == {"gamma": 0.001}


@pytest.mark.parametrize(
    "text",
    [
        *("bilinear(rank=8.5)", "bilinear(rank=4x4)", "bilinear(rank=0)", "rbf(gamma=3x3)"),
        *("rbf(gamma=inf)", "rbf(gamma=0)", "mlp(hidden=0)", "mlp(hidden=8.5)"),
    ],
)
def test_options_that_a_head_cannot_have_are_refused(text):
    with pytest.raises(ArgumentError):
        parse_heads(text)


def test_a_head_of_fastpairs_own_is_not_imported_under_another_name():
    with pytest.raises(ArgumentError, match="--head cosine"):
        parse_heads("fastpair.heads:Cosine")
