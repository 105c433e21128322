import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from experiments import published
from experiments.bars import class_bars
from experiments.published import (
    DISCS,
    MEAN,
    MEAN_OF_PROMPTS,
    ORGANS,
    PROMPTS,
    SYNAPSE,
    Published,
)
from experiments.record import Record, Scores, write_record
from experiments.report import SMOKE, main
from samjax.data.datasets.synapse import CLASSES
from samjax.metrics import CaseScore, summarise_cases

NAN = math.nan
VOID = {"meta", "br", "img"}
DATA = {"test": {"name": "CHASEDB1", "count": 2, "patients": None, "sha256": "0123456789abcdef"}}


def scores(data_set, values, names=("vessel",), metric="dice", **changes):
    """Scores of (case, class) values."""
    cases = [
        CaseScore(f"c{i}", None, label, "both", {metric: value})
        for i, row in enumerate(np.reshape(values, (len(values), -1)).tolist())
        for label, value in enumerate(row, 1)
    ]
    given = {"data_set": data_set, "prompt": "none", "cases": cases, "class_names": names}
    return Scores(**given | changes)


def write(folder, run, **changes):
    """Writes a record to a folder of the run's name and returns that."""
    given = {
        **{"experiment": "sam2lora", "table": "vessel", "method": "SAM2LoRA r=64"},
        **{"run": run, "smoke": False, "settings": {}, "seed": 0, "data": DATA},
        "parameters": {"trainable": 7_693_312, "total": 232_143_312},
        "memory": {"planned_peak": 3 * 2**30, "state": 2**20},
        **{"seconds": 12.4, "images_per_second": 3.21},
        **{"history": [{"step": 5, "loss": 0.5}], "scores": []},
    }
    write_record(folder / run, Record(**given | changes))
    return folder / run


