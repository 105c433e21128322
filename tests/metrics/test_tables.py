import csv
import json
import math
from dataclasses import asdict

import numpy as np
import pytest
from scipy import stats

from samjax.metrics import Case, CaseScore, read_cases, score_cases, summarise_cases, write_cases

NAN = math.nan


def records(values, patients=None, metric="dice"):
    """One record per entry of values (cases, classes)."""
    values = np.asarray(values, float)
    return [
        CaseScore(f"c{i}", patients and patients[i], label, "both", {metric: value})
        for i, row in enumerate(values.reshape(len(values), -1))
        for label, value in enumerate(row.tolist(), 1)
    ]


def real_records(rng):
    """Four volumes in which classes are missed, invented, or not there."""
    cases = []
    for i in range(4):
        truth, prediction = rng.integers(0, 4, (2, 3, 7, 8))
        truth[truth == (2, 2, 1, 3)[i]] = 0
        prediction[prediction == (2, 3, 2, 1)[i]] = 0
        cases.append(Case(f'odd, "name" {i}\n', prediction, truth, (3, 1, 1), patient=f"ü{i // 2}"))
    return score_cases(cases, num_classes=3, metrics=("dice", "hd95", "sensitivity"))


def test_the_file_reads_back_equal(tmp_path, rng):
    scores = real_records(rng)
    assert {score.present for score in scores} == {"both", "truth", "prediction", "neither"}
    path = tmp_path / "folder" / "cases.csv"
    write_cases(path, scores)
    back = [asdict(score) for score in read_cases(path)]
    np.testing.assert_equal(back, [asdict(score) for score in scores])  # where NaN equals NaN
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["case", "patient", "class", "present", "dice", "hd95", "sensitivity"]
    for row, score in zip(rows, scores, strict=True):
        assert row["class"] == str(score.label)
        for metric, value in score.values.items():
            assert row[metric] == ("" if math.isnan(value) else repr(value))
    unnamed = [CaseScore("a", None, 1, "both", {"dice": 1 / 3})]
    write_cases(path, unnamed)
    assert read_cases(path) == unnamed


def test_what_is_undefined_is_counted_with_its_reason(rng):
    scores = real_records(rng)
    summary = summarise_cases(scores)["hd95"].classes[2]
    of_class = [score for score in scores if score.label == 2]
    defined = [s.values["hd95"] for s in of_class if not math.isnan(s.values["hd95"])]
    assert summary.n == len(defined)
    assert summary.mean == pytest.approx(np.mean(defined))
    assert summary.std == pytest.approx(np.std(defined))
    assert summary.present == {"both": 1, "neither": 1, "prediction": 1, "truth": 1}
    assert summary.undefined == {"both empty": 1, "no prediction": 1, "no truth": 1}
    assert sum(summary.undefined.values()) == summary.n_undefined == 3
    dice = summarise_cases(scores)["dice"].classes[2]
    assert (dice.n, dice.undefined) == (3, {"both empty": 1})


def test_means_of_cases_then_of_classes():
    summary = summarise_cases(records([[0.2, 0.9, NAN], [0.4, NAN, NAN], [0.9, 0.5, NAN]]))["dice"]
    assert summary.classes[1].mean == pytest.approx(0.5)
    assert summary.classes[1].std == pytest.approx(np.std([0.2, 0.4, 0.9]))
    assert summary.classes[2].mean == pytest.approx(0.7)
    assert summary.mean == pytest.approx(0.6)  # the third class has no value at all
    nothing = summary.classes[3]
    assert (nothing.n, nothing.n_undefined) == (0, 3)
    assert all(math.isnan(value) for value in (nothing.mean, nothing.low, nothing.high))
    text = json.dumps({"dice": summary.as_json()}, allow_nan=False)
    assert json.loads(text)["dice"]["classes"]["3"] == {
        **{"mean": None, "std": None, "n": 0, "n_undefined": 3, "low": None, "high": None},
        **{"undefined": {"no value": 3}, "present": {"both": 3}},
    }


def test_the_interval_against_scipy(rng):
    """The same method with other draws: the ends agree within a few of their own errors."""
    values = rng.beta(8, 2, 30)
    expected = stats.bootstrap(
        (values,), np.mean, n_resamples=20000, method="percentile", confidence_level=0.9, rng=1
    ).confidence_interval
    found = summarise_cases(records(values), interval=0.9, resamples=20000)["dice"]
    width = expected.high - expected.low
    np.testing.assert_allclose(
        [found.classes[1].low, found.classes[1].high], expected, rtol=0, atol=0.03 * width
    )
    assert (found.low, found.high) == (found.classes[1].low, found.classes[1].high)


