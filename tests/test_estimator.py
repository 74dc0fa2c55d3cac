"""PairSimilarity: scikit-learn's conventions, and those of metric-learn for pairs."""

import pickle

import joblib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import mahalanobis
from sklearn.base import TransformerMixin, clone
from sklearn.datasets import load_digits, load_iris
from sklearn.exceptions import NotFittedError
from sklearn.metrics import accuracy_score, fbeta_score, roc_auc_score
from sklearn.model_selection import GridSearchCV, GroupKFold, cross_val_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.estimator_checks import check_estimator, parametrize_with_checks

import fastpair
from fastpair.calibration import STRATEGIES, best_cut
from fastpair.errors import ArgumentError, DataError, FastpairError
from fastpair.estimator import PairSimilarity
from fastpair.files import read_model, write_model
from fastpair.frames import as_array
from fastpair.heads import find_head
from fastpair.jobs import project, score
from fastpair.metric import METRIC_HEADS
from fastpair.model import Branch, Model, fit_preparation
from fastpair.towers import Linear

# --- scikit-learn's own checks --------------------------------------------------------------------


class Mirrored(TransformerMixin, PairSimilarity):
    """Takes points (n, d) where pairs are expected: each is paired with itself reversed.

    scikit-learn's checks feed points, and skip estimators that take pairs alone. The labels of the
    checks say nothing about such pairs, hence the tag.
    """

    def _sides(self, pairs, columns=None):
        array = as_array(pairs, "X")
        if array.ndim == 2:
            array = np.stack([array, array[:, ::-1]], axis=1)
        return super()._sides(array, columns)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = True
        tags.classifier_tags.poor_score = True
        return tags


class AtEvenOdds(Mirrored):
    """Predicts by whether the score is above 0, as scikit-learn has it."""

    def fit(self, pairs, y=None, sample_weight=None):
        return super().fit(pairs, y, sample_weight).set_threshold(np.nextafter(0, 1))


EXPECTED = {
    "check_sample_weight_equivalence_on_dense_data": (
        "learning goes through random batches of pairs and sets random pairs aside, both of which "
        "change with their number; no solver of a closed form is at work"
    ),
    "check_dtype_object": (
        "a dict among the numbers is refused as an ArgumentError, a ValueError as all errors of "
        "arguments here, where the check wants a TypeError"
    ),
    "check_estimators_empty_data_messages": (
        "pairs without features are refused with their own shape (n, 2, 0), where the check wants "
        "the shape (n, 0) of points in the message"
    ),
    "check_classifiers_classes": (
        "labels of text are refused: the greater of two numbers says similar, and of two words "
        "nobody knows which does"
    ),
    "check_classifiers_train": (
        "predict compares scores with threshold_, chosen on validation pairs, as metric-learn has "
        "it, where the check wants 0; with a threshold of 0 it passes"
    ),
}
SKIPPED = {"check_array_api_input"}  # scikit-learn leaves it out by itself without SCIPY_ARRAY_API


def reasons(estimator):
    rest = dict(EXPECTED)
    if isinstance(estimator, AtEvenOdds):
        del rest["check_classifiers_train"]
    return rest


@parametrize_with_checks(
    [Mirrored(epochs=1, arms="B"), AtEvenOdds("mahalanobis", epochs=1, arms="D")],
    expected_failed_checks=reasons,
    xfail_strict=True,
)
def test_scikit_learns_checks_pass_but_for_reasons(estimator, check):
    check(estimator)


def test_pairs_alone_are_what_the_tags_say():
    with pytest.warns(Warning, match="three_d_array=True"):
        assert check_estimator(PairSimilarity()) != []  # cloning; the others need points
    tags = PairSimilarity().__sklearn_tags__()
    assert (tags.estimator_type, tags.classifier_tags.multi_class) == ("classifier", False)
    graded = PairSimilarity(graded=True).__sklearn_tags__()
    assert (graded.estimator_type, graded.classifier_tags) == ("regressor", None)


# --- learning -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    """Embeddings, pairs of row numbers and labels, to learn from and to test."""
    X, kind = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    halves = np.array_split(rng.permutation(len(X)), 2)
    parts = []
    for half, count in zip(halves, (500, 400), strict=True):
        pairs = rng.choice(half, (count, 2))
        same = np.flatnonzero(rng.random(count) < 0.4)
        for row in same:
            pairs[row, 1] = rng.choice(half[kind[half] == kind[pairs[row, 0]]])
        parts.append((pairs, np.where(kind[pairs[:, 0]] == kind[pairs[:, 1]], 1, -1)))
    return X, *parts


def quick(head="mahalanobis", **settings):
    return PairSimilarity(head, **{"epochs": 3, "arms": "B", **settings})


@pytest.fixture(scope="module")
def fitted(digits):
    X, (pairs, y), _ = digits
    return quick(dim=16, preprocessor=X, epochs=12).fit(pairs, y)


