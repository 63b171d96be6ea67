"""The report agrees with the files, needs no other file, and renders in a real browser."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from medlit.evaluation.calibration import at_temperature
from medlit.evaluation.intervals import compare_systems
from medlit.evaluation.metrics import REPORTED, Metric
from medlit.evaluation.results import Results
from medlit.evaluation.sets import sets_report
from medlit.report import page as report_page
from medlit.report.page import FILES, confused_pairs, write_report
from medlit.report.systems import System, systems, write_system

NAMES = ("Bones & joints", "ENT | Throat", "Heart <3>")
Make = Callable[..., System]


@pytest.fixture
def make() -> Make:
    """A made-up system's answers to the same ninety notes."""
    return maker()


def maker() -> Make:
    draw = np.random.default_rng(0)
    truth = draw.integers(0, 3, 90)
    texts = [f"{text:032x}" for text in draw.integers(0, 80, 90)]
    tokens = draw.integers(60, 900, 90)

    def make(name: str, signal: float, probabilities: bool = True, invalid: int = 0) -> System:
        scores = draw.normal(size=(90, 3)) + signal * np.eye(3)[truth]
        p = at_temperature(np.exp(scores), 1.0)
        answer = p.argmax(axis=1)
        answer[:invalid] = 3
        ids = [f"note-{i}" for i in range(90)]
        cut = np.where(tokens > 800, 5, 0)
        given = p if probabilities else None
        results = Results(NAMES, np.arange(90), ids, texts, truth, answer, given, tokens, cut, truth[:, None].tolist())
        return System.score(name, results, loss=0.5)

    return make


class Page(HTMLParser):
    """Tags, links and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.strings: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]

    def handle_data(self, data: str) -> None:
        self.strings.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.strings).split())


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder that tests get a copy of: its intervals take a second."""
    folder, make = tmp_path_factory.mktemp("systems"), maker()
    for system in (
        make("majority", 0, probabilities=False),
        make("tfidf", 1.5),
        make("test", 2.5),
        make("zero_shot", 1, probabilities=False, invalid=30),
    ):
        write_system(folder, system)
    (folder / "config_test.yaml").write_text("data:\n  source: '<notes>.csv'\n")
    return folder


@pytest.fixture
def folder(tmp_path: Path, written: Path) -> Path:
    """A run folder of four systems."""
    return shutil.copytree(written, tmp_path / "tiny" / "version_0")


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("several", [False, True])
def test_any_of_is_named_where_a_note_has_several_labels(tmp_path: Path, make: Make, several: bool) -> None:
    results = make("test", 2).results
    accepted = [sorted({label, *range(several + 1)}, key=label.__ne__) for label in results.truth.tolist()]
    for name in ("test", "tfidf"):
        own = accepted if several else results.accepted
        write_system(tmp_path, System.score(name, replace(results, accepted=own), loss=0.5))
    write_report(tmp_path)
    for file in FILES:
        text = unescape((tmp_path / file).read_text(encoding="utf-8")).lower()
        assert ("any-of accuracy: the answer is one of the note's specialties" in text) == several
        assert ("any-of" in text) == several


@pytest.mark.parametrize("key", ["0.9", "set"])
def test_sets_are_reported(tmp_path: Path, make: Make, key: str) -> None:
    system = make("test", 2)
    assert system.results.probabilities is not None
    thresholds = {"0.6": 0.7, "0.9": 0.2, "set": 0.4}
    metrics = {**system.metrics, "sets": sets_report(system.results, 1.0, thresholds, key)}
    write_system(tmp_path, replace(system, metrics=metrics))
    drawn = write_report(tmp_path)
    text, sets = (tmp_path / "report.md").read_text(encoding="utf-8"), metrics["sets"]
    assert "sets" in drawn
    row = next(line for line in text.split("## Prediction sets")[1].splitlines() if line.startswith("| ENT"))
    of_class = sets["per_class"][NAMES[1]]
    assert row.split(" | ")[-3:] == [
        str(of_class["notes"]),
        f"{of_class['coverage']:.1%} ({of_class['coverage_ci'][0]:.1%} to {of_class['coverage_ci'][1]:.1%})",
        f"{of_class['mean_size']:.2f} |",
    ]
    promises = "with probability 0.9, if new notes are like the validation notes" in text
    assert promises == (key == "0.9")
    assert f"micro F1 {sets['f1_micro']:.3f}" in text


def test_the_page_needs_no_other_file(folder: Path) -> None:
    write_report(folder)
    page = Page((folder / "report.html").read_text())
    assert len(page.links) == 5
    assert all(link.startswith("data:image/svg+xml;base64,") for link in page.links)
    pictures = [base64.b64decode(link.partition(",")[2]).decode() for link in page.links]
    assert all(picture.lstrip().startswith("<?xml") and "http" not in _no_namespaces(picture) for picture in pictures)
    assert "script" not in page.tags
    assert "url(" not in (folder / "report.html").read_text().replace("url(#", "")


