"""`medlit baseline`: what simpler systems reach on the same notes, and whether the model can be told from them.

Fits the majority class and TF-IDF with logistic regression on the training split of any config and scores them on its
test split. `--run_dir DIR` takes the settings of a test run in that folder, writes `baseline_<name>_metrics.json` and
`baseline_<name>_answers.parquet` beside the model's, and writes the folder's report anew, with comparisons. `--head`
also trains the same base model with LoRA and a classification head in place of written answers. `--beside DIR` adds
another test run of the same notes to the report: the bare base model's (a run with `--model.adapter none`), or any
other adapter's.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medlit.errors import UserError
from medlit.evaluation.compare import compare
from medlit.evaluation.results import Results
from medlit.report.page import FILES, write_report
from medlit.report.systems import MODEL, comparable, read_system, write_system
from medlit.run_folder import next_version, run_name
from medlit.tools.baseline.run_settings import recorded_settings, system_beside
from medlit.tools.baseline.show import show

if TYPE_CHECKING:
    from medlit.report.systems import System
    from medlit.tools.baseline.notes import TestedNotes

_EXAMPLES = """
examples:
  medlit baseline --run_dir logs/llama31_8b/version_0
  medlit baseline --run_dir logs/llama31_8b/version_0 --beside logs/llama31_8b/version_1
  medlit baseline --config configs/llama31_8b.yaml --data.source notes.csv
"""
_SETTINGS = """\
settings: --config and every --data setting of 'medlit fit', whose --help explains them. With --head those of
model.language_model, model.lora and model.optimizer and the length of the fit count too.
"""


def run(args: Sequence[str]) -> int:
    """Fit the baselines, score them, compare.

    Args:
        args: the arguments after `medlit baseline`.

    Raises:
        UserError: the settings, the source or the run folder cannot be read.
    """
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
        help="run folder of a test; without it only the baselines are scored, in a new run folder",
    )
    parser.add_argument(
        "--head", action="store_true", help="also train a classification head, which takes as long as a fit: on a GPU"
    )
    parser.add_argument(
        "--beside",
        type=Path,
        metavar="DIR",
        action="append",
        default=[],
        help="run folder of another test to add; may be given several times",
    )
    options, rest = parser.parse_known_args(args)
    # After --help: these imports take seconds.
    from medlit.cli.arguments import make_datamodule, parse_settings
    from medlit.cli.environment import check_writable
    from medlit.tools.baseline.notes import read_notes

    if options.run is not None and not options.run.is_dir():
        raise UserError(f"run: there is no folder {options.run}; give the run folder of a test.")
    config = parse_settings("baseline", [*([] if options.run is None else recorded_settings(options.run)), *rest])
    folder = options.run or _new_folder(config)
    check_writable("run", folder / "report.html")
    beside = [system_beside(other) for other in options.beside]

    tested = _record(folder)
    for other in beside:
        if tested is not None:
            compare(tested, other.answered)  # before anything is fitted
    notes = read_notes(make_datamodule(config), tested)
    for system in [*_fitted(notes, config, options.head), *beside]:
        write_system(folder, system)
    write_report(folder)
    show(comparable(folder)[0], [folder / name for name in FILES])
    return 0


def _fitted(notes: TestedNotes, config: Any, head: bool) -> list[System]:  # noqa: ANN401 - jsonargparse's Namespace
    from medlit.tools.baseline.sklearn_baselines import majority, tfidf

    found = [majority(notes), tfidf(notes)]
    if head:
        from medlit.tools.baseline.head import classification_head

        found.append(classification_head(notes, config))
    return found


def _new_folder(config: Any) -> Path:  # noqa: ANN401
    return next_version(Path(config.trainer.default_root_dir), run_name([str(path) for path in config.config or []]))


def _record(folder: Path) -> Results | None:
    """What the model of a run folder was tested on."""
    return read_system(folder, MODEL).answered if (folder / f"{MODEL}_metrics.json").is_file() else None