def test_what_it_learns_helps_on_other_entities(digits, fitted):
    X, _, (pairs, y) = digits
    plain = roc_auc_score(y, fastpair.score_pairs(X, pairs))
    assert fitted.score(pairs, y) > plain + 0.03


@pytest.mark.parametrize("head", ["mahalanobis", "cosine+absdiff"])
def test_row_numbers_and_embeddings_give_the_same_bits(digits, head):
    X, (pairs, y), (others, _) = digits
    by_number = quick(head, preprocessor=X).fit(pairs, y)
    by_value = quick(head).fit(X[pairs], y)
    by_name = quick(head, preprocessor=lambda names: X[[int(n[3:]) for n in names]])
    names = np.char.add("img", pairs.astype(str))
    by_name.fit(names, y)
    assert by_number.model_.fingerprint() == by_value.model_.fingerprint()
    assert by_number.model_.fingerprint() == by_name.model_.fingerprint()
    scores = by_number.decision_function(others)
    assert scores.tobytes() == by_value.decision_function(X[others]).tobytes()
    assert scores.tobytes() == by_number.decision_function(X[others]).tobytes()
    other_names = np.char.add("img", others.astype(str))
    assert scores.tobytes() == by_name.decision_function(other_names).tobytes()
    assert (
        by_number.transform(others[:, 0]).tobytes() == by_value.transform(X[others[:, 0]]).tobytes()
    )


@pytest.mark.parametrize("head", ["mahalanobis", "cosine+absdiff", "mlp"])
def test_swapped_pairs_have_the_same_bits(digits, head):
    X, (pairs, y), (others, _) = digits
    model = quick(head, epochs=1).fit(X[pairs], y)
    assert model.pair_score(X[others]).tobytes() == model.pair_score(X[others[:, ::-1]]).tobytes()
    if head == "mahalanobis":
        distances = model.pair_distance(X[others])
        assert distances.tobytes() == model.pair_distance(X[others[:, ::-1]]).tobytes()


@pytest.mark.parametrize("labels", [(-1, 1), (0, 1), (False, True), (1.0, 2.0)])
def test_labels_come_back_as_they_were(digits, labels):
    X, (pairs, y), (others, _) = digits
    own = np.array(labels)[(y > 0).astype(int)]
    model = quick(preprocessor=X, epochs=1).fit(pairs, own)
    np.testing.assert_array_equal(model.classes_, labels)
    found = model.predict(others)
    assert found.dtype == own.dtype
    np.testing.assert_array_equal(found == labels[1], model.pair_score(others) >= model.threshold_)
    probability = model.predict_proba(others)
    np.testing.assert_allclose(probability.sum(axis=1), 1)
    assert ((probability[:, 1] > 0.5) == (model.pair_score(others) > 0)).all()
    assert model.score(others, np.array(labels)[(found == labels[1]).astype(int)]) == 1.0


def test_grades_are_predicted(digits):
    X, (pairs, _), (others, _) = digits
    truth = [-np.linalg.norm((X[p[:, 0]] - X[p[:, 1]])[:, :20], axis=1) for p in (pairs, others)]
    model = quick("sqdiff", graded=True, preprocessor=X).fit(pairs, truth[0])
    assert model.score(others, truth[1]) > 0.6
    assert abs(np.mean(model.predict(others) - truth[1])) < 2
    assert not hasattr(model, "threshold_")
    model.set_params(graded=False).fit(pairs, np.arange(len(pairs)) % 2)
    assert hasattr(model, "classes_")
    model.set_params(graded=True).fit(pairs, truth[0])
    assert not hasattr(model, "classes_")
    for refused in (
        lambda: model.predict_proba(others),
        lambda: model.set_threshold(1),
        lambda: model.calibrate_threshold(others, truth[1]),
        lambda: model.score(others, truth[1], sample_weight=truth[1]),
        lambda: model.fit(pairs, truth[0], calibration_params={}),
    ):
        with pytest.raises(ArgumentError, match=r"grades|Spearman"):
            refused()


def test_good_pairs_alone_are_enough_for_the_loss_sampled(digits):
    X, (pairs, y), (others, truth) = digits
    model = quick("cosine", loss="sampled", preprocessor=X).fit(pairs[y > 0], y[y > 0])
    np.testing.assert_array_equal(model.classes_, [-1, 1])
    assert model.score(others, truth) > 0.8


