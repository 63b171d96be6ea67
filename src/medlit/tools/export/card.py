"""The model card: README.md with the Hub's metadata, from a run folder's files and the verification; no notes.

`card.md.j2` is its text; `card.yaml` holds the licences of base models, among others.
"""

import shutil
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard
from jinja2 import Environment, PackageLoader, StrictUndefined, UndefinedError

from medlit.base_model import hub_id
from medlit.data.prompt import NotePrompt
from medlit.data.sources import public_name
from medlit.errors import UserError
from medlit.evaluation.metrics import HEADLINE, applicable, number, percent
from medlit.paths import __version__
from medlit.report.systems import FACTS, MODEL, comparable, read_run_file
from medlit.tools import license_of
from medlit.tools.export.source import Weights
from medlit.tools.export.verify import Verification

FIGURE = "confusion.png"
_WORDS: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("card.yaml").read_text(encoding="utf-8"))

# Markdown, not HTML: only the bars in a table's cells need escaping, which the template does.
TEMPLATES = Environment(trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
TEMPLATES.loader = PackageLoader("medlit.tools", "export")
TEMPLATES.globals |= {"number": number, "percent": percent, "public_name": public_name, "hub_id": hub_id}
TEMPLATES.filters["cell"] = lambda value: str(value).replace("|", r"\|")


def write_card(folder: Path, weights: Weights, target: str, verification: Verification, prompt: NotePrompt) -> None:
    """Write `README.md`, the confusion matrix that it shows and, beside GGUF files, Ollama's `Modelfile`."""

    def read(name: str) -> dict[str, Any]:
        return {} if weights.run is None else read_run_file(weights.run / name)

    command = next((name for name in _WORDS["measured_on"] if read(f"{name}_metrics.json")), None)
    metrics = read(f"{command}_metrics.json") if command else {}
    tested = comparable(weights.run)[0] if weights.run is not None and command == "test" else []  # baselines too
    systems = [("this model" if each.name == MODEL else each.title, each.metrics) for each in tested]
    if weights.run is not None and (figure := weights.run / f"confusion_{command}.png").is_file():
        shutil.copyfile(figure, folder / FIGURE)
    files = sorted(path.name for path in folder.glob("*.gguf"))
    if files:
        modelfile = TEMPLATES.get_template("Modelfile.j2").render(prompt=prompt, file=files[0])
        (folder / "Modelfile").write_text(modelfile, encoding="utf-8")
    try:
        text = TEMPLATES.get_template("card.md.j2").render(
            target=target,
            version=__version__,
            weights=weights,
            words=_WORDS,
            license=license_of(weights.language_model.base_model, weights.language_model.revision),
            fit=read("config_fit.yaml"),
            data=read(FACTS).get("data", {}),
            command=command,
            metrics=metrics,
            columns=applicable(HEADLINE, metrics),
            systems=systems or [("this model", metrics)],
            figure=FIGURE if (folder / FIGURE).is_file() else None,
            verification=verification.rows,
            files=files,
            prompt=prompt,
        )
    except UndefinedError as error:
        raise UserError(
            f"run_dir: the card cannot be made from the files in {weights.run} ({error}); run 'medlit test' again."
        ) from error
    (folder / "README.md").write_text(str(ModelCard(text + "\n")), encoding="utf-8")
