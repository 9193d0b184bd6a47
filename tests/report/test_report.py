"""``cheaper report``: what a run folder says is in the page, whole, and nothing in it is code."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from cheaper.cli import main
from cheaper.evaluation.results import Result, save
from cheaper.files import newest_checkpoint, read_records
from cheaper.report.runs import MAX_POINTS, load_runs

PROMPT = "the <script>alert(1)</script>"


class Page(HTMLParser):
    """Text of table cells and of ``<pre>``, the scripts, and every address that a browser would load."""

    def __init__(self, path: Path):
        super().__init__()
        self.rows, self.pre, self.scripts, self.addresses, self.open = [], [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.open.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "srcset")]
        for tags, found in ((["tr"], self.rows), (["pre"], self.pre), (["script"], self.scripts)):
            if tag in tags:
                found.append([] if tag == "tr" else "")
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if "script" in self.open:
            self.scripts[-1] += data
        elif "pre" in self.open:
            self.pre[-1] += data
        elif {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data.strip()

    @property
    def charts(self):
        [source] = [script for script in self.scripts if script.startswith("const CHARTS")]
        charts = json.loads(source.removeprefix("const CHARTS = ").rstrip("; \n"))
        return {chart["metric"]: chart for chart in charts}


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory):
    """A finished run, and the same as if it had been killed while it wrote a line."""
    folder = tmp_path_factory.mktemp("report")
    targets = "training.targets=[train/loss < 100, train/accuracy > 0.999]"
    prompts = f"training.samples.prompts=['{PROMPT}']"
    tokens = "training.stage.tokens=2560"
    assert main(["train", *corpus.arguments(folder / "whole", targets, prompts, tokens)]) == 0
    shutil.copytree(folder / "whole", folder / "killed")
    (folder / "killed" / "summary.json").unlink()
    (folder / "killed" / "run.yaml").write_text(
        (folder / "whole" / "run.yaml").read_text().replace("run_name: test", "run_name: killed")
    )
    samples = [{"step": step, "prompt": PROMPT, "continuation": f"at {step}"} for step in (5, 10)]
    (folder / "killed" / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    lines = (folder / "whole" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "killed" / "metrics.jsonl").write_text("".join(lines[:10]) + lines[10][:20])
    return folder


def test_a_page_holds_everything_of_a_run(runs):
    assert main(["report", str(runs / "whole")]) == 0
    page = Page(runs / "whole" / "report.html")
    records = read_records(runs / "whole" / "metrics.jsonl")
    logged = {name for record in records for name in record} - {"step", "tokens"}
    assert set(page.charts) == logged
    assert page.charts["train/loss"]["curves"] == [
        [[record["tokens"] for record in records], [record["train/loss"] for record in records]]
    ]
    summary = json.loads((runs / "whole" / "summary.json").read_text())
    figures = {row[0]: row[1:] for row in page.rows if row}
    assert figures["tokens_per_second"] == [str(summary["tokens_per_second"])]
    assert figures["training.stage.learning_rate"] == ["0.004"]
    assert ["test", "train/loss < 100", f"{records[-1]['train/loss']:.4g}", "met"] in page.rows
    assert ["test", "train/accuracy > 0.999", f"{records[-1]['train/accuracy']:.4g}", "missed"] in page.rows
    share = summary["mixture"]["a"]
    assert ["test", "a", "70.00 %", f"{100 * share['consumed']:.2f} %", f"{share['tokens']:,}"] in page.rows
    samples = read_records(runs / "whole" / "samples.jsonl")
    assert sorted(page.pre) == sorted([PROMPT, *(sample["continuation"] for sample in samples)])


def test_scores_stand_beside_the_expected_and_the_published_ones(runs, tmp_path):
    shutil.copytree(runs / "whole", tmp_path / "scored")
    scores = [
        Result("gsm8k", "math_verify", 8, 1319, 0.5, 0.0138, expected=0.25, published=0.616),
        Result("<script>alert(1)</script>", "acc", 0, 20, 0.25),
    ]
    save(tmp_path / "scored" / "evaluation.json", newest_checkpoint(tmp_path / "scored"), scores)
    assert main(["report", str(tmp_path / "scored")]) == 0
    page = Page(tmp_path / "scored" / "report.html")
    assert ["test", "gsm8k", "math_verify", "8", "1,319", "0.5000± 0.0138", "0.2500", "0.6160"] in page.rows
    assert ["test", "<script>alert(1)</script>", "acc", "0", "20", "0.2500", "", ""] in page.rows
    assert len(page.scripts) == 3


def test_nothing_is_loaded_and_no_text_becomes_code(runs):
    assert main(["report", str(runs / "whole")]) == 0
    page = Page(runs / "whole" / "report.html")
    assert page.addresses == []
    assert len(page.scripts) == 3
    assert not any("alert(1)" in script for script in page.scripts)


def test_several_runs_are_overlaid_and_their_differences_named(runs, monkeypatch):
    monkeypatch.chdir(runs)
    assert main(["report", "whole", "killed", "--png"]) == 0
    page = Page(Path("report.html"))
    loss = page.charts["train/loss"]
    assert loss["runs"] == ["test", "killed"]
    assert [len(tokens) for tokens, _ in loss["curves"]] == [len(read_records(runs / "whole" / "metrics.jsonl")), 10]
    assert loss["colours"][0] != loss["colours"][1]
    assert ["run_name", "test", "killed"] in page.rows
    assert ["state", "", "not finished"] in page.rows
    assert page.pre[-2:] == ["at 10", "at 5"]
    assert Path("report.png").read_bytes().startswith(b"\x89PNG")


def test_runs_of_one_name_are_told_apart_by_their_folders(runs):
    assert [run.name for run in load_runs([runs / "whole", runs / "whole"])] == [str(runs / "whole")] * 2


def test_a_long_curve_is_thinned_to_means_and_what_is_not_finite_is_left_out(runs, tmp_path):
    shutil.copytree(runs / "whole", tmp_path / "long")
    records = [{"step": i, "tokens": 10 * i, "train/loss": float(i)} for i in range(4 * MAX_POINTS)]
    records[-1]["train/loss"] = math.nan
    (tmp_path / "long" / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    [run] = load_runs([tmp_path / "long"])
    curve = run.curves["train/loss"]
    assert len(curve.tokens) == MAX_POINTS
    assert (curve.tokens[0], curve.values[0]) == (15.0, 1.5)
    assert curve.values[-1] is None
    assert main(["report", str(tmp_path / "long")]) == 0
    assert "NaN" not in Page(tmp_path / "long" / "report.html").scripts[1]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["whol"], r"error: run whol: no metrics.jsonl there; did you mean whole\?"),
        (["whole", "--output", "mine.txt"], r"error: --output mine.txt: expected a file that ends with .html"),
        (["whole", "--output", "no/report.html"], r"error: --output no/report.html: no such folder"),
        (["damaged"], r"error: run damaged: a file is damaged \(.+\)"),
    ],
)
def test_mistakes_are_told_in_one_line(runs, monkeypatch, capsys, arguments, expected):
    monkeypatch.chdir(runs)
    shutil.copytree("whole", "damaged", dirs_exist_ok=True)
    Path("damaged/run.yaml").write_text("model: [")
    assert main(["report", *arguments]) == 2
    assert re.fullmatch(expected + "\n", capsys.readouterr().err)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium to draw the page")
def test_a_browser_draws_every_chart(runs):
    assert main(["report", str(runs / "whole")]) == 0
    path = runs / "whole" / "report.html"
    browser = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom"]
    drawn = subprocess.run([*browser, path.as_uri()], capture_output=True, text=True, timeout=120, check=True).stdout
    assert drawn.count("<canvas") == len(Page(path).charts)