def test_a_threshold_that_cannot_be_chosen_is_refused_before_training(digits, monkeypatch):
    X, (pairs, y), _ = digits
    monkeypatch.setattr("fastpair.estimator.train", None)
    for params, words in (
        ({"strategy": "none"}, "strategy is 'none'"),
        ({"strategy": "max_tpr"}, "min_rate is None"),
        ({"strategy": "f_beta", "beta": -1.0}, "beta is -1.0"),
    ):
        with pytest.raises(ArgumentError, match=words):
            quick(preprocessor=X).fit(pairs, y, calibration_params=params)
    one = quick("cosine", loss="sampled", preprocessor=X)
    with pytest.raises(DataError, match="one class alone"):
        one.fit(pairs[y > 0], y[y > 0], calibration_params={})


def test_a_refit_that_fails_changes_nothing(digits):
    X, (pairs, y), (others, truth) = digits
    model = quick(preprocessor=X, epochs=1).fit(pairs, y)
    before = model.predict(others)
    with pytest.raises(FastpairError):
        model.set_params(batch=1).fit(pairs, np.where(y > 0, 20, 10))
    np.testing.assert_array_equal(model.classes_, [-1, 1])
    np.testing.assert_array_equal(model.predict(others), before)
    model.set_params(batch=64)
    model.fit(
        pairs, np.where(y > 0, 20, 10), pairs_valid=others, y_valid=np.where(truth > 0, 20, 10)
    )
    np.testing.assert_array_equal(model.classes_, [10, 20])


def test_every_parameter_reaches_training(digits):
    """Each one is refused by training when it is wrong, or changes what is learned."""
    X, (pairs, y), (others, _) = digits
    wrong = {
        "head": "none",
        "dim": 0,
        "tower": "none",
        "start": "none",
        "loss": "none",
        "preparation": "full",
        "dropout": 2.0,
        "learning_rate": -1.0,
        "pull": -1.0,
        "epochs": 0,
        "arms": "Z",
        "batch": 1,
        "reflexive": -1.0,
        "transitive": -1.0,
        "consistency": 1.0,
        "calibrate": "none",
        "threshold_by": "none",
        "prior": 2.0,
        "threads": 0,
        "random_state": -1,
        "preprocessor": X[0],
    }
    changed = {"density": False, "balance": True, "close_positives": True, "graded": True}
    assert set(wrong) | set(changed) == set(PairSimilarity().get_params())
    for name, value in wrong.items():
        with pytest.raises((FastpairError, ValueError)):
            PairSimilarity(**{"preprocessor": X, name: value}).fit(pairs, y)
    # Fingerprints would differ by what is noted alone: scores are what was learned.
    plain = quick("cosine", preprocessor=X, epochs=1).fit(pairs, y).pair_score(others)
    for name, value in changed.items():
        other = quick("cosine", preprocessor=X, epochs=1, **{name: value}).fit(pairs, y)
        assert not np.array_equal(other.pair_score(others), plain), name


def test_equal_seeds_give_equal_models_for_any_number_of_threads(digits):
    X, (pairs, y), (others, _) = digits
    one, two, other = (
        quick("cosine+absdiff", preprocessor=X, epochs=1, random_state=seed, threads=threads).fit(
            pairs, y
        )
        for seed, threads in ((3, 1), (3, 2), (np.random.RandomState(5), 1))
    )
    assert one.model_.fingerprint() == two.model_.fingerprint()
    assert one.pair_score(others).tobytes() == two.pair_score(others).tobytes()
    assert one.pair_score(others).tobytes() != other.pair_score(others).tobytes()


def test_validation_pairs_and_weights_are_used(digits):
    X, (pairs, y), (others, truth) = digits
    model = quick(preprocessor=X, epochs=1)
    held = clone(model).fit(pairs, y, pairs_valid=others, y_valid=truth)
    assert "400 validation pairs, given apart" in held.notes_
    weighed = clone(model).fit(pairs, y, np.where(y > 0, 5.0, 1.0))
    assert weighed.model_.fingerprint() != clone(model).fit(pairs, y).model_.fingerprint()
    for weights in (-np.ones(len(y)), np.arange(len(y)) - 3.0):
        with pytest.raises(DataError, match=r"sample_weight 0 is -\d, expected 0 or more"):
            model.fit(pairs, y, weights)
    with pytest.raises(ArgumentError, match="go together"):
        model.fit(pairs, y, pairs_valid=others)
    with pytest.raises(DataError, match="the label 3, expected -1 or 1"):
        model.fit(pairs, y, pairs_valid=others, y_valid=truth + 2)