def _no_namespaces(picture: str) -> str:
    """A picture without XML namespaces and metadata, whose names look like addresses."""
    declared = r'xmlns(:\w+)?="[^"]*"|<!DOCTYPE[^>]*>|<metadata>.*?</metadata>'
    return re.sub(declared, "", picture, flags=re.DOTALL)


def test_both_pages_agree_with_the_files(folder: Path) -> None:
    write_report(folder)
    found = systems(folder)
    assert [system.name for system in found] == ["test", "tfidf", "zero_shot", "majority"]
    html, markdown = Page((folder / "report.html").read_text()).text, (folder / "report.md").read_text()
    for system in found:
        row = next(line for line in markdown.splitlines() if line.startswith(f"| {system.title} |"))
        assert f"{system.metrics['balanced_accuracy']:.1%}" in row
        for number in (f"{system.metrics['accuracy']:.1%}", f"{system.metrics['f1_macro']:.3f}"):
            assert number in row
            assert number in html
    for other in found[1:]:
        sentence = compare_systems(found[0].results, other.results).summary(other.title, "the fine-tuned model")
        assert sentence in html
        assert f"- {sentence}" in markdown
    assert "<notes>.csv" in html
    assert all(name in html for name in NAMES)


@pytest.mark.usefixtures("undrawn")
def test_a_label_cannot_break_a_table_or_the_page(folder: Path) -> None:
    write_report(folder)
    lines = (folder / "report.md").read_text().splitlines()
    tables = [line for line in lines if line.startswith("|")]
    cells = {len(re.findall(r"(?<!\\)\|", line)) for line in tables if "Heart" in line or "ENT" in line}
    assert cells == {6, 5}  # specialties: five cells; pairs: four
    assert "Heart &lt;3&gt;" in (folder / "report.html").read_text()


def test_the_same_files_make_the_same_page(folder: Path) -> None:
    write_report(folder)
    first = (folder / "report.html").read_bytes()
    write_report(folder)
    assert (folder / "report.html").read_bytes() == first
    assert not list(folder.glob(".*"))


def test_without_probabilities_or_others_there_are_fewer_figures(tmp_path: Path, make: Make) -> None:
    write_system(tmp_path, make("test", 2, probabilities=False))
    assert set(write_report(tmp_path)) == {"classes", "confusion", "length"}
    assert "No other system" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("n", [1, 90])
@pytest.mark.parametrize("right", [True, False])
def test_a_test_without_an_error_or_without_a_right_answer_is_reported(
    tmp_path: Path, make: Make, n: int, right: bool
) -> None:
    results = make("test", 1).results
    answer = (results.truth + (0 if right else 1)) % 3
    first = replace(results, answer=answer, probabilities=np.eye(3)[answer]).select(np.arange(n))
    write_system(tmp_path, System.score("test", first, loss=0.5))
    assert set(write_report(tmp_path)) == {"classes", "confusion", "reliability", "risk_coverage", "length"}
    assert ("Most confused pairs" in (tmp_path / "report.md").read_text()) != right


@pytest.mark.usefixtures("undrawn")
def test_baselines_alone_are_reported_too(tmp_path: Path, make: Make) -> None:
    assert write_report(tmp_path) == {}
    write_system(tmp_path, make("tfidf", 2))
    write_system(tmp_path, make("majority", 0, probabilities=False))
    write_report(tmp_path)
    assert "# Test report: TF-IDF + logistic regression" in (tmp_path / "report.md").read_text()


@pytest.mark.usefixtures("undrawn")
def test_a_system_of_other_notes_is_left_out_with_a_message(folder: Path, make: Make) -> None:
    other = make("zero_shot", 1)
    write_system(folder, replace(other, results=replace(other.results, ids=[f"x{i}" for i in range(90)])))
    write_report(folder)
    for page in ("report.html", "report.md"):
        text = (folder / page).read_text()
        assert "Left out: zero-shot, which was tested on other notes." in text
        assert "Against zero-shot" not in text


def test_the_most_frequent_errors_come_first(make: Make) -> None:
    results = make("test", 1.0, invalid=4).results
    pairs = confused_pairs(results)
    assert sum(n for *_, n, _ in pairs) == (~results.correct).sum() - 4
    assert [n for *_, n, _ in pairs] == sorted((n for *_, n, _ in pairs), reverse=True)
    assert {name for true, answer, *_ in pairs for name in (true, answer)} <= set(NAMES)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("invalid", [0, 90])
def test_without_confused_pairs_there_is_no_such_section(tmp_path: Path, make: Make, invalid: int) -> None:
    write_system(tmp_path, make("test", 90.0, invalid=invalid))
    write_report(tmp_path)
    for page in ("report.html", "report.md"):
        assert "Most confused pairs" not in (tmp_path / page).read_text()