def test_the_interval_covers(rng):
    """Of 95 % intervals of 40 cases each, about 95 % hold the true mean (some fewer, as known)."""
    hits = 0
    for _ in range(200):
        summary = summarise_cases(records(rng.beta(4, 1, 40)), resamples=400)["dice"]
        hits += summary.low <= 0.8 <= summary.high
    assert 180 <= hits <= 199


def test_the_interval_is_repeatable():
    scores = records([[0.1, 0.5], [0.9, 0.6], [0.3, NAN], [0.5, 0.1]])
    first = summarise_cases(scores)
    assert first == summarise_cases(scores)
    other = summarise_cases(scores, seed=1, resamples=50)
    assert other["dice"].low != first["dice"].low
    assert other["dice"].mean == first["dice"].mean
    wider, narrower = summarise_cases(scores, interval=0.99), summarise_cases(scores, interval=0.5)
    assert wider["dice"].low < narrower["dice"].low < first["dice"].mean
    assert first["dice"].mean < narrower["dice"].high < wider["dice"].high


def test_the_cases_of_a_patient_are_drawn_together(rng):
    """Four equal slices of each patient say no more than one: the interval is the patients'."""
    values = rng.random((6, 2))
    alone = summarise_cases(records(values))["dice"]
    patients = [f"p{i // 4}" for i in range(24)]
    together = summarise_cases(records(values.repeat(4, 0), patients))["dice"]
    as_if_independent = summarise_cases(records(values.repeat(4, 0)))["dice"]
    assert together.mean == pytest.approx(alone.mean)
    assert (together.low, together.high) == pytest.approx((alone.low, alone.high))
    assert as_if_independent.high - as_if_independent.low < 0.7 * (alone.high - alone.low)


def test_one_patient_gives_no_interval():
    for scores in (records([[0.4]]), records([[0.4], [0.8]], ["p", "p"]), records([[0.4], [NAN]])):
        summary = summarise_cases(scores)["dice"]
        assert math.isnan(summary.low)
        assert math.isnan(summary.classes[1].high)
        assert summary.mean >= 0.4


@pytest.mark.parametrize(
    ("scores", "options", "message"),
    [
        ([], {}, "there are no scores"),
        (records([[1]]) + records([[1]], metric="iou"), {}, r"has the metrics \['iou'\]"),
        (records([[1]]) * 2, {}, "case 'c0' has class 1 twice"),
        (records([[1, 1], [1, 1]])[:3], {}, r"case 'c1' has the classes \[1\]"),
        (records([[1], [1]], ["p", None]), {}, "1 cases have no patient, the first is 'c1'"),
        (
            [CaseScore("a", p, i, "both", {"dice": 1.0}) for i, p in enumerate("pq", 1)],
            {},
            r"case 'a' has the patients \['p', 'q'\]",
        ),
        (records([[1]]), {"interval": 95}, "interval is 95"),
        (records([[1]]), {"resamples": 0}, "resamples is 0"),
    ],
)
def test_bad_tables(scores, options, message):
    with pytest.raises(ValueError, match=message):
        summarise_cases(scores, **options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"cases.csv: columns \[\]"),
        ("case,patient,class,present\n", "and metrics"),
        ("case,patient,class,dice\na,,1,0.5\n", "cases.csv: columns"),
        ("case,patient,class,present,dice\na,,1,both\n", "line 2: 4 cells, expected 5"),
        ("case,patient,class,present,dice\na,,1,both,x\n", "line 2: could not convert"),
        ("case,patient,class,present,dice\na,,liver,both,1\n", "line 2: invalid literal"),
        ("case,patient,class,present,dice\na,,1,maybe,1\n", "line 2: present is 'maybe'"),
    ],
)
def test_bad_files(tmp_path, text, message):
    (tmp_path / "cases.csv").write_text(text, "utf-8")
    with pytest.raises(ValueError, match=message):
        read_cases(tmp_path / "cases.csv")


def test_nothing_is_written_of_bad_records(tmp_path):
    with pytest.raises(ValueError, match="no scores"):
        write_cases(tmp_path / "cases.csv", [])
    assert list(tmp_path.iterdir()) == []