# --- what people pass by mistake ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pairs", "y", "message"),
    [
        (np.ones((9, 4)), np.ones(9), r"shape \(9, 4\), expected \(n, 2, d\)"),
        (np.ones((9, 3, 4)), np.ones(9), r"\(9, 3, 4\), expected .* triplet, \(a, b\)"),
        (np.ones((9, 2)), np.ones(9), "with a preprocessor"),
        (np.ones((0, 2, 4)), np.ones(0), r"0 sample\(s\)"),
        (np.full((9, 2, 4), np.nan), np.arange(9) % 2, "row 0 of the pairs holds NaN"),
        (np.ones((9, 2, 4)), np.ones(9), "one class alone"),
        (np.ones((9, 2, 4)), np.arange(9), "Only binary .* say graded=True"),
        (np.ones((9, 2, 4)), np.array([*"ababababa"]), "expected numbers"),
        (np.ones((9, 2, 4)), np.ones(8), "inconsistent numbers of samples"),
        (np.ones((9, 2, 4)), None, "requires y to be passed"),
        (np.array([[["a"] * 4] * 2] * 9), np.arange(9) % 2, "expected real numbers"),
    ],
)
def test_pairs_and_labels_that_cannot_be_learned_from_are_refused(pairs, y, message):
    with pytest.raises(ValueError, match=message):
        PairSimilarity().fit(pairs, y)


def test_row_numbers_are_checked(digits, fitted):
    X, (pairs, y), _ = digits
    for bad in (len(X), -1):
        with pytest.raises(DataError, match=f"row number {bad}, expected 0 to {len(X) - 1}"):
            quick(preprocessor=X).fit(np.where(pairs == pairs[3, 1], bad, pairs), y)
        with pytest.raises(DataError, match=f"row number {bad}"):
            fitted.predict([[0, bad]])
    with pytest.raises(ArgumentError, match="float64, expected row numbers"):
        quick(preprocessor=X).fit(pairs + 0.5, y)
    with pytest.raises(ArgumentError, match="X are float64, expected row numbers"):
        fitted.transform(X[0])
    for shape in ((), (64,)):
        with pytest.raises(ArgumentError, match="preprocessor has shape"):
            quick(preprocessor=np.ones(shape)).fit(pairs, y)
    with pytest.raises(ArgumentError, match="returned 1 rows for 500 indicators"):
        quick(preprocessor=lambda rows: X[:1]).fit(pairs, y)
    with pytest.raises(ArgumentError, match="X has 3 features, but PairSimilarity is expecting 64"):
        fitted.predict(np.ones((2, 2, 3)))
    with pytest.raises(ArgumentError, match="X has 3 features"):
        fitted.transform(np.ones((2, 3)))


def test_nothing_works_before_fit(digits):
    X, _, (pairs, y) = digits
    model = PairSimilarity(preprocessor=X)
    for call in (
        lambda: model.predict(pairs),
        lambda: model.predict_proba(pairs),
        lambda: model.pair_score(pairs),
        lambda: model.pair_distance(pairs),
        lambda: model.transform(X),
        lambda: model.score(pairs, y),
        lambda: model.set_threshold(1),
        lambda: model.calibrate_threshold(pairs, y),
        lambda: model.get_metric(),
        lambda: model.get_mahalanobis_matrix(),
    ):
        with pytest.raises(NotFittedError):
            call()
    assert not hasattr(model, "components_")
    assert not hasattr(model, "threshold_")


# --- parameters, copies, pickles ------------------------------------------------------------------


def test_parameters_are_got_set_and_cloned(digits):
    X, (pairs, y), _ = digits
    model = quick(dim=3, preprocessor=X)
    assert clone(model).get_params().keys() == model.get_params().keys()
    assert clone(model).dim == 3
    assert model.set_params(dim=4) is model
    assert model.fit(pairs, y).transform(X).shape == (len(X), 4)
    with pytest.raises(ValueError, match="Invalid parameter"):
        model.set_params(dims=4)


@pytest.mark.parametrize("head", ["mahalanobis", "cosine+absdiff", "mlp", "rbf"])
@pytest.mark.parametrize("way", ["pickle", "joblib"])
def test_a_pickle_has_the_same_bits(digits, head, way, tmp_path):
    X, (pairs, y), (others, _) = digits
    model = quick(head, preprocessor=X, calibrate="isotonic", epochs=1).fit(pairs, y)
    if way == "pickle":
        again = pickle.loads(pickle.dumps(model))
    else:
        joblib.dump(model, tmp_path / "model")
        again = joblib.load(tmp_path / "model")
    assert again.model_.fingerprint() == model.model_.fingerprint()
    assert again.model_.record == model.model_.record != {}
    for name in ("decision_function", "predict", "predict_proba"):
        assert getattr(again, name)(others).tobytes() == getattr(model, name)(others).tobytes()
    state = model.__getstate__()["model_"]
    assert isinstance(state[0], str)
    assert all(isinstance(array, np.ndarray) for array in state[1].values())


