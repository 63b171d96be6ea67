"""The report says what the files say, is one file that needs no other, and shows itself in a real browser."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from medlit.data.labels import LabelSet
from medlit.evaluation.calibration import at_temperature
from medlit.evaluation.compare import compare
from medlit.evaluation.results import Results
from medlit.evaluation.uncertainty import doubt
from medlit.model.metrics import SpecialtyMetrics
from medlit.report.content import beside_pairs, confused_pairs
from medlit.report.page import write_report
from medlit.report.systems import System, systems, write_system

NAMES = ("Bones & joints", "ENT | Throat", "Heart <3>")
Make = Callable[..., System]


@pytest.fixture
def make() -> Make:
    """A made-up system's answers to the same ninety notes."""
    draw = np.random.default_rng(0)
    truth = draw.integers(0, 3, 90)
    texts = [f"{text:032x}" for text in draw.integers(0, 80, 90)]
    tokens = draw.integers(60, 900, 90)

    def make(name: str, signal: float, probabilities: bool = True, off: int = 0) -> System:
        scores = draw.normal(size=(90, 3)) + signal * np.eye(3)[truth]
        p = at_temperature(np.exp(scores), 1.0)
        answer = p.argmax(axis=1)
        answer[:off] = 3
        ids = [f"note-{i}" for i in range(90)]
        cut = np.where(tokens > 800, 5, 0)
        given = p if probabilities else None
        answered = Results(NAMES, np.arange(90), ids, texts, truth, answer, given, tokens, cut)
        counted = SpecialtyMetrics(LabelSet(NAMES))
        counted.update(torch.tensor(answer), torch.tensor(truth))
        return System(name, {**counted.scores(), **doubt(answered), "loss": 0.5}, answered)

    return make


