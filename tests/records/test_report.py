"""The report: one page, whole, safe whatever the data says, the same bytes for the same run."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from lorica.errors import DataError
from lorica.records.phrases import (
    clock,
    count,
    duration,
    parameters,
    rate,
    score_cells,
    size,
    verdict,
)
from lorica.records.plots import (
    Curves,
    curves_of,
    length_figure,
    loss_figure,
    rate_figure,
    score_figure,
)
from lorica.records.report import write_report
from lorica.records.smooth import RunningMean, smoothed, thinned
from records.run_rows import SCORES, manifest_for

HOSTILE = (
    '</td></style></script><script>alert(1)</script><img src=x onerror="x">"\'&amp;{{7*7}}$\\frac{'
)


class Page(HTMLParser):
    """Tags, attributes, text; and that every element is closed."""

    VOID = frozenset({"meta", "link", "br", "img", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.ids: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self._open.pop()

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] not in ("style",):
            self.text += data


def read_page(path) -> tuple[str, Page]:
    text = path.read_text("utf-8")
    return text, Page(text)


def test_whole_page(make_run):
    text, page = read_page(write_report(make_run()))
    for words in (
        "better than the base",
        "chrF 12.3 → 45.6 (difference +33.3, 95 % interval 31.0 to 35.5, p < 0.001, n = 630)",
        "Better too: perplexity.",
        "e2e on models/stories260k",
        "The loss went from 3.",
        "The eval loss was lowest at step 200",
        "98,121 (51.8 %)",
        "3 (< 0.1 %)",
        "CSV with the columns mr and ref",
        "method.lora_dropout",
        "rule: the columns mr and ref",
        "9.45 % of 260 K",
        "2 min 31 s",
        "sha256:5b1c",
        "lorica merge",
        'PeftModel.from_pretrained(base, "',
        "the nearest of 2",
        "saved step 200",
    ):
        assert words in page.text, words
    assert page.tags.count("svg") == 4  # loss, rates, scores, lengths
    assert len(page.ids) == len(set(page.ids)) > 100
    assert "<mark>X is a pub</mark>" in text
    assert '<span class="extra">lovely</span>' in text
    assert "2.0 %" not in page.text


def test_nothing_from_outside(make_run):
    """No address anywhere but data:, no script, no style or SVG reference that leaves the page."""
    text, page = read_page(write_report(make_run()))
    assert "http" not in text.replace("http-equiv", "")
    assert "script" not in page.tags and "iframe" not in page.tags and "img" not in page.tags
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "href"):
            assert value.startswith("#") or value == "data:,", value
    assert set(re.findall(r"url\((.)", text)) <= {"#"}
    assert "@import" not in text and "@font-face" not in text
    used = set(re.findall(r"(?:url\(|href=\")#([^)\"]+)", text))
    assert used and used <= set(page.ids)


def test_same_bytes_also_in_another_process(make_run, tmp_path):
    path = make_run()
    first = write_report(path).read_bytes()
    assert write_report(path, output=tmp_path / "again.html").read_bytes() == first
    script = "import sys; from lorica.records.report import write_report; write_report(sys.argv[1])"
    elsewhere = {
        "PYTHONPATH": os.pathsep.join(sys.path),
        "PYTHONHASHSEED": "7",
        "TZ": "Asia/Tokyo",
        "LC_ALL": "C",
    }
    subprocess.run(
        [sys.executable, "-c", script, str(path)],
        env=os.environ | elsewhere,
        check=True,
        capture_output=True,
    )
    assert (path / "report.html").read_bytes() == first


def test_figures_take_colours_from_the_page(make_run):
    text = write_report(make_run()).read_text()
    figures = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(figures) == 4
    for figure in figures:
        assert not re.findall(r"#[0-9a-f]{6}\b", figure)
        assert "var(--" in figure and 'aria-label="' in figure
    defined = set(re.findall(r"(--[\w-]+):", text))
    assert set(re.findall(r"var\((--[\w-]+)\)", text)) <= defined


def hostile_manifest() -> dict:
    manifest = manifest_for("e2e")
    manifest["task"] = HOSTILE
    manifest["base"] = {"name": HOSTILE, "digest": HOSTILE, "num_parameters": HOSTILE}
    manifest["versions"] = {HOSTILE: HOSTILE}
    manifest["data"]["train"] |= {"path": HOSTILE, "statement": HOSTILE, "format": HOSTILE}
    manifest["data"]["train"]["example"] = [[HOSTILE, True], [HOSTILE, False], "no pair", [1, 2]]
    manifest["data"][HOSTILE] = {"length_histogram": {"edges": [0, 1], "counts": [3]}}
    manifest["adapters"] = {HOSTILE: {"num_parameters": "x"}, "日本 $a$": {"scores": SCORES}}
    return manifest


def test_hostile_strings_stay_text(make_run):
    sample = dict.fromkeys(("input", "before", "after", "adapter"), HOSTILE) | {
        "references": [HOSTILE]
    }
    unseen = "a\x00b\x1b[31mc\u202egnp.exe\ud800"
    path = make_run(
        manifest=hostile_manifest(),
        samples=[
            sample,
            {"input": unseen, "before": unseen, "after": unseen, "references": [unseen]},
        ],
        summary={
            "status": HOSTILE,
            "stopped_because": HOSTILE,
            "scores": {HOSTILE: SCORES["chrf"], "日本語": SCORES["chrf"]},
            "resources": {"device": HOSTILE, "seconds": HOSTILE},
        },
    )
    with open(path / "config.yaml", "a") as file:
        file.write("nasty: '<script>alert(2)</script>'  # <script>alert(3)</script>\n")
    with open(path / "events.jsonl", "a") as file:
        file.write('{"kind": "warning", "text": "<script>alert(4)</script>", "step": "<b>"}\n')
    text, page = read_page(write_report(path))
    assert "script" not in page.tags and "img" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "{{7*7}}" in page.text and "49" not in page.text.split("{{7*7}}")[1][:3]
    assert page.text.count("<script>alert(1)</script>") > 10
    assert "<script>alert(2)</script>" in page.text and "<script>alert(4)</script>" in page.text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", text)
    assert "a␀b␛[31mc�gnp.exe�" in page.text
    assert len(page.ids) == len(set(page.ids))


@pytest.mark.parametrize("status", ["interrupted", "failed"])
def test_run_without_scores(make_run, status):
    path = make_run(num_steps=15, samples=[], summary={"status": status})
    page = read_page(write_report(path))[1]
    assert "no verdict" in page.text
    assert "ended before base and tuned were scored" in page.text
    assert "Before and after" not in page.text
    assert page.tags.count("svg") == 3


def test_killed_run_and_torn_rows(make_run):
    path = make_run(finish=False)
    with open(path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 2')
    page = read_page(write_report(path))[1]
    assert "stopped without an end, can be resumed" in page.text
    assert "is torn and was passed over" in page.text


def test_bare_run(tmp_path):
    (tmp_path / "run.json").write_text('{"lorica": "0.1.0", "status": "running"}')
    page = read_page(write_report(tmp_path))[1]
    assert "No step was logged." in page.text and "no adapter yet" in page.text


@pytest.mark.parametrize("wrong", ["[]", "3", '"x"', "null"])
def test_manifest_with_wrong_types_is_no_crash(tmp_path, wrong):
    keys = (
        "base",
        "data",
        "method",
        "adapters",
        "plan",
        "scores",
        "resources",
        "versions",
        "resumed",
    )
    inner = ", ".join(f'"{key}": {wrong}' for key in keys)
    (tmp_path / "run.json").write_text(f'{{"lorica": "0.1.0", {inner}}}')
    assert "No step was logged." in write_report(tmp_path).read_text()


def test_no_run_is_an_error(tmp_path):
    with pytest.raises(DataError, match="is not a run folder"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_several_adapters(make_run):
    own = {"a": {"scores": SCORES}, "b": {"scores": {"chrf": SCORES["chrf"] | {"low": -1.0}}}}
    text, page = read_page(write_report(make_run(adapters=("a", "b"), summary={"adapters": own})))
    assert "a: better than the base" in page.text
    assert "b: no evidence that it is better than the base" in page.text
    assert "2 adapters on" in page.text
    assert text.count('class="swatch"') == 2
    assert "adapters/a" in page.text and "adapters/b" in page.text
    assert len(page.ids) == len(set(page.ids))


@pytest.mark.parametrize(
    ("task", "unit"), [("causal-lm", "nats per token"), ("text-classification", "nats per record")]
)
def test_the_loss_has_the_unit_of_its_task(make_run, task, unit):
    text, _ = read_page(write_report(make_run(manifest=manifest_for("e2e") | {"task": task})))
    assert [u for u in ("nats per token", "nats per record") if u in text] == [unit]


def test_disagreeing_scores_are_said(make_run):
    worse = SCORES["perplexity"] | {"tuned": 99.0, "difference": 6.9, "low": 4.0, "high": 9.0}
    path = make_run(summary={"scores": {"chrf": SCORES["chrf"], "perplexity": worse}})
    assert "But worse than the base in perplexity." in read_page(write_report(path))[1].text


def test_resumed_run_says_so(make_run):
    path = make_run(manifest=manifest_for("e2e") | {"resumed": [{"step": 40, "at": "noon"}]})
    assert "Resumed from step 40 (noon)." in read_page(write_report(path))[1].text


@pytest.mark.parametrize(
    ("low", "high", "higher", "kind"),
    [
        (1, 2, True, "better"),
        (-2, -1, True, "worse"),
        (-1, 1, True, "unclear"),
        (-2, -1, False, "better"),
        (1, 2, False, "worse"),
        (0, 1, True, "unclear"),
        (None, None, True, "unclear"),
        (float("nan"), 1, True, "unclear"),
    ],
)
def test_verdict(low, high, higher, kind):
    score = {"base": 1.0, "tuned": 2.0, "low": low, "high": high, "higher_is_better": higher}
    assert verdict("chrf", score).kind == kind


def test_verdict_without_an_interval_says_so():
    sentence = verdict("accuracy", {"base": 0.5, "tuned": 0.75, "num_records": 1}).sentence
    assert sentence == (
        "no evidence that it is better than the base: accuracy 0.500 → 0.750 "
        "(difference +0.250, no interval, n = 1)"
    )


def test_numbers_in_words():
    assert [rate(value) for value in (2e-4, 1.852e-5, 0, 1.0, None)] == [
        "2e-4",
        "1.85e-5",
        "0",
        "1e0",
        "–",
    ]
    assert [size(value) for value in (12, 101_300, 1.4e9, 5e12)] == [
        "12 bytes",
        "98.9 KiB",
        "1.3 GiB",
        "4657 GiB",
    ]
    assert [clock(value) for value in (0, 61, 3_723, -5)] == ["0:00", "1:01", "1:02:03", "0:00"]
    assert [duration(value) for value in (4.25, 151.2, 7_260)] == [
        "4.2 s",
        "2 min 31 s",
        "2 h 1 min",
    ]
    assert [parameters(value) for value in (812, 24_576, 8.03e9)] == ["812", "24.6 K", "8.03 B"]
    assert count(1_234_567.4) == "1,234,567"
    assert score_cells({"base": 0.0, "tuned": 38.9})["tuned"] == "38.9"
    assert score_cells({"base": 0.42, "tuned": 38.9})["base"] == "0.42"


def test_smoothing():
    assert smoothed([3.0] * 101) == pytest.approx([3.0] * 101)
    assert smoothed([float(i) for i in range(100)]) == pytest.approx(list(range(100)))  # no lag
    assert smoothed([]) == []
    mean = RunningMean(0.9)
    assert mean.update(float("nan")) is None
    assert mean.update(5.0) == pytest.approx(5.0)
    assert mean.update(float("inf")) == pytest.approx(5.0)


def test_thinning_keeps_the_extremes():
    values = [1.0] * 10_007
    values[5_003], values[9_999] = 9.0, -9.0
    xs, ys = thinned(list(range(10_007)), values, 400)
    assert len(xs) <= 400 and max(ys) == 9.0 and min(ys) == -9.0
    assert xs == sorted(xs) and ys[xs.index(5_003)] == 9.0
    assert thinned([1, 2], [3, 4], 400) == ([1, 2], [3, 4])


def test_figures_of_ugly_rows():
    assert loss_figure([]) is None and rate_figure([]) is None and score_figure({}, "x") is None
    assert length_figure({"edges": [0], "counts": []}, "x") is None
    rows = [{"loss": 1.0}, {"step": 1, "loss": None}, {"step": 2, "loss": "x", "text": "y"}]
    assert loss_figure(curves_of(rows)) is None
    one = loss_figure(curves_of([{"step": 7, "loss": 1.5}]))
    assert one is not None and "loss-figure_1" in one
    spike = [{"step": i, "loss": 1.0 if i != 50 else 1e6} for i in range(100)]
    assert "log scale" in (loss_figure(curves_of(spike)) or "")
    flat = Curves("a", {"loss": ([1.0, 2.0], [0.0, 0.0]), "grad_norm": ([1.0], [0.0])})
    assert loss_figure([flat]) is not None and rate_figure([flat]) is not None
    negative = {"m": {"base": -0.5, "tuned": -0.25, "low": 0.1, "high": 0.4}, "n": {"tuned": 0.0}}
    assert "−0.250" in (score_figure(negative, "x") or "")


def test_large_run_stays_a_small_page(make_run):
    path = make_run()
    with open(path / "metrics.jsonl", "w") as file:
        for step in range(50_000):
            file.write(
                f'{{"step": {step}, "loss": {1 + (step * 7919 % 101) / 100}, "grad_norm": 1.0}}\n'
            )
    assert write_report(path).stat().st_size < 200_000