def test_results_are_those_of_the_command_line(digits, fitted, tmp_path):
    X, _, (pairs, _) = digits
    np.save(tmp_path / "x.npy", X)
    np.save(tmp_path / "pairs.npy", pairs)
    fitted.set_threshold(0.5)
    write_model(tmp_path / "model.h5", fitted.model_)
    project(tmp_path / "model.h5", tmp_path / "x.npy", tmp_path / "table.h5")
    import h5py

    for form, expected in (
        ("", fitted.pair_score(pairs)),
        ("decision", (fitted.predict(pairs) > 0).astype(np.float32)),
        ("probability", fitted.predict_proba(pairs)[:, 1].astype(np.float32)),
    ):
        out = tmp_path / f"scores{form}.h5"
        options = {form: True} if form else {}
        score(tmp_path / "table.h5", tmp_path / "pairs.npy", out, **options)
        with h5py.File(out) as file:
            assert file["score"][:].tobytes() == expected.tobytes()
    again = read_model(tmp_path / "model.h5")
    scores = fastpair.score_pairs(X, pairs, model=again)
    assert scores.tobytes() == fitted.pair_score(pairs).tobytes()


# --- metrics --------------------------------------------------------------------------------------


def test_a_mahalanobis_metric_is_one_of_embeddings_as_they_are(digits, fitted):
    X, _, (pairs, _) = digits
    distances = fitted.pair_distance(pairs)
    M, L = fitted.get_mahalanobis_matrix(), fitted.components_
    assert L.shape == (16, 64)
    np.testing.assert_allclose(L.T @ L, M)
    by_scipy = [mahalanobis(X[i], X[j], M) for i, j in pairs[:50]]
    np.testing.assert_allclose(distances[:50], by_scipy, rtol=1e-9)
    points = fitted.transform(X)
    np.testing.assert_allclose(points, X @ L.T)
    apart = np.linalg.norm(points[pairs[:, 0]] - points[pairs[:, 1]], axis=1)
    np.testing.assert_allclose(distances, apart)
    metric = fitted.get_metric()
    assert metric(X[3], X[8]) == pytest.approx(fitted.pair_distance([[3, 8]])[0])
    assert metric(X[3].tolist(), X[8].tolist(), squared=True) == pytest.approx(
        metric(X[8], X[3]) ** 2
    )
    assert metric(X[3], X[3]) == 0.0
    written = fastpair.score_pairs(X, pairs, model=fitted, unit="distance")
    np.testing.assert_allclose(written, distances, rtol=1e-4, atol=1e-3)
    order = np.argsort(distances)
    assert (np.diff(fitted.pair_score(pairs)[order]) <= 1e-5).all()


def metric_model(head, preparation, X):
    """An estimator with some model of this head in it."""
    rng = np.random.default_rng(3)
    own = find_head(head)
    weights = {name: -abs(value) for name, value in own.initial(9, rng).items()}
    branch = Branch(head, weights, Linear(0.1 * rng.normal(size=(9, 64))))
    after = {"slope": 0.7, "offset": 0.3} if own.link != "identity" else {"constant": 1.2}
    prepared = fit_preparation(X, preparation)
    estimator = PairSimilarity(head, preprocessor=X)
    estimator.model_ = Model(
        [branch], 64, prepared, link=own.link, unit="log-odds", threshold=0.0, **after
    )
    estimator.n_features_in_, estimator.classes_ = 64, np.array([-1, 1])
    return estimator


@pytest.mark.parametrize("head", METRIC_HEADS)
@pytest.mark.parametrize("preparation", ["scaling", "half-whitening"])
def test_metric_heads_have_distances_that_keep_the_triangle(digits, head, preparation):
    X = digits[0]
    model = metric_model(head, preparation, X)
    rows = np.arange(40)
    every = np.stack(np.meshgrid(rows, rows, indexing="ij"), axis=-1).reshape(-1, 2)
    d = model.pair_distance(every).reshape(40, 40)
    assert (d == d.T).all()
    assert (np.diag(d) == 0).all()
    assert (d[0, 1:] > 0).all()
    assert (d[:, None, :] <= d[:, :, None] + d[None, :, :] + 1e-9).all()
    assert model.get_metric()(X[3], X[7]) == pytest.approx(d[3, 7])
    threshold = float(np.median(d))
    model.set_threshold(threshold, unit="distance")
    far = np.abs(d.reshape(-1) - threshold) > 1e-4
    assert ((model.predict(every) == 1) == (d.reshape(-1) <= threshold))[far].all()
    linear = head in ("mahalanobis", "sqdiff", "rbf") and preparation == "scaling"
    assert hasattr(model, "components_") == linear
    if not linear:
        with pytest.raises(ArgumentError, match="not Mahalanobis over embeddings as they come"):
            model.get_mahalanobis_matrix()
    if head != "rbf":  # whose distance form is 1 - exp(-d^2)
        written = fastpair.score_pairs(X, every, model=model, unit="distance")
        np.testing.assert_allclose(written, d.reshape(-1), rtol=1e-3, atol=3e-3)


@pytest.mark.parametrize("head", ["sqdiff", "absdiff"])
def test_a_difference_with_a_weight_above_0_is_no_metric(digits, head):
    model = metric_model(head, "scaling", digits[0])
    model.model_.branches[0].weights["weight"][2] = 0.1
    with pytest.raises(ArgumentError, match="learned weights above 0"):
        model.pair_distance([[0, 1]])


