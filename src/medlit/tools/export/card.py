"""The model card, README.md with the Hub's metadata, out of a run folder's files and the comparison: no notes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from medlit._version import __version__
from medlit.atomic_io import read_json
from medlit.errors import UserError
from medlit.report.content import number, percent, span
from medlit.report.page import FACTS
from medlit.report.systems import MODEL, comparable
from medlit.tools.export.licences import licence_of
from medlit.tools.export.source import Weights, published, shown

if TYPE_CHECKING:
    from medlit.tools.export.verify import Verification

FIGURE = "confusion.png"
# What a run may have been measured by, the best evidence first.
_MEASURED = ("test", "validate", "fit")
_LIBRARIES = {"adapter": "peft", "hub": "peft", "merged": "transformers", "gguf": "llama.cpp"}
_CALIBRATION = (
    ("ece", "Expected calibration error"),
    ("log_loss", "Log-loss (nats)"),
    ("brier", "Brier score (0 to 2)"),
)
_OPTIMIZER = ("learning_rate", "weight_decay", "warmup_steps")
_DATA = ("global_batch_size", "loss_on", "balance", "max_response_tokens", "seed")


def write_card(folder: Path, weights: Weights, to: str, verification: Verification, facts: dict[str, Any]) -> None:
    """Write `README.md`, and the confusion matrix that it shows.

    Args:
        folder: of the export.
        weights: what is exported.
        to: what the export is.
        verification: the comparison of the export with medlit's model.
        facts: what was done, as `verification.json` says it.

    Raises:
        UserError: a file of the run folder is damaged.
    """
    verb = _measured(weights.run)
    metrics = _json(weights.run / f"{verb}_metrics.json") if weights.run is not None and verb else {}
    if weights.run is not None and (weights.run / f"confusion_{verb}.png").is_file():
        shutil.copyfile(weights.run / f"confusion_{verb}.png", folder / FIGURE)
    data = _data(weights)
    content = {
        "title": _title(weights),
        "to": to,
        "version": __version__,
        "base": shown(weights.language_model.base_model),
        "structure": weights.structure,
        "licence": licence_of(weights.language_model.base_model),
        "recipe": _recipe(weights),
        "data": data,
        "notes": _TOLD.get(verb or "", ""),
        "results": _results(weights.run, verb, metrics),
        "selective": metrics.get("accuracy_at_80"),
        "calibration": [
            (title, number(metrics[name])) for name, title in _CALIBRATION if metrics.get(name) is not None
        ],
        "figure": FIGURE if (folder / FIGURE).is_file() else None,
        "verification": verification.rows,
        "added_to": facts.get("added_to"),
        "four_bit": weights.language_model.load_in_4bit,
        "files": sorted(path.name for path in folder.glob("*.gguf")),
    }
    metadata = _metadata(weights, to, verb, metrics)
    card = ModelCard(f"---\n{metadata}\n---\n\n{_render(content)}")
    (folder / "README.md").write_text(str(card), encoding="utf-8")


def _render(content: dict[str, Any]) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    # Markdown, not HTML: nothing to escape but the bars of a table's cells, which the template does.
    environment = Environment(
        loader=PackageLoader("medlit.tools", "export"),
        autoescape=False,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters["cell"] = lambda value: str(value).replace("|", r"\|")
    return environment.get_template("card.md.j2").render(content) + "\n"


_TOLD = {
    "test": "the test split",
    "validate": "the validation split, which also chose the checkpoint: read it as an upper bound",
    "fit": "the last validation of the fit, which also chose the checkpoint: read it as an upper bound",
}


def _measured(run: Path | None) -> str | None:
    """The verb whose numbers the card shows."""
    return None if run is None else next((verb for verb in _MEASURED if (run / f"{verb}_metrics.json").is_file()), None)


def _title(weights: Weights) -> str:
    return f"Medical specialty of a transcription: {shown(weights.language_model.base_model).removeprefix('builtin:')}"


def _metadata(weights: Weights, to: str, verb: str | None, metrics: dict[str, Any]) -> ModelCardData:
    base = weights.language_model.base_model
    licence = licence_of(base)
    source = None if weights.data_fingerprint is None else weights.data_fingerprint.source
    named = None if source is None else shown(source)
    on_hub = source is not None and source == named and source.count("/") == 1
    split = "test" if verb == "test" else "validation"
    results = [
        EvalResult(
            task_type="text-classification",
            task_name="medical specialty",
            dataset_type=named if on_hub and named else "private",
            dataset_name=named or "unknown",
            dataset_split=split,
            dataset_revision=weights.data_fingerprint.revision if on_hub and weights.data_fingerprint else None,
            metric_type=kind,
            metric_name=title,
            metric_value=round(float(metrics[key]), 4),
        )
        for kind, title, key in (("accuracy", "Accuracy", "accuracy"), ("f1", "Macro F1", "f1_macro"))
        if key in metrics
    ]
    return ModelCardData(
        base_model=shown(published(base)),
        base_model_revision=weights.language_model.revision,
        datasets=named if on_hub else None,
        language="en",
        library_name=_LIBRARIES[to],
        license=None if licence is None else "other" if licence.name else licence.id,
        license_name=None if licence is None else licence.name,
        license_link=None if licence is None else licence.link,
        pipeline_tag="text-generation",
        tags=["medical", "text-classification", "lora", "unsloth", "medlit"],
        model_name=_title(weights) if results else None,
        eval_results=results or None,
    )


def _recipe(weights: Weights) -> list[tuple[str, str]]:
    """(what, value) of how it was trained; the fit's own settings where the run folder has them."""
    lora, language_model = weights.structure.lora, weights.language_model
    rows = [
        ("LoRA", f"r {lora['r']}, alpha {lora['alpha']}, on {', '.join(lora['target_modules'])}"),
        ("base weights", "4-bit NF4" if language_model.load_in_4bit else "16 bits"),
        ("longest prompt and answer", f"{language_model.max_length} tokens; only the transcription is ever cut"),
        ("prompt", f"{weights.structure.prompt}: {weights.structure.instruction}"),
    ]
    config = None if weights.run is None else weights.run / "config_fit.yaml"
    if config is not None and config.is_file():
        try:
            values = yaml.safe_load(config.read_text(encoding="utf-8"))
            rows += [(name.replace("_", " "), str(values["model"]["optimizer"][name])) for name in _OPTIMIZER]
            rows += [(name.replace("_", " "), str(values["data"][name])) for name in _DATA]
            rows.append(("most optimizer steps", str(values["trainer"]["max_steps"])))
        except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
            raise damaged(config) from error
    return rows


