"""Every metric against scikit-learn and tables worked out by hand, degenerate samples included."""

import math
import warnings

import numpy as np
import pytest

from medfast.evals.metrics import (
    accuracy,
    auroc,
    balanced_accuracy,
    classification_metrics,
    confusion_matrix,
    label_ranks,
    macro_auroc,
    macro_f1,
    mean_classification_metrics,
    median_of,
    median_rank,
    multi_label_metrics,
    per_class,
    quadratic_kappa,
    recall_at,
    softmax,
    top_k_accuracy,
)


@pytest.mark.parametrize(("k", "want"), [(1, [1, 0, 0, 0]), (5, [1, 1, 0, 0]), (10, [1, 1, 1, 0])])
def test_recall_counts_ranks_below_k(k, want):
    assert recall_at([0, 4, 5, 10], k).tolist() == want


@pytest.mark.parametrize(
    ("ranks", "want"),
    [([0], 1), ([0, 1], 1.5), ([7, 0, 3], 4), ([0, 0, 9, 9], 5.5), ([], math.nan)],
)
def test_median_rank_counts_from_1(ranks, want):
    assert median_rank(ranks) == pytest.approx(want, nan_ok=True)


def test_weighted_median_is_that_of_repeated_values():
    rng = np.random.default_rng(0)
    values, counts = rng.integers(0, 20, 15), rng.integers(0, 4, (30, 15)).astype(float)
    want = [np.median(np.repeat(values, row.astype(int))) for row in counts]
    assert median_of(values)(counts).tolist() == want


def _cases():
    """Return scores [N, K] and labels [N] by name, of which some lack what metrics need."""
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=(200, 6)), rng.integers(0, 6, 200)
    scores[np.arange(200), labels] += 1
    biased = scores.copy()
    biased[:, 4] = -9
    return {
        "random": (scores, labels),
        "two classes": (scores[:, :2], labels % 2),
        "ties": (scores.round(), labels),
        "constant scores": (np.zeros((200, 6)), labels),
        "a class without samples": (scores, np.where(labels == 2, 0, labels)),
        "a class never predicted": (biased, labels),
        "a class that does not occur": (biased, np.where(labels == 4, 0, labels)),
        "all of one class": (scores, np.full(200, 3)),
        "all right": (np.eye(6)[labels], labels),
        "one sample": (scores[:1], labels[:1]),
        "one sample, right": (np.eye(6)[:1], np.array([0])),
    }