def test_heads_without_a_metric_say_so(digits):
    X, (pairs, y), _ = digits
    model = quick("cosine", preprocessor=X, epochs=1).fit(pairs, y)
    for call in (
        model.get_metric,
        model.get_mahalanobis_matrix,
        lambda: model.pair_distance(pairs),
    ):
        with pytest.raises(ArgumentError, match=r"cosine are no metric.*mahalanobis always learns"):
            call()
    with pytest.raises(AttributeError, match="no metric"):
        _ = model.components_
    length = np.linalg.norm(model.transform(X), axis=1)
    np.testing.assert_allclose(length, 1)
    dense = quick("sqdiff", preprocessor=X, epochs=1).fit(pairs, y)
    if dense.model_.density is not None:
        with pytest.raises(ArgumentError, match="density in it"):
            dense.get_metric()


def test_a_metric_outlives_its_estimator(digits):
    X, (pairs, y), _ = digits
    model = quick(preprocessor=X, epochs=1).fit(pairs, y)
    metric = model.get_metric()
    before = metric(X[0], X[1])
    model.set_params(epochs=3).fit(pairs, y)
    assert metric(X[0], X[1]) == before != model.get_metric()(X[0], X[1])
    assert pickle.loads(pickle.dumps(metric))(X[0], X[1]) == before


@pytest.mark.parametrize("count", [2, 6, 29])
def test_few_pairs_still_give_a_metric(count):
    rng = np.random.default_rng(count)
    pairs = rng.normal(size=(count, 2, 3))
    y = np.where(np.arange(count) % 2, 1, -1)
    model = PairSimilarity("mahalanobis").fit(pairs, y)
    assert "only calibration and threshold of the plain distance" in model.notes_[0]
    L = model.components_
    np.testing.assert_allclose(L, np.eye(3) * L[0, 0], atol=1e-12)
    np.testing.assert_allclose(
        model.pair_distance(pairs), L[0, 0] * np.linalg.norm(pairs[:, 0] - pairs[:, 1], axis=1)
    )


# --- thresholds -----------------------------------------------------------------------------------


def all_cuts(scores, labels):
    """Every threshold that takes other pairs, from none to all, highest first."""
    values = np.unique(scores)[::-1]
    return [np.inf, *values]


@settings(max_examples=60)
@given(
    scores=st.lists(st.integers(-3, 3).map(float), min_size=2, max_size=14),
    seed=st.integers(0, 99),
    strategy=st.sampled_from(STRATEGIES),
    rate=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    beta=st.sampled_from([0.5, 1.0, 2.0]),
)
def test_a_calibrated_threshold_is_the_best_of_all(scores, seed, strategy, rate, beta):
    scores = np.array(scores)
    labels = np.random.default_rng(seed).permutation(np.arange(len(scores)) % 2)

    def rates(threshold):
        taken = scores >= threshold
        return taken[labels == 1].mean(), (~taken)[labels == 0].mean(), taken

    def value(threshold):
        tpr, tnr, taken = rates(threshold)
        if strategy == "accuracy":
            return accuracy_score(labels, taken)
        if strategy == "f_beta":
            return fbeta_score(labels, taken, beta=beta, zero_division=0)
        wanted, floor = (tpr, tnr) if strategy == "max_tpr" else (tnr, tpr)
        return wanted if floor >= rate else -1

    limits = {"min_rate": rate} if strategy.startswith("max") else {}
    chosen = best_cut(scores, labels, strategy, beta=beta if strategy == "f_beta" else 1, **limits)
    best = max(value(threshold) for threshold in all_cuts(scores, labels))
    assert value(chosen) == pytest.approx(best)