def _data(weights: Weights) -> list[tuple[str, str]]:
    """(what, found) of the notes: where they come from, how they were split, what each split's rows hash to."""
    rows: list[tuple[str, str]] = []
    if weights.data_fingerprint is not None:
        given = weights.data_fingerprint
        kind = " (invented notes, of no patient)" if given.source == "builtin" else ""
        rows.append(("source", shown(given.source) + (f" at {given.revision}" if given.revision else "") + kind))
    facts = _json(weights.run / FACTS).get("data", {}) if weights.run is not None else {}
    if facts:
        rows.append(("split", f"{facts['split']}, seed {facts['seed']}"))
        rows += [(name, f"{n:,} notes, {facts['texts'][name]:,} different texts") for name, n in facts["rows"].items()]
        rows.append(("test notes whose text is in train", f"{facts['test_texts_in_train']:,}"))
        rows.append(("most that the test notes allow to get right", percent(facts["test_ceiling"])))
    if weights.data_fingerprint is not None:
        rows += [(f"hash of {name}", digits) for name, digits in weights.data_fingerprint.hashes.items()]
    return rows


def _results(run: Path | None, verb: str | None, metrics: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """(system, accuracy, macro F1, off the list), with baselines where there are some on the same notes."""
    if run is None or not metrics:
        return []
    if verb == "test":
        return [
            (system.title if system.name != MODEL else "this model", *_row(system.metrics))
            for system in comparable(run)[0]
        ]
    return [("this model", *_row(metrics))]


def _row(metrics: Any) -> tuple[str, str, str]:  # noqa: ANN401 - a file's numbers
    accuracy = f"{percent(metrics['accuracy'])} ({span(metrics['accuracy_ci'], percent)})"
    return (
        accuracy,
        f"{number(metrics['f1_macro'])} ({span(metrics['f1_macro_ci'], number)})",
        percent(metrics["invalid_rate"]),
    )


def _json(path: Path) -> dict[str, Any]:
    """A JSON file of the run folder, or nothing where there is none."""
    if not path.is_file():
        return {}
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise damaged(path) from error


def damaged(path: Path) -> UserError:
    """That a file of the run folder cannot be read."""
    return UserError(f"run: {path} is damaged, and the card is made from it; test again, or move it away.")