CASES = _cases()


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def _scikit_learn(function, *arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of undefined metrics, which are NaN
        return function(*arguments, **options)


def test_metrics_are_scikit_learns(case):
    from sklearn import metrics as sk

    scores, labels = case
    probabilities, predicted, K = softmax(scores), scores.argmax(1), scores.shape[1]
    found = classification_metrics(probabilities, labels, graded=True, resamples=2)["metrics"]
    aurocs = [
        _scikit_learn(sk.roc_auc_score, labels == k, probabilities[:, k])
        if len({*(labels == k)}) == 2
        else math.nan
        for k in range(K)
    ]
    defined = [x for x in aurocs if not math.isnan(x)]
    want = {
        "accuracy": sk.accuracy_score(labels, predicted),
        "balanced_accuracy": _scikit_learn(sk.balanced_accuracy_score, labels, predicted),
        "macro_f1": _scikit_learn(sk.f1_score, labels, predicted, average="macro"),
        "macro_auroc": np.mean(defined) if defined else math.nan,
        "quadratic_kappa": _scikit_learn(
            sk.cohen_kappa_score, labels, predicted, weights="quadratic", labels=range(K)
        ),
    }
    if K > 5:
        # scikit-learn takes the last of equal scores, we take the first.
        want["top5_accuracy"] = sk.top_k_accuracy_score(
            K - 1 - labels, scores[:, ::-1], k=5, labels=range(K)
        )
    assert found == pytest.approx(want, nan_ok=True)


def test_macro_auroc_is_scikit_learns_where_that_has_one():
    from sklearn.metrics import roc_auc_score

    scores, labels = CASES["random"]
    want = roc_auc_score(labels, softmax(scores), multi_class="ovr", average="macro")
    assert macro_auroc(softmax(scores), labels) == pytest.approx(want)
    scores, labels = CASES["two classes"]
    found = macro_auroc(softmax(scores), labels)
    assert found == pytest.approx(roc_auc_score(labels, softmax(scores)[:, 1]))


def test_confusion_and_class_table_are_scikit_learns(case):
    from sklearn import metrics as sk

    scores, labels = case
    K = scores.shape[1]
    found = classification_metrics(softmax(scores), labels, resamples=2)
    predicted = scores.argmax(1)
    assert found["confusion"] == sk.confusion_matrix(labels, predicted, labels=range(K)).tolist()
    table = sk.precision_recall_fscore_support(
        labels, predicted, labels=range(K), zero_division=np.nan
    )
    for name, want in zip(("precision", "recall", "f1", "n"), table, strict=True):
        got = [row[name] for row in found["per_class"]]
        assert got == pytest.approx(want.tolist(), nan_ok=True), name


@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_top_k_accuracy_counts_ranks_and_breaks_ties_as_argmax(case, k):
    scores, labels = case
    order = np.argsort(-scores, axis=1, kind="stable")  # of equal scores the first index
    want = np.mean([label in best[:k] for label, best in zip(labels, order, strict=True)])
    assert top_k_accuracy(scores, labels, k) == pytest.approx(want)
    assert ((label_ranks(scores, labels) == 0) == (scores.argmax(1) == labels)).all()


@pytest.mark.parametrize(
    ("confusion", "want"),
    [
        # Squared distances of the grades: 0, 1 and 4. All right.
        ([[2, 0, 0], [0, 2, 0], [0, 0, 2]], 1.0),
        # O: one sample off by 1 = 1. E: rows (2, 2, 2), columns (1, 3, 2), over 6:
        # (2*3 + 2*2*4 + 2*1 + 2*2 + 2*1*4 + 2*3) / 6 = 42 / 6 = 7.
        ([[1, 1, 0], [0, 2, 0], [0, 0, 2]], 1 - 1 / 7),
        # O: 2 * 4 + 2 * 4 = 16. E: (2*2 + 2*2*4) + (2*2 + 2*2) + (2*2*4 + 2*2) = 48, over 6 = 8.
        ([[0, 0, 2], [0, 2, 0], [2, 0, 0]], 1 - 16 / 8),
        # Always one grade, whatever the label: no better than chance.
        ([[3, 0, 0], [3, 0, 0], [3, 0, 0]], 0.0),
        # One grade alone: nothing to agree about.
        ([[5, 0, 0], [0, 0, 0], [0, 0, 0]], math.nan),
        ([[0, 0], [0, 0]], math.nan),
    ],
)
def test_kappa_by_hand(confusion, want):
    assert float(quadratic_kappa(confusion)) == pytest.approx(want, nan_ok=True)


def test_confusion_metrics_by_hand():
    confusion = confusion_matrix([0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 3, 0], 4)
    assert confusion.tolist() == [[2, 1, 0, 0], [0, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert float(accuracy(confusion)) == 0.5
    assert float(balanced_accuracy(confusion)) == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert float(macro_f1(confusion)) == pytest.approx((4 / 6 + 2 / 4 + 0 + 0) / 4)
    table = per_class(confusion)
    assert table["precision"].tolist() == pytest.approx([2 / 3, 1 / 2, math.nan, 0], nan_ok=True)
    assert table["recall"].tolist() == pytest.approx([2 / 3, 1 / 2, 0, math.nan], nan_ok=True)


@pytest.mark.parametrize(
    ("scores", "labels", "want"),
    [
        ([1, 2, 3, 4], [0, 0, 1, 1], 1.0),
        ([4, 3, 2, 1], [0, 0, 1, 1], 0.0),
        ([1, 3, 2, 4], [0, 0, 1, 1], 3 / 4),
        ([1, 1, 1, 1], [0, 0, 1, 1], 1 / 2),
        ([1, 2, 2, 3], [0, 0, 1, 1], 7 / 8),
        ([1, 9, 2, 3], [0, math.nan, 1, 1], 1.0),
        ([1, math.nan], [0, math.nan], math.nan),
        ([1, 2], [1, 1], math.nan),
        ([1], [0], math.nan),
        ([], [], math.nan),
    ],
)
def test_auroc_by_hand(scores, labels, want):
    assert auroc(scores, labels) == pytest.approx(want, nan_ok=True)


def test_auroc_of_a_score_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="scores must be numbers; got NaN"):
        auroc([1, math.nan, 2], [0, 1, 1])


def _multi_label():
    rng = np.random.default_rng(2)
    labels = (rng.random((90, 5)) < 0.3).astype(float)
    probabilities = np.clip(rng.random((90, 5)) * 0.8 + 0.2 * labels, 0, 1).round(2)
    unknown = np.where(rng.random((90, 5)) < 0.2, np.nan, labels)
    unknown[:, 3] = np.where(unknown[:, 3] == 1, np.nan, unknown[:, 3])  # no known positive
    unknown[:, 4] = np.nan
    return probabilities, labels, unknown


def test_unknown_labels_are_left_out():
    from sklearn.metrics import accuracy_score, roc_auc_score

    probabilities, _, unknown = _multi_label()
    found = multi_label_metrics(probabilities, unknown, np.arange(90) // 3, resamples=50)
    rows = found["per_label"]
    aurocs, accuracies = [], []
    for k in range(4):
        known = ~np.isnan(unknown[:, k])
        truth, own = unknown[known, k], probabilities[known, k]
        accuracies.append(accuracy_score(truth, own > 0.5))
        assert rows[k]["n"] == known.sum()
        assert rows[k]["positives"] == truth.sum()
        if k < 3:
            aurocs.append(roc_auc_score(truth, own))
    got = [row["auroc"] for row in rows]
    assert got == pytest.approx([*aurocs, math.nan, math.nan], nan_ok=True)
    assert [row["accuracy"] for row in rows] == pytest.approx([*accuracies, math.nan], nan_ok=True)
    want = {"accuracy": np.mean(accuracies), "macro_auroc": np.mean(aurocs)}
    assert found["metrics"] == pytest.approx(want)
    for name, (low, high) in found["ci95"].items():
        assert low < found["metrics"][name] < high
    assert found["chance"]["accuracy"] > 0.5


def test_the_interval_of_a_mean_asks_all_models_of_the_same_patients():
    """By hand: two models of which always one is right have a mean of 1/2 in every resample."""
    right, wrong = [[0.9, 0.1], [0.2, 0.8]]
    one = np.array([right, right, wrong, wrong])
    found = mean_classification_metrics([one, one[::-1]], [0, 0, 0, 0])
    assert found["metrics"]["accuracy"] == 0.5
    assert found["ci95"]["accuracy"] == [0.5, 0.5]
    low, high = classification_metrics(one, [0, 0, 0, 0])["ci95"]["accuracy"]
    assert low < 0.5 < high


def test_the_mean_of_one_model_is_its_own():
    scores, labels = CASES["random"]
    groups = np.arange(len(labels)) // 3
    options = {"graded": True, "seed": 3, "resamples": 50}
    want = classification_metrics(softmax(scores), labels, groups, **options)
    found = mean_classification_metrics([softmax(scores)] * 2, labels, groups, **options)
    for part in ("metrics", "ci95"):
        assert found[part].keys() == want[part].keys()
        for name, value in found[part].items():
            assert value == pytest.approx(want[part][name])


def test_multi_label_shapes_are_checked():
    with pytest.raises(ValueError, match=r"\[3, 2\] and \[3\]"):
        multi_label_metrics(np.zeros((3, 2)), np.zeros(3))


def test_figures_are_those_of_medmnists_evaluator():
    """Of the sets' kinds: many classes, two classes (it takes the last score), many labels."""
    evaluator = pytest.importorskip("medmnist.evaluator")
    scores, labels = CASES["random"]
    for task in ("multi-class", "ordinal-regression"):
        found = classification_metrics(softmax(scores), labels, resamples=2)["metrics"]
        want = evaluator.getAUC(labels[:, None], softmax(scores), task)
        assert found["macro_auroc"] == pytest.approx(want)
        assert found["accuracy"] == evaluator.getACC(labels[:, None], softmax(scores), task)
    scores, labels = CASES["two classes"]
    found = classification_metrics(softmax(scores), labels, resamples=2)["metrics"]
    want = evaluator.getAUC(labels[:, None], softmax(scores), "binary-class")
    assert found["macro_auroc"] == pytest.approx(want)
    assert found["accuracy"] == evaluator.getACC(labels, softmax(scores), "binary-class")
    probabilities, labels, _ = _multi_label()
    found = multi_label_metrics(probabilities, labels, resamples=2)["metrics"]
    task = "multi-label, binary-class"
    assert found["macro_auroc"] == pytest.approx(evaluator.getAUC(labels, probabilities, task))
    assert found["accuracy"] == pytest.approx(evaluator.getACC(labels, probabilities, task))
    # A class without samples leaves its mean undefined; ours is that of the others.
    scores, labels = CASES["a class without samples"]
    assert math.isnan(_scikit_learn(evaluator.getAUC, labels, softmax(scores), "multi-class"))
    assert 0.5 < macro_auroc(softmax(scores), labels) < 1


def test_softmax_is_of_any_logits_and_in_fp64():
    found = softmax(np.array([[1000.0, 999.0], [-1000.0, -1040.0]], dtype=np.float32))
    assert found[:, 0].tolist() == pytest.approx([1 / (1 + math.exp(-1)), 1])
    assert found[1, 1] == pytest.approx(math.exp(-40))


@pytest.mark.parametrize(
    ("labels", "want"),
    [
        # The most frequent class is half of six classes: better than guessing.
        ([0, 0, 0, 1, 2, 3], {"accuracy": 1 / 2, "top5_accuracy": 1, "balanced_accuracy": 1 / 4}),
        # All alike: guessing evenly is right as often, and a sixth of the time at all.
        (range(6), {"accuracy": 1 / 6, "top5_accuracy": 5 / 6, "balanced_accuracy": 1 / 6}),
        ([2], {"accuracy": 1, "top5_accuracy": 1, "balanced_accuracy": 1}),
        ([], {"accuracy": 1 / 6, "top5_accuracy": 5 / 6}),
    ],
)
def test_chance_is_the_better_of_guessing_and_the_most_frequent_class(labels, want):
    labels = list(labels)
    uniform = np.full((len(labels), 6), 1 / 6)
    found = classification_metrics(uniform, labels, graded=True, resamples=2)["chance"]
    assert {name: found[name] for name in want} == pytest.approx(want)
    assert found["macro_auroc"] == 0.5
    assert found["quadratic_kappa"] == 0


def test_chance_of_macro_f1_is_what_guessing_reaches():
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat([0, 1, 2], [20_000, 10_000, 5_000]))
    chance = classification_metrics(np.eye(3)[labels], labels, resamples=1)["chance"]["macro_f1"]
    guessed = confusion_matrix(labels, rng.integers(0, 3, len(labels)), 3)
    always = confusion_matrix(labels, np.zeros_like(labels), 3)
    f1_of_naming = 2 * (4 / 7) / (11 / 7) / 3  # the others' F1 is 0
    assert float(per_class(always)["f1"][0]) / 3 == pytest.approx(f1_of_naming)
    assert chance == pytest.approx(max(float(macro_f1(guessed)), f1_of_naming), abs=0.01)


def test_intervals_are_by_patient_and_the_same_for_a_seed():
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(30), 10)
    labels = rng.integers(0, 3, 30)[patients]
    scores = np.eye(3)[labels] + rng.normal(size=(30, 3))[patients]  # a patient's images agree
    options = {"graded": True, "resamples": 200}
    alone = classification_metrics(softmax(scores), labels, **options)
    together = classification_metrics(softmax(scores), labels, patients, **options)
    assert together == classification_metrics(softmax(scores), labels, patients, **options)
    assert together["metrics"] == alone["metrics"]
    for name, value in together["metrics"].items():
        low, high = together["ci95"][name]
        assert low <= value <= high
        assert high - low > 2 * np.ptp(alone["ci95"][name])


def test_no_sample_has_no_metric():
    found = classification_metrics(np.zeros((0, 3)), [], graded=True)
    assert found["n"] == 0
    assert all(math.isnan(x) for x in found["metrics"].values())
    assert all(math.isnan(x) for ends in found["ci95"].values() for x in ends)


@pytest.mark.parametrize(
    ("probabilities", "labels", "message"),
    [
        (np.ones(3), [0, 0, 0], r"\[N, K\] and labels \[N\]; got \[3\] and \[3\]"),
        (np.full((3, 2), 0.5), [0, 1], r"got \[3, 2\] and \[2\]"),
        ([[2.0, 3.0], [0.5, 0.5]], [0, 1], "1 of 2 rows do not. Use softmax"),
        ([[-1.0, 2.0]], [0], "at least 0"),
        ([[math.nan, 1.0]], [0], "1 of 1 rows"),
        ([[0.5, 0.5]], [2], "labels must be from 0 to 1"),
        ([[0.5, 0.5]], [-1], "got -1 to -1"),
    ],
)
def test_bad_input_is_refused_by_name(probabilities, labels, message):
    with pytest.raises(ValueError, match=message):
        classification_metrics(probabilities, labels)