class Page(HTMLParser):
    """Refuses tags that do not close in order; keeps tables, and the names that are linked."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tables, self.links, self.ids, self.texts = [], [], [], [], []
        self.captions = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.links += [attributes[key] for key in ("href", "src") if key in attributes]
        self.ids += [attributes["id"]] if "id" in attributes else []
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append([""])
        elif tag == "br":
            self.tables[-1][-1][-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1][-1] += data
        elif self.open[-1:] == ["caption"]:
            self.captions.append(data)
        elif self.open and self.open[-1] != "style" and data.strip():
            self.texts.append(data)


def build(results, capsys, out=None):
    """Runs the command; the Markdown and the page."""
    out = out or results / "report"
    assert main(["--results", str(results), "--out", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out / "report.md")
    markdown = (out / "report.md").read_text("utf-8")
    return markdown, Page((out / "report.html").read_text("utf-8"))


def row(page, method, *heads, caption=""):
    """The cells of a method in the first table with these columns that has it, by column."""
    for title, table in zip(page.captions, page.tables, strict=True):
        columns = [" ".join(cell) for cell in table[0]]
        if set(heads) <= set(columns) and caption in title:
            for line in table[1:]:
                if line[0] == [method]:
                    return dict(zip(columns, line, strict=True))
    raise AssertionError(f"no row {method} in a table with {heads}")


@pytest.fixture
def two_entries(monkeypatch):
    """Two published values instead of all of them, one of which is unknown."""
    given = {
        **{"experiment": "sam2lora", "table": "vessel", "method": "SAM2LoRA r=64"},
        **{"prompt": "none", "metric": "dice", "label": MEAN},
    }
    entries = (
        Published(**given, data_set="CHASEDB1", value=0.82, source="a chart", note="±.01"),
        Published(**given, data_set="FIVES", value=None, source="p. 3", note="it is not there"),
        Published(**given | {"method": "older"}, data_set="DRIVE", value=0.5, source="p. 4"),
    )
    monkeypatch.setattr(published, "PUBLISHED", entries)


def test_ours_published_and_the_difference(tmp_path, capsys, two_entries):
    ours = scores("CHASEDB1", [0.7, 0.9, 0.85])
    of_fives, of_hrf = scores("FIVES", [0.5, 0.6]), scores("HRF", [0.25])
    write(tmp_path, "a", scores=[ours, of_fives, of_hrf])
    markdown, page = build(tmp_path, capsys)
    found = summarise_cases(ours.cases)["dice"]
    cells = row(page, "SAM2LoRA r=64", "CHASEDB1")
    assert cells["CHASEDB1"] == [
        f"0.8167 [{found.low:.4f}, {found.high:.4f}], n 3",
        "published 0.82 [1]",
        "difference -0.0033",
    ]
    assert cells["FIVES"][1:] == ["not found [2]"]
    assert cells["HRF"] == ["0.2500, n 1", "not published"]
    assert cells["DRIVE"] == ["not run", "not published"]
    assert row(page, "older", "DRIVE")["DRIVE"] == ["not run", "published 0.5 [3]"]
    assert {"[1] a chart: ±.01", "[2] p. 3: it is not there", "[3] p. 4"} <= set(page.texts)
    assert "<br>published 0.82 \\[1\\]<br>difference -0.0033 |" in markdown
    assert [len(re.findall(r"(?<!\\)\|", line)) for line in markdown.splitlines() if "CHAS" in line]


def test_the_page_of_the_runs(tmp_path, capsys, two_entries):
    write(tmp_path, "a", scores=[scores("CHASEDB1", [0.7])], notes=("half the steps",))
    write(tmp_path, "b", images_per_second=None, memory={}, parameters={}, data={}, history=[])
    _, page = build(tmp_path, capsys)
    cells = row(page, "a", "seed", "steps")
    assert cells["trained, total, share"] == ["7,693,312", "232,143,312", "3.31%"]
    assert cells["memory"] == ["planned_peak 3.00 GiB", "state 1.0 MiB"]
    assert (cells["steps"], cells["images/s"], cells["seconds"]) == (["5"], ["3.21"], ["12"])
    assert cells["data: part, name, examples, sha256"] == ["test: CHASEDB1, 2, 0123456789ab"]
    assert cells["device"][0].endswith("cpu")
    cells = row(page, "b", "seed", "steps")
    assert cells["memory"] == cells["images/s"] == ["unknown"]
    assert "Differs from the paper in a: half the steps" in page.texts
    assert any(re.match(r"Versions: samjax .*, jax \d", text) for text in page.texts)
    assert {f"#{name}" for name in page.ids} >= {link for link in page.links if link[0] == "#"}


def test_seeds_of_one_method(tmp_path, capsys, two_entries):
    for seed, value in enumerate((0.7, 0.8, 0.9)):
        settings = {"seed": seed, "steps": 100 + seed // 2}
        of_run = [scores("CHASEDB1", [value] * 2), scores("CHASEDB1", [0.1], stage="before")]
        write(tmp_path, f"s{seed}", seed=seed, settings=settings, scores=of_run)
    _, page = build(tmp_path, capsys)
    cells = row(page, "SAM2LoRA r=64", "CHASEDB1")
    assert cells["CHASEDB1"] == [
        "0.8000 ± 0.1000 (3 seeds), n 2",
        "published 0.82 [1]",
        "difference -0.0200",
    ]
    before = row(page, "SAM2LoRA r=64, before training", "CHASEDB1")
    assert before["CHASEDB1"] == ["0.1000 ± 0.0000 (3 seeds), n 1"]  # never compared
    assert "SAM2LoRA r=64: its runs differ in steps: 100, 100, 101" in page.texts


def test_runs_that_are_no_seeds_of_one_another_stay_apart(tmp_path, capsys, two_entries):
    write(tmp_path, "a", scores=[scores("CHASEDB1", [0.7])])
    write(tmp_path, "b", scores=[scores("CHASEDB1", [0.9])])
    other = {"test": DATA["test"] | {"sha256": "ff"}}
    write(tmp_path, "c", method="on other data", seed=1, scores=[scores("CHASEDB1", [0.3])])
    write(tmp_path, "d", method="on other data", data=other, scores=[scores("CHASEDB1", [0.4])])
    _, page = build(tmp_path, capsys)
    for label, value in (
        *(("SAM2LoRA r=64 (a)", 0.7), ("SAM2LoRA r=64 (b)", 0.9)),
        *(("on other data (c)", 0.3), ("on other data (d)", 0.4)),
    ):
        assert row(page, label, "CHASEDB1")["CHASEDB1"][0] == f"{value:.4f}, n 1"


def test_smoke_runs_are_never_compared(tmp_path, capsys, two_entries):
    write(tmp_path, "tiny", smoke=True, scores=[scores("CHASEDB1", [0.82, 0.82])])
    markdown, page = build(tmp_path, capsys)
    assert f"## {SMOKE}" in markdown
    assert row(page, "SAM2LoRA r=64", "CHASEDB1")["CHASEDB1"] == ["0.8200 [0.8200, 0.8200], n 2"]
    assert "not published" not in markdown.split(SMOKE)[1]
    assert "published 0.82" not in markdown
    assert "sam2lora: not run, or in smoke runs only" in page.texts

    write(tmp_path, "real", scores=[scores("CHASEDB1", [0.5, 0.5])])
    markdown, page = build(tmp_path, capsys)
    real, smoke = markdown.split(SMOKE)
    assert "difference -0.3200" in real
    assert "0.8200" not in real
    assert "difference" not in smoke
    assert "0.5000" not in smoke


def test_the_real_tables_beside_a_run_in_six_prompts(tmp_path, capsys):
    values = np.random.default_rng(0).random((len(PROMPTS), 4))
    of_run = [scores("GRAPE", v, prompt=p) for p, v in zip(PROMPTS, values, strict=True)]
    write(tmp_path, "a", table="disc", scores=of_run)
    markdown, page = build(tmp_path, capsys)
    mean = row(page, "SAM2LoRA r=64", *DISCS)["GRAPE"]  # the mean of prompts comes first
    assert mean[0].startswith(f"{values.mean():.4f} [")
    assert mean[1].startswith("published 0.77 ")
    assert mean[2] == f"difference {values.mean() - 0.77:+.4f}"
    assert markdown.index("**Dice, mean of prompts**") < markdown.index("**Dice, prompt: none**")
    box = row(page, "SAM2LoRA r=64", *DISCS, caption="Dice, prompt: box")
    assert box["GRAPE"][1:] == [
        "published 0.945 [2]",
        f"difference {values[4].mean() - 0.945:+.4f}",
    ]
    assert box["REFUGE2"] == ["not run", "published 0.954 [2]"]
    with pytest.raises(AssertionError, match="no row zero-shot SAM 2"):  # nothing of it is known
        row(page, "zero-shot SAM 2", *DISCS, caption="Dice, prompt: box")
    assert "### vessel" in markdown  # published, and not run
    assert "samseg: not run, or in smoke runs only" in page.texts


def test_classes_of_a_baseline_in_another_experiment(tmp_path, capsys):
    values = np.linspace(0.5, 0.9, 16).reshape(2, 8)
    given = {"experiment": "medsaga", "table": "Synapse", "method": "SAMed"}
    dice = scores(SYNAPSE, values, CLASSES)
    write(tmp_path, "a", scores=[dice], **given)
    few = scores(SYNAPSE, values, CLASSES, metric="hd95")
    write(tmp_path, "b", scores=[few], **given | {"table": "Synapse 10 %"})
    _, page = build(tmp_path, capsys)
    cells = row(page, "SAMed", "aorta", MEAN)
    assert list(cells) == ["method", *CLASSES, MEAN]
    aorta = values[:, CLASSES.index("aorta")].mean()
    assert cells["aorta"][1].startswith("published 0.8777 ")
    assert cells["aorta"][2] == f"difference {aorta - 0.8777:+.4f}"
    assert cells[MEAN][2] == f"difference {values.mean() - 0.8188:+.4f}"
    assert row(page, "MedSAGa r=4", "aorta", MEAN)[MEAN][1].startswith("not found ")
    assert row(page, "SAMed_s", "aorta", MEAN)["aorta"] == ["not run", "not published"]
    few_shot = [table for table in page.tables if len(table) > 1 and len(table[0]) == 10][-1]
    assert [line[0][0] for line in few_shot[1:]] == ["SAMed"]
    assert few_shot[1][1][1:] == ["not published"]  # the value of the full data is not its


def test_losses_are_picked_from_the_history(tmp_path, capsys):
    given = {"experiment": "samseg", "table": "rank", "seed": 1}
    history = [{"step": s, "val_loss": v} for s, v in enumerate((0.3, NAN, 0.12, 0.15), 1)]
    of_run = scores("BraTS-MEN 2023", [0.5], prompt="box")
    write(tmp_path, "a", method="SAMSEG r=64", history=history, scores=[of_run], **given)
    elsewhere = scores("volumes of one's own", [0.5], prompt="box")
    write(tmp_path, "b", method="SAMSEG r=128", history=history, scores=[elsewhere], **given)
    _, page = build(tmp_path, capsys)
    cells = row(page, "SAMSEG r=64", caption="Validation loss, BraTS-MEN 2023, prompt: box")
    assert cells["first"] == ["0.3000", "published 0.1 [4]", "difference +0.2000"]
    assert cells["lowest"] == ["0.1200", "published 0.02 [4]", "difference +0.1000"]
    cells = row(page, "SAMSEG r=128", caption="Training loss, BraTS-MEN 2023, prompt: box")
    assert cells["first"] == ["not run", "published 0.3 [2]"]  # its run was on other data


def test_undefined_cases_and_methods_in_order(tmp_path, capsys):
    for rank in (128, 32, 64):
        of_run = scores("mine", [3.25, NAN, 4.25], metric="hd95")
        given = {"experiment": "own", "table": "one", "method": f"r={rank}"}
        write(tmp_path, f"run {rank}", scores=[of_run], **given)
    _, page = build(tmp_path, capsys)
    found = next(table for table in page.tables if table[0] == [["method"], ["mine"]])
    assert [line[0] for line in found[1:]] == [["r=32"], ["r=64"], ["r=128"]]
    assert re.fullmatch(r"3.75 \[3.25, 4.25\], n 2, 1 undefined", found[1][1][0])


def test_names_are_escaped(tmp_path, capsys, two_entries):
    name = '<b>"x" & y|z_*`</b>'
    given = {"method": name, "table": name, "notes": (f"see {name}",)}
    write(tmp_path, "a b", scores=[scores(name, [0.5], prompt=name)], **given)
    markdown, page = build(tmp_path, capsys)
    assert row(page, name, name)[name][0] == "0.5000, n 1"
    assert f"Differs from the paper in a b: see {name}" in page.texts
    assert "<b>" not in markdown
    (line,) = [line for line in markdown.splitlines() if "0.5000" in line]
    assert line.startswith(r'| &lt;b&gt;"x" &amp; y\|z\_\*\`&lt;/b&gt; | 0.5000, n 1<br>')


def test_pictures_are_copied_or_linked(tmp_path, capsys, two_entries):
    run = write(tmp_path / "results", "a (1)", scores=[scores("CHASEDB1", [0.5])])
    for name in ("classes.png", "curve.png", "a map.png"):
        Image.new("RGB", (2, 3)).save(run / name)
    markdown, page = build(tmp_path / "results", capsys, tmp_path / "out")
    names = ["curve", "classes", "a%20map"]
    paths = [f"pictures/a%20%281%29/{name}.png" for name in names]
    assert [link for link in page.links if link[0] != "#"] == [p for p in paths for _ in "ab"]
    assert re.findall(r"!\[[^]]*\]\(([^)]*)\)", markdown) == paths
    copied = tmp_path / "out" / "pictures" / "a (1)"
    assert (copied / "curve.png").read_bytes() == (run / "curve.png").read_bytes()
    assert len(list(copied.iterdir())) == 3

    _, page = build(tmp_path / "results", capsys, tmp_path)
    assert page.links[-1] == "results/a%20%281%29/a%20map.png"
    assert not (tmp_path / "pictures").exists()


def test_nothing_to_report(tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")]
    assert main(["--results", str(tmp_path), *out]) == 1
    assert "error: " + str(tmp_path) + ": no result.json in it or below" in capsys.readouterr().err
    assert main(["--results", str(tmp_path / "none"), *out]) == 1
    assert "no such folder" in capsys.readouterr().err
    (tmp_path / "result.json").write_text("{}", "utf-8")
    assert main(["--results", str(tmp_path), *out]) == 1
    assert "result.json: no key 'schema'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_published_values_are_consistent():
    keys = [
        (e.experiment, e.table, e.method, e.data_set, e.prompt, e.metric, e.label)
        for e in published.PUBLISHED
    ]
    assert len(set(keys)) == len(keys)
    for entry in published.PUBLISHED:
        assert entry.source
        assert entry.value is not None or entry.note.startswith("not found: ")
        if entry.metric in ("dice", "iou", "auc") and entry.value is not None:
            assert 0 < entry.value < 1
    values = {key[2:]: e.value for key, e in zip(keys, published.PUBLISHED, strict=True)}
    for method in ("SAMed", "SAMed_h", "DAE-Former"):
        organs = [values[method, SYNAPSE, "none", "dice", organ] for organ in ORGANS]
        mean = values[method, SYNAPSE, "none", "dice", MEAN]
        assert np.mean(organs) == pytest.approx(mean, abs=1.5e-4 + 4e-4 * (method[0] == "D"))
    assert set(ORGANS) == set(CLASSES)
    for data_set in DISCS:  # the bars of the chart are means over these six prompts
        cells = [values["SAM2LoRA r=64", data_set, prompt, "dice", MEAN] for prompt in PROMPTS]
        bar = values["SAM2LoRA r=64", data_set, MEAN_OF_PROMPTS, "dice", MEAN]
        assert np.mean(cells) == pytest.approx(bar, abs=0.01)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    saved, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (saved.append(self), save(self, *a, **k))[1]
    )
    return saved


def test_bars_by_class(tmp_path, drawn):
    bars = {
        "LoRA": {"disc": (0.5, 0.4, 0.7), "cup": (NAN, NAN, NAN)},
        "a $full$ one": {"disc": (0.9, NAN, NAN), "rim": (0.25, 0.25, 0.5)},
    }
    class_bars(tmp_path / "classes.png", bars, "$x")
    (axes,) = drawn[0].axes
    heights = np.array([bar.get_height() for bar in axes.patches]).reshape(2, 3)
    np.testing.assert_array_equal(heights, [[0.5, 0, 0], [0.9, 0, 0.25]])
    assert [text.get_text() for text in axes.get_xticklabels()] == ["disc", "cup", "rim"]
    assert [text.get_text() for text in axes.texts] == [" no value"] * 3
    legend = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert legend == ["LoRA", "a $full$ one"]
    segments = [s for lines in axes.collections for s in lines.get_segments() if s.size]
    whiskers = sorted(tuple(s[:, 1].round(6)) for s in segments if not np.isnan(s).any())
    assert whiskers == [(0.25, 0.5), (0.4, 0.7)]
    assert [file.name for file in tmp_path.iterdir()] == ["classes.png"]


@pytest.mark.parametrize(
    ("bars", "message"),
    [
        ({}, "no bars"),
        ({"a": {}}, "no bars"),
        ({"a": {"x": (1.2, 1, 2)}}, "a, x: mean 1.2 of 1 to 2; .* between 0 and 1"),
        ({"a": {"x": (0.5, 0.6, 0.4)}}, "expected an interval"),
    ],
)
def test_bars_that_cannot_be(tmp_path, bars, message):
    with pytest.raises(ValueError, match=message):
        class_bars(tmp_path / "a.png", bars)
    class_bars(tmp_path / "a.png", {"a": {"x": (12.5, 3, 40)}}, label="HD95 (mm)", shares=False)
