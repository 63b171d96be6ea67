"""A service without a model: `python fake_service.py PORT` starts it, and its page has a probe at /probe.

With `KILLS` or `SLOW` as its second argument its model is killed while it loads, or takes half a minute.

Its predictor takes two seconds for a note of `SLOW`, is killed by a note of `KILLS`, and fails on a note of `FAILS`
as a bug does, with the note in the exception's message.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from fastapi import Request
from fastapi.responses import HTMLResponse

from medlit.cli import end_on_signals
from medlit.predictions.table import Prediction, SetPrediction
from medlit.tools.serve import service
from medlit.tools.serve.service import Classifier, Server, make_server

SLOW, FAILS, KILLS = "a slow note", "a note that fails", "a note that kills"
ABOUT = {"base_model": "none", "labels": ["Heart", "Bone"], "mode": "likelihood", "coverage": 0.9}


class FakePredictor:
    """Files a note under its first word; a note of several words has a set."""

    def predict(self, notes: list[str]) -> list[Prediction]:
        if SLOW in notes:
            time.sleep(2)
        if KILLS in notes:
            os.kill(os.getpid(), signal.SIGKILL)
        if FAILS in notes:
            raise ValueError(f"no idea what this is: {notes}")
        return [self._one(note) for note in notes]

    def _one(self, note: str) -> Prediction:
        first, *others = note.split()
        if not others:
            return Prediction(first, first, 0.75, 0.5, "Bone", False, 3)
        return SetPrediction(None, first, 0.5, 0.25, "Bone", True, 0, [first, "Bone"], 2, [0.5, 0.25])


class FakeClassifier(Classifier):
    """Has the fake in place of a model."""

    def setup(self, device: str) -> None:
        if SLOW in self.settings:
            time.sleep(30)
        if KILLS in self.settings:
            os.kill(os.getpid(), signal.SIGKILL)
        self.predictor = FakePredictor()


def fake_server(token: str = "", *settings: str) -> Server:
    return make_server(FakeClassifier(Path(), dict.fromkeys(settings)), ABOUT, token)


# Classifies a note and a dropped table as a person does, and leaves what it sees in the page's title.
PROBE = """<script>
addEventListener("load", async () => {
  const until = async ready => { while (!ready()) await new Promise(done => setTimeout(done, 20)); };
  at("note").value = "Heart <b>races</b>";
  at("classify").click();
  await until(() => at("answer").querySelector(".bar"));
  const seen = {bars: [...document.querySelectorAll(".bar")].map(bar => bar.innerText.split(/\\s+/).join(" "))};
  seen.pixels = Math.round(document.querySelector(".bar i").getBoundingClientRect().width);
  seen.widths = [...document.querySelectorAll(".bar i")].map(bar => bar.style.width);
  seen.answer = at("answer").innerText;
  const files = new DataTransfer();
  files.items.add(new File(['id,transcription\\n1,"Heart, it\\nraces"\\n2,Bone\\n3,\\n'], "new.csv"));
  at("drop").dispatchEvent(new DragEvent("drop", {dataTransfer: files, bubbles: true, cancelable: true}));
  await until(() => !at("columns").hidden);
  at("label").click();
  await until(() => !at("done").hidden);
  seen.rows = [...at("rows").querySelectorAll("tr")].map(row => row.cells[1].innerText);
  let saved = null;
  URL.createObjectURL = blob => { saved = blob; return "data:,"; };
  at("download").click();
  seen.table = await saved.text();
  seen.overflow = document.documentElement.scrollWidth - innerWidth;
  seen.requests = performance.getEntriesByType("resource").map(e => e.name).filter(name => !name.startsWith("data:"));
  document.title = JSON.stringify(seen);
});
</script></body>"""


if __name__ == "__main__":
    end_on_signals()
    server = fake_server("", *sys.argv[2:])
    page = Path(service.__file__).with_name("page.html").read_text("utf-8")

    async def probe(request: Request) -> HTMLResponse:
        return HTMLResponse(page.replace("</body>", PROBE))

    server.app.add_route("/probe", probe)
    server.serve("127.0.0.1", int(sys.argv[1]))
