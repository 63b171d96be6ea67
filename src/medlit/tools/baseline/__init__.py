"""`medlit baseline`: simpler systems on the same notes, and whether the model is significantly better.

Fits the majority class and TF-IDF with logistic regression on the training split of any config and scores them on its
test split. `--run_dir DIR` takes the settings of the test in that run folder, writes `baseline_<name>_metrics.json` and
`baseline_<name>_answers.parquet` beside the model's, and rewrites the folder's report with comparisons. `--head` also
trains the same base model with LoRA and a classification head instead of written answers. `--beside DIR` adds another
test of the same notes to the report: of the bare base model (a run with `model.lora: null`), or of any other adapter.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from medlit.errors import UserError
from medlit.evaluation.compare import compare
from medlit.evaluation.metrics import HEADLINE
from medlit.report.page import FILES, comparisons, system_rows, write_report
from medlit.report.systems import MODEL, System, comparable, read_system, write_system
from medlit.run_folder import next_version, run_name

_EXAMPLES = """
examples:
  medlit baseline --run_dir logs/llama31_8b/version_0
  medlit baseline --run_dir logs/llama31_8b/version_0 --beside logs/llama31_8b/version_1
  medlit baseline --config configs/llama31_8b.yaml --data.source notes.csv
"""
_SETTINGS = """\
settings: --config and every --data setting of 'medlit fit'; see 'medlit fit --help'. --head also uses
model.language_model, model.lora, model.optimizer and the length of the fit.
"""
_SECTIONS = ("seed_everything", "model", "data")
_TRAINER = ("accelerator", "max_steps", "max_epochs", "gradient_clip_val")


def run(args: Sequence[str]) -> int:
    """Fit the baselines, score them, compare.

    Args:
        args: the arguments after `medlit baseline`.

    Raises:
        UserError: the settings, the source or the run folder cannot be used.
    """
    options, rest = _parser().parse_known_args(args)
    # After --help: these imports take seconds.
    from medlit.cli.arguments import make_datamodule, parse_settings
    from medlit.cli.environment import check_writable
    from medlit.tools.baseline.sklearn_baselines import BaselineData, majority, tfidf

    run_dir: Path | None = options.run_dir
    if run_dir is not None and not run_dir.is_dir():
        raise UserError(f"run_dir: there is no folder {run_dir}; give the run folder of a test.")
    config = parse_settings("baseline", [*([] if run_dir is None else recorded_settings(run_dir)), *rest])
    folder = run_dir or _new_folder(config)
    check_writable("run_dir", folder / "report.html")

    model = read_system(folder, MODEL) if (folder / f"{MODEL}_metrics.json").is_file() else None
    others = [_other_run(other) for other in options.beside]
    if model is not None:
        for other in others:
            compare(model.results, other.results)  # refuses other notes before anything is fitted
    data = make_datamodule(config)
    notes = BaselineData.read(data, None if model is None else model.results)
    fitted = [majority(notes), tfidf(notes)]
    if options.head:
        from medlit.tools.baseline.head import classification_head

        fitted.append(classification_head(notes, data, config))
    for system in [*fitted, *others]:
        write_system(folder, system)
    write_report(folder)
    _show(comparable(folder)[0], [folder / name for name in FILES])
    return 0


def recorded_settings(run_dir: Path) -> list[str]:
    """The settings of a run's test, and how long its fit trained, as an argument that flags can override.

    Raises:
        UserError: the run has no config of a test.
    """
    test, fit = run_dir / "config_test.yaml", run_dir / "config_fit.yaml"
    if not test.is_file():
        raise UserError(f"run_dir: {run_dir} has no config_test.yaml; run 'medlit test' for it first.")
    config = _read_config(test)
    values = {name: config[name] for name in _SECTIONS if name in config}
    trainer = _read_config(fit if fit.is_file() else test).get("trainer", {})
    values["trainer"] = {name: trainer[name] for name in _TRAINER if trainer.get(name) is not None}
    return ["--config", json.dumps(values)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="medlit baseline",
        usage="medlit baseline [--run_dir DIR] [--config FILE ...] [--data.KEY VALUE ...] [--head] [--beside DIR ...]",
        description=__doc__.partition("\n\n")[2] + _EXAMPLES,
        epilog=_SETTINGS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--run_dir",
        type=Path,
        metavar="DIR",
        help="run folder of a test; without it the baselines are scored alone, in a new run folder",
    )
    parser.add_argument(
        "--head", action="store_true", help="also train a classification head, which takes as long as a fit on a GPU"
    )
    parser.add_argument(
        "--beside",
        type=Path,
        metavar="DIR",
        action="append",
        default=[],
        help="run folder of another test to add; may be given several times",
    )
    return parser


def _new_folder(config: Any) -> Path:  # noqa: ANN401 - jsonargparse's Namespace
    return next_version(Path(config.trainer.default_root_dir), run_name([str(path) for path in config.config or []]))


def _other_run(run_dir: Path) -> System:
    """Another run's test as a system; the bare base model is called zero-shot."""
    config = _read_config(run_dir / "config_test.yaml") if (run_dir / "config_test.yaml").is_file() else {}
    model = config.get("model", {})
    bare = model.get("lora", {}) is None and model.get("adapter") is None and config.get("ckpt_path") is None
    absolute = run_dir.absolute()
    return replace(read_system(run_dir, MODEL), name="zero_shot" if bare else f"{absolute.parent.name}-{absolute.name}")


def _read_config(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"run_dir: {path} is damaged; run the command that wrote it again.") from error
    if not isinstance(values, dict):
        raise UserError(f"run_dir: {path} is damaged; run the command that wrote it again.")
    return values


def _show(systems: Sequence[System], files: Sequence[Path]) -> None:
    """Print the report's table and comparisons."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    results = systems[0].results
    title = f"{len(results)} test notes, {len(results.names)} specialties"
    table = Table(title=title, title_justify="left")
    table.add_column("system", overflow="fold")
    for metric in HEADLINE:
        table.add_column(metric.title, justify="right", no_wrap=True)
    for name, *cells in system_rows(systems, HEADLINE):
        table.add_row(escape(name), *cells)
    console = Console()
    console.print(table)
    for sentence in comparisons(systems):
        console.print(f"- {escape(sentence)}", highlight=False)
    console.print(f"written: {', '.join(map(str, files))}", highlight=False, soft_wrap=True)