@pytest.mark.usefixtures("undrawn")
def test_a_new_metric_is_a_new_column_and_old_files_have_an_empty_cell(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_page, "REPORTED", (*REPORTED, Metric("kappa", "Cohen's kappa")))
    path = folder / "test_metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"kappa": 0.1234}))
    write_report(folder)
    lines = (folder / "report.md").read_text().splitlines()
    assert next(line for line in lines if line.startswith("| system |")).endswith("| Cohen's kappa |")
    assert next(line for line in lines if line.startswith("| fine-tuned |")).endswith("| 0.123 |")
    assert next(line for line in lines if line.startswith("| zero-shot |")).endswith("| – |")  # noqa: RUF001


@pytest.mark.usefixtures("undrawn")
def test_the_figure_and_the_table_have_one_order(folder: Path) -> None:
    axes = write_report(folder)["classes"].axes[0]
    shown = [label.get_text().rpartition(" (")[0] for label in axes.get_yticklabels()][::-1]
    rows = (folder / "report.md").read_text().partition("| specialty |")[2].splitlines()[2:5]
    assert shown == [row.replace(r"\|", "~").split("|")[1].strip().replace("~", "|") for row in rows]
    assert "Bars: fine-tuned; dots: the others." in (folder / "report.html").read_text()


@pytest.mark.usefixtures("undrawn")
def test_a_test_of_the_base_model_is_called_zero_shot(tmp_path: Path, make: Make) -> None:
    write_system(tmp_path, make("test", 2, probabilities=False))
    facts = {"data": {"source": "a", "split": "official", "seed": None}, "run": {"weights": "the bare base model"}}
    (tmp_path / "test_facts.json").write_text(json.dumps(facts))
    write_report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "# Test report: zero-shot\n" in text
    assert "| zero-shot |" in text
    assert "fine-tuned" not in text
    assert "| split | official |" in text
    assert "needs probabilities, which the decoders" in text


@pytest.mark.usefixtures("undrawn")
def test_settings_of_lightning_at_their_defaults_are_left_out(folder: Path) -> None:
    config = "trainer:\n  max_steps: 7\n  max_time: null\n  barebones: false\nearly_stopping:\n  mode: min\n"
    (folder / "config_test.yaml").write_text(config + "data:\n  revision: null\n")
    write_report(folder)
    shown = (folder / "report.md").read_text().partition("```yaml\n")[2].partition("```")[0]
    assert shown == "trainer:\n  max_steps: 7\ndata:\n  revision: null\n"


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("missing", ["per_class", "ece", "accuracy_ci", "accuracy_at_80", "temperature", "aurc"])
def test_metrics_of_an_older_version_are_reported(folder: Path, missing: str) -> None:
    for path in folder.glob("*_metrics.json"):
        metrics = json.loads(path.read_text())
        del metrics[missing]
        path.write_text(json.dumps(metrics))
    assert ("classes" in write_report(folder)) == (missing != "per_class")


@pytest.mark.usefixtures("undrawn")
def test_facts_of_an_older_version_are_reported(folder: Path) -> None:
    facts = {
        "data": {"source": "notes.csv", "split": "grouped", "seed": 1, "rows": {"test": 90}},
        "versions": {"a": "1"},
    }
    (folder / "test_facts.json").write_text(json.dumps(facts))
    write_report(folder)
    assert "| source | notes.csv |" in (folder / "report.md").read_text()


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium")
@pytest.mark.parametrize("width", [1200, 420])
def test_a_browser_shows_every_figure_and_nothing_overflows(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setattr(report_page, "REPORTED", (*REPORTED, Metric("brier", "one more column")))
    write_report(folder)
    probe = (
        "<script>addEventListener('load', () => { document.title = JSON.stringify({"
        "width: document.documentElement.scrollWidth - innerWidth,"
        "tables: [...document.querySelectorAll('.table')].map(t => t.scrollWidth - t.clientWidth),"
        "pictures: [...document.images].map(i => i.complete && i.naturalWidth > 100),"
        "requests: performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length"
        "}) })</script>"
    )
    page = tmp_path / "probed.html"
    page.write_text((folder / "report.html").read_text().replace("</body>", f"{probe}</body>"))
    arguments = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900"]
    arguments += [f"--user-data-dir={tmp_path / 'profile'}", "--no-first-run", "--disable-background-networking"]
    dom = subprocess.run(
        [*arguments, "--dump-dom", page.as_uri()], capture_output=True, text=True, check=True, timeout=120
    ).stdout
    found = json.loads(re.search(r"<title>(.*?)</title>", dom)[1].replace("&quot;", '"'))  # type: ignore[index]
    assert found["width"] <= 0
    assert width < 1200 or max(found["tables"]) <= 0, "a table scrolls sideways"
    assert found["pictures"] == [True] * 5
    assert found["requests"] == 0
    picture = tmp_path / "page.png"
    subprocess.run([*arguments, f"--screenshot={picture}", page.as_uri()], capture_output=True, check=True, timeout=120)
    assert picture.stat().st_size > 20_000
