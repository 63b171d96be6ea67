"""The model card: README.md with the Hub's metadata, from a run folder's files and the verification; no notes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined, UndefinedError

from medlit._version import __version__
from medlit.atomic_io import read_json
from medlit.errors import UserError
from medlit.evaluation.metrics import HEADLINE, number, percent
from medlit.report.page import FACTS
from medlit.report.systems import MODEL, comparable
from medlit.tools.export.source import Weights, hub_id, public_name

if TYPE_CHECKING:
    from medlit.tools.export.verify import Verification

FIGURE = "confusion.png"
# Commands whose metrics the card may show, the best evidence first, and the notes that they are from.
_MEASURED_ON = {
    "test": "the test split",
    "validate": "the validation split, which also chose the checkpoint: read it as an upper bound",
    "fit": "the last validation of the fit, which also chose the checkpoint: read it as an upper bound",
}
_LIBRARIES = {"adapter": "peft", "hub": "peft", "merged": "transformers", "gguf": "llama.cpp"}
# Beginning of a base model's name, without its owner and in lower case -> its license: the Hub's id, a title.
_LICENSES = {
    "smollm2": ("apache-2.0", "Apache License 2.0"),
    "meta-llama-3.1": ("llama3.1", "Llama 3.1 Community License"),
    "llama-3.1": ("llama3.1", "Llama 3.1 Community License"),
    "mistral-nemo": ("apache-2.0", "Apache License 2.0"),
    "mistral-7b": ("apache-2.0", "Apache License 2.0"),
    "phi-3": ("mit", "MIT License"),
    "gemma-2": ("gemma", "Gemma Terms of Use"),
}


def write_card(folder: Path, weights: Weights, target: str, verification: Verification) -> None:
    """Write `README.md`, and the confusion matrix that it shows, into the export's folder.

    Raises:
        UserError: a file of the run folder is damaged.
    """
    run = weights.run
    command, metrics = _metrics(run)
    if run is not None and (run / f"confusion_{command}.png").is_file():
        shutil.copyfile(run / f"confusion_{command}.png", folder / FIGURE)
    content = {
        "title": _title(weights),
        "target": target,
        "version": __version__,
        "weights": weights,
        "metadata": weights.metadata,
        "license": license_of(weights.language_model.base_model),
        "fit": {} if run is None else read_run_file(run / "config_fit.yaml"),
        "data": {} if run is None else read_run_file(run / FACTS).get("data", {}),
        "measured_on": _MEASURED_ON.get(command),
        "metrics": metrics,
        "columns": HEADLINE,
        # After a test, baselines on the same notes too.
        "systems": [("this model", metrics)]
        if run is None or command != "test"
        else [("this model" if each.name == MODEL else each.title, each.metrics) for each in comparable(run)[0]],
        "figure": FIGURE if (folder / FIGURE).is_file() else None,
        "verification": verification.rows,
        "files": sorted(path.name for path in folder.glob("*.gguf")),
    }
    # Markdown, not HTML: only the bars in a table's cells need escaping, which the template does.
    environment = Environment(
        loader=PackageLoader("medlit.tools", "export"),
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.globals |= {"number": number, "percent": percent, "public_name": public_name}
    environment.filters["cell"] = lambda value: str(value).replace("|", r"\|")
    try:
        text = environment.get_template("card.md.j2").render(content)
    except UndefinedError as error:
        raise UserError(
            f"run_dir: the card cannot be made from the files in {run} ({error}); run 'medlit test' again."
        ) from error
    card = ModelCard(f"---\n{_hub_metadata(weights, target, command, metrics)}\n---\n\n{text}\n")
    (folder / "README.md").write_text(str(card), encoding="utf-8")


def license_of(base_model: str) -> tuple[str, str] | None:
    """Id on the Hub and title of a base model's license, or None if it is not known here."""
    name = base_model.rpartition("/")[2].removeprefix("builtin:").lower()
    return next((license_ for prefix, license_ in _LICENSES.items() if name.startswith(prefix)), None)


def read_run_file(path: Path) -> dict[str, Any]:
    """Read a JSON or YAML file of the run folder; empty if there is none.

    Raises:
        UserError: it is damaged.
    """
    if not path.is_file():
        return {}
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8")) if path.suffix == ".yaml" else read_json(path)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(
            f"run_dir: {path} is damaged and the card needs it; run 'medlit test' again, or move it away."
        ) from error


def _metrics(run: Path | None) -> tuple[str, dict[str, Any]]:
    """The command that measured the model best, and its metrics; both empty if there is none."""
    for command in _MEASURED_ON:
        if run is not None and (metrics := read_run_file(run / f"{command}_metrics.json")):
            return command, metrics
    return "", {}


def _title(weights: Weights) -> str:
    name = public_name(weights.language_model.base_model).removeprefix("builtin:")
    return f"Medical specialty of a transcription: {name}"


def _hub_metadata(weights: Weights, target: str, command: str, metrics: dict[str, Any]) -> ModelCardData:
    base, data = weights.language_model, weights.metadata.data
    dataset = None if data is None else public_name(data.source)
    on_hub = data is not None and dataset == data.source and dataset.count("/") == 1
    license_ = license_of(base.base_model)
    results = [
        EvalResult(
            task_type="text-classification",
            task_name="medical specialty",
            dataset_type=dataset if on_hub and dataset else "private",
            dataset_name=dataset or "unknown",
            dataset_split="test" if command == "test" else "validation",
            dataset_revision=data.revision if on_hub and data else None,
            metric_type=metric_type,
            metric_name=name,
            metric_value=round(float(metrics[key]), 4),
        )
        for metric_type, name, key in (("accuracy", "Accuracy", "accuracy"), ("f1", "Macro F1", "f1_macro"))
        if key in metrics
    ]
    return ModelCardData(
        base_model=public_name(hub_id(base.base_model)),
        base_model_revision=base.revision,
        datasets=dataset if on_hub else None,
        language="en",
        library_name=_LIBRARIES[target],
        license=None if license_ is None else license_[0],
        pipeline_tag="text-generation",
        tags=["medical", "text-classification", "lora", "unsloth", "medlit"],
        model_name=_title(weights) if results else None,
        eval_results=results or None,
    )