class Page(HTMLParser):
    """What a page asks for from elsewhere, and what it says."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture
def folder(tmp_path: Path, make: Make) -> Path:
    """A run folder of four systems."""
    folder = tmp_path / "tiny" / "version_0"
    folder.mkdir(parents=True)
    for system in (
        make("majority", 0, probabilities=False),
        make("tfidf", 1.5),
        make("test", 2.5),
        make("zero_shot", 1, probabilities=False, off=30),
    ):
        write_system(folder, system)
    (folder / "config_test.yaml").write_text("data:\n  source: '<notes>.csv'\n")
    return folder


def test_one_page_that_needs_nothing_else(folder: Path) -> None:
    write_report(folder)
    page = Page((folder / "report.html").read_text())
    assert len(page.links) == 5
    assert all(link.startswith("data:image/svg+xml;base64,") for link in page.links)
    pictures = [base64.b64decode(link.partition(",")[2]).decode() for link in page.links]
    assert all(picture.lstrip().startswith("<?xml") and "http" not in _no_namespaces(picture) for picture in pictures)
    assert "script" not in page.tags
    assert "url(" not in (folder / "report.html").read_text().replace("url(#", "")


def _no_namespaces(picture: str) -> str:
    """A picture without what it says of XML and of itself: names that look like addresses and are none."""
    declared = r'xmlns(:\w+)?="[^"]*"|<!DOCTYPE[^>]*>|<metadata>.*?</metadata>'
    return re.sub(declared, "", picture, flags=re.DOTALL)


def test_both_pages_say_what_the_files_say(folder: Path) -> None:
    write_report(folder)
    found = systems(folder)
    assert [system.name for system in found] == ["test", "tfidf", "zero_shot", "majority"]
    html, markdown = Page((folder / "report.html").read_text()).text, (folder / "report.md").read_text()
    for system in found:
        row = next(line for line in markdown.splitlines() if line.startswith(f"| {system.title} |"))
        for number in (f"{system.metrics['accuracy']:.1%}", f"{system.metrics['f1_macro']:.3f}"):
            assert number in row
            assert number in html
    for other in found[1:]:
        sentence = compare(found[0].answered, other.answered).words(other.title)
        assert sentence in html
        assert f"- {sentence}" in markdown
    assert "<notes>.csv" in html
    assert all(name in html for name in NAMES)


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


def test_without_probabilities_or_others_there_is_less_to_show(tmp_path: Path, make: Make) -> None:
    write_system(tmp_path, make("test", 2, probabilities=False))
    assert set(write_report(tmp_path)) == {"classes", "confusion", "length"}
    assert "No other system" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("n", [1, 90])
@pytest.mark.parametrize("right", [True, False])
def test_a_test_without_an_error_or_without_a_right_answer_is_reported(
    tmp_path: Path, make: Make, n: int, right: bool
) -> None:
    answered = make("test", 1).answered
    answer = (answered.truth + (0 if right else 1)) % 3
    first = Results(
        NAMES,
        answered.rows[:n],
        answered.ids[:n],
        answered.text_hashes[:n],
        answered.truth[:n],
        answer[:n],
        np.eye(3)[answer][:n],
        answered.tokens[:n],
        answered.cut_tokens[:n],
    )
    counted = SpecialtyMetrics(LabelSet(NAMES))
    counted.update(torch.tensor(first.answer), torch.tensor(first.truth))
    write_system(tmp_path, System("test", {**counted.scores(), **doubt(first), "loss": 0.5}, first))
    assert set(write_report(tmp_path)) == {"classes", "confusion", "reliability", "risk_coverage", "length"}
    assert ("Every note was answered rightly." in (tmp_path / "report.md").read_text()) == right


def test_baselines_alone_are_reported_too(tmp_path: Path, make: Make) -> None:
    assert write_report(tmp_path) == {}
    write_system(tmp_path, make("tfidf", 2))
    write_system(tmp_path, make("majority", 0, probabilities=False))
    write_report(tmp_path)
    assert "How good is TF-IDF + logistic regression?" in (tmp_path / "report.md").read_text()


def test_a_system_of_other_notes_is_left_out_and_said_to_be(folder: Path, make: Make) -> None:
    other = make("head", 1)
    write_system(folder, replace(other, answered=replace(other.answered, ids=[f"x{i}" for i in range(90)])))
    write_report(folder)
    for page in ("report.html", "report.md"):
        text = (folder / page).read_text()
        assert "Left out: classification head, which was tested on other notes." in text
        assert "Against classification head" not in text


def test_the_commonest_errors_come_first(make: Make) -> None:
    answered = make("test", 1.0, off=4).answered
    pairs = confused_pairs(answered)
    assert sum(n for *_, n, _ in pairs) == (~answered.correct).sum() - 4
    assert [n for *_, n, _ in pairs] == sorted((n for *_, n, _ in pairs), reverse=True)
    assert {name for true, answer, *_ in pairs for name in (true, answer)} <= set(NAMES)
    assert "errors 4 are answers that are not on the list" in beside_pairs(answered)


@pytest.mark.parametrize(
    ("off", "said"),
    [(90, "of 90 errors all are answers that are not on the list"), (0, "Every note was answered rightly")],
)
def test_without_a_pair_the_page_says_why(tmp_path: Path, make: Make, off: int, said: str) -> None:
    write_system(tmp_path, make("test", 90.0, off=off))
    write_report(tmp_path)
    for page in ("report.html", "report.md"):
        text = (tmp_path / page).read_text()
        assert said in text
        assert "share of the true specialty" not in text


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium")
@pytest.mark.parametrize("width", [1200, 420])
def test_a_browser_shows_every_figure_and_no_text_runs_out_of_the_page(
    folder: Path, tmp_path: Path, width: int
) -> None:
    write_report(folder)
    probe = (
        "<script>addEventListener('load', () => { document.title = JSON.stringify({"
        "width: document.documentElement.scrollWidth - innerWidth,"
        "pictures: [...document.images].map(i => i.complete && i.naturalWidth > 100),"
        "requests: performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length"
        "}) })</script>"
    )
    page = tmp_path / "probed.html"
    page.write_text((folder / "report.html").read_text().replace("</body>", f"{probe}</body>"))
    arguments = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900"]
    dom = subprocess.run(
        [*arguments, "--dump-dom", page.as_uri()], capture_output=True, text=True, check=True, timeout=120
    ).stdout
    found = json.loads(re.search(r"<title>(.*?)</title>", dom)[1].replace("&quot;", '"'))  # type: ignore[index]
    assert found["width"] <= 0
    assert found["pictures"] == [True] * 5
    assert found["requests"] == 0
    picture = tmp_path / "page.png"
    subprocess.run([*arguments, f"--screenshot={picture}", page.as_uri()], capture_output=True, check=True, timeout=120)
    assert picture.stat().st_size > 20_000