def test_thresholds_are_calibrated_and_set(digits, fitted):
    _, _, (pairs, y) = digits
    model = pickle.loads(pickle.dumps(fitted))
    assert model.calibrate_threshold(pairs, y) is model
    best = accuracy_score(y, model.predict(pairs))
    for threshold in np.unique(model.pair_score(pairs))[::7]:
        assert accuracy_score(y, model.set_threshold(threshold).predict(pairs)) <= best
    reached = {}
    for beta in (0.1, 10.0):
        model.calibrate_threshold(pairs, y, strategy="f_beta", beta=beta)
        reached[beta] = model.predict(pairs)
    assert fbeta_score(y, reached[0.1], beta=0.1) > fbeta_score(y, reached[10.0], beta=0.1)
    assert fbeta_score(y, reached[10.0], beta=10.0) > fbeta_score(y, reached[0.1], beta=10.0)
    model.calibrate_threshold(pairs, y, strategy="max_tpr", min_rate=0.95)
    assert (model.predict(pairs[y < 0]) == -1).mean() >= 0.95
    model.calibrate_threshold(pairs, y, strategy="max_tnr", min_rate=0.95)
    assert (model.predict(pairs[y > 0]) == 1).mean() >= 0.95
    assert (model.set_threshold(1e6).predict(pairs) == -1).all()
    exact = model.pair_score(pairs[3:4])[0]  # at the threshold a pair is similar, as anywhere here
    assert model.set_threshold(exact).predict(pairs[3:4]) == 1
    assert model.set_threshold(np.nextafter(exact, np.float32(9))).predict(pairs[3:4]) == -1
    model.set_threshold(0.7, unit="probability")
    np.testing.assert_array_equal(model.predict(pairs) == 1, model.predict_proba(pairs)[:, 1] > 0.7)
    assert fastpair.above_threshold(model.preprocessor[:99], model=model).nnz > 0


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"strategy": "weird"}, "expected one of accuracy"),
        ({"strategy": "max_tpr"}, "min_rate is None"),
        ({"strategy": "max_tnr", "min_rate": 1.5}, "min_rate is 1.5"),
        ({"strategy": "accuracy", "min_rate": 0.5}, "min_rate is for"),
        ({"strategy": "f_beta", "beta": 0}, "beta is 0"),
        ({"strategy": "accuracy", "beta": 2}, "for f_beta alone"),
    ],
)
def test_wrong_strategies_are_refused(digits, fitted, parameters, message):
    _, _, (pairs, y) = digits
    with pytest.raises(ArgumentError, match=message):
        fitted.calibrate_threshold(pairs, y, **parameters)


@pytest.mark.parametrize(
    ("value", "unit"),
    [("high", "score"), (None, "score"), (np.nan, "score"), (1.5, "probability"), (-1, "distance"),
     (1, "metres")],
)  # fmt: skip
def test_wrong_thresholds_are_refused(fitted, value, unit):
    before = fitted.threshold_
    with pytest.raises(ArgumentError):
        fitted.set_threshold(value, unit=unit)
    assert fitted.threshold_ == before


# --- model selection ------------------------------------------------------------------------------


def test_a_grid_of_heads_and_dims_is_searched(digits):
    X, (pairs, y), (others, truth) = digits
    grid = {"head": ["cosine", "mahalanobis", "absdiff"], "dim": [4, 24]}
    search = GridSearchCV(quick(preprocessor=X, epochs=1), grid, cv=3)
    search.fit(pairs, y)
    assert len(search.cv_results_["params"]) == 6
    assert (search.cv_results_["mean_test_score"] > 0.6).all()
    best = search.best_estimator_
    assert best.transform(X).shape == (len(X), search.best_params_["dim"])
    assert search.score(others, truth) == best.score(others, truth)


def test_a_pipeline_is_searched_and_its_steps_are_set(digits):
    X, (pairs, y), (others, truth) = digits
    pipeline = Pipeline(
        [("first", FunctionTransformer(first_columns, kw_args={"columns": 64})), ("learn", quick())]
    )
    grid = {"first__kw_args": [{"columns": 30}, {"columns": 64}], "learn__dim": [8]}
    search = GridSearchCV(pipeline, grid, cv=2, scoring="accuracy").fit(X[pairs], y)
    assert search.best_estimator_.named_steps["learn"].components_.shape[0] == 8
    assert search.predict(X[others]).shape == truth.shape
    points = make_pipeline(FunctionTransformer(search.best_estimator_[-1].transform, validate=True))
    assert points.transform(first_columns(X, **search.best_params_["first__kw_args"])).shape[1] == 8


def first_columns(pairs, columns):
    return pairs[..., :columns]


def test_folds_by_entity_share_none(digits):
    X, (_, _), _ = digits
    rng = np.random.default_rng(1)
    groups_of_rows = np.arange(900).reshape(-1, 6)
    pairs = np.concatenate([rng.choice(group, (3, 2)) for group in groups_of_rows])
    kind = load_digits(return_X_y=True)[1]
    y = np.where(kind[pairs[:, 0]] == kind[pairs[:, 1]], 1, -1)
    groups = fastpair.entity_groups(pairs)
    for train, test in GroupKFold(3).split(pairs, y, groups):
        assert not set(pairs[train].ravel()) & set(pairs[test].ravel())
    values = fastpair.entity_groups(X[pairs])
    np.testing.assert_array_equal(values, groups)
    scores = cross_val_score(
        quick(preprocessor=X, epochs=1), pairs, y, groups=groups, cv=GroupKFold(3)
    )
    assert (scores > 0.6).all()


# --- the programs of metric-learn's documentation, with this class in them ------------------------


def test_its_general_interface():
    """Tuples as an array or by indices; transform, pair_distance, get_metric, pair_score, M."""
    points = np.array(
        [[-0.1, -1.2, -0.2], [0.1, -0.2, 0.0], [-2.2, 0.1, 0.0], [1.6, 0.2, 0.9], [0.9, -0.3, 2.4]]
    )
    indices = np.array([[0, 1], [2, 3], [3, 4], [0, 2]])
    y = np.array([-1, 1, 1, -1])
    learner = PairSimilarity("mahalanobis", random_state=42).fit(points[indices], y)
    by_index = PairSimilarity("mahalanobis", preprocessor=points, random_state=42).fit(indices, y)
    np.testing.assert_array_equal(learner.components_, by_index.components_)
    new = np.array([[9.4, 4.1, 4.2], [2.1, 4.4, 2.3]])
    assert learner.transform(new).shape == (2, 3)
    pairs = [[[3.5, 3.6, 5.2], [5.6, 2.4, 6.7]], [[1.2, 4.2, 7.7], [2.1, 6.4, 0.9]]]
    distances, metric = learner.pair_distance(pairs), learner.get_metric()
    assert metric(*pairs[0]) == pytest.approx(distances[0])
    near, far = np.argsort(distances)
    scores = learner.pair_score(pairs)
    assert scores[near] > scores[far]
    apart = np.subtract(*pairs[0])
    squared = apart @ learner.get_mahalanobis_matrix() @ apart
    assert distances[0] == pytest.approx(squared**0.5)


def test_its_fitting_prediction_threshold_and_scoring():
    pairs = np.array([[[1.2, 3.2], [2.3, 5.5]], [[4.5, 2.3], [2.1, 2.3]]])
    learner = PairSimilarity("mahalanobis", random_state=42).fit(pairs, np.array([1, -1]))
    new = [[[0.6, 1.6], [1.15, 2.75]], [[3.2, 1.1], [5.4, 6.1]]]
    assert set(learner.predict(new)) <= {-1, 1}
    learner.calibrate_threshold(pairs, [1, -1])
    np.testing.assert_array_equal(learner.set_threshold(1e3).predict(new), [-1, -1])
    near, far = learner.decision_function(new)
    assert near > far
    test = np.array([*new, [[7.7, 5.6], [1.23, 8.4]]])
    assert learner.score(test, [1, -1, -1]) == 1.0
    learner.fit(pairs, [1, -1], calibration_params={"strategy": "f_beta", "beta": 2.0})
    assert learner.set_threshold(0.4, unit="distance").predict(new).shape == (2,)


def iris_pairs(count, seed=42):
    X, kind = load_iris(return_X_y=True)
    indices = np.random.RandomState(seed).randint(len(X), size=(count, 2))
    return X, kind, indices, np.where(kind[indices[:, 0]] == kind[indices[:, 1]], 1, -1)


@pytest.mark.parametrize("scoring", [None, "accuracy", "roc_auc", "average_precision"])
def test_its_cross_validation_on_iris(scoring):
    X, _, indices, y = iris_pairs(300)
    learner = PairSimilarity("mahalanobis", preprocessor=X, epochs=4)
    values = cross_val_score(learner, indices, y, scoring=scoring, cv=3)
    assert values.mean() > {None: 0.9, "roc_auc": 0.9}.get(scoring, 0.75)


def test_its_metric_in_nearest_neighbours_and_pipelines():
    X, kind, indices, y = iris_pairs(300)
    learner = PairSimilarity("mahalanobis", preprocessor=X, epochs=4).fit(indices, y)
    neighbours = KNeighborsClassifier(metric=learner.get_metric()).fit(X[::2], kind[::2])
    assert neighbours.score(X[1::10], kind[1::10]) > 0.9
    pipeline = make_pipeline(FunctionTransformer(learner.transform), KNeighborsClassifier())
    assert cross_val_score(pipeline, X, kind).mean() > 0.9


def test_its_preprocessor_of_names():
    points = np.array([[-0.7, -0.23], [-0.43, -0.49], [0.14, -0.37]])

    def find(names):
        return np.array([points[int(name[3:5])] for name in names])

    names = [["img02.png", "img00.png"], ["img01.png", "img00.png"]]
    learner = PairSimilarity("mahalanobis", preprocessor=find).fit(names, np.array([1, -1]))
    assert learner.predict(names).shape == (2,)
    by_value = PairSimilarity("mahalanobis").fit(points[[[2, 0], [1, 0]]], [1, -1])
    np.testing.assert_array_equal(learner.components_, by_value.components_)
    assert learner.transform(["img01.png"]).shape == (1, 2)


def test_its_search_of_parameters():
    X, _, indices, y = iris_pairs(200)
    search = GridSearchCV(
        PairSimilarity("mahalanobis", preprocessor=X, arms="D"), {"epochs": [1, 5], "dim": [2, 4]},
        cv=3,
    )  # fmt: skip
    assert search.fit(indices, y).best_score_ > 0.85
