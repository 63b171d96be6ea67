"""The rows of a table of predictions, and its file formats: CSV, JSON Lines and Parquet.

`from medlit import Prediction` imports nothing heavy, and so does this file.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

    from medlit.data.collate import Prompts
    from medlit.data.labels import LabelSet
    from medlit.model.decoding import Answers

PREDICTIONS = "predictions.csv"  # in the run folder, unless --output names another file
COLUMNS = ("id", "specialty", "answer", "probability", "margin", "runner_up", "abstained", "cut_tokens")
SET_COLUMNS = (*COLUMNS, "set", "set_size", "set_probabilities")  # where `Decoding.sets` makes sets
_DECIMALS = 6  # of a probability: float32 has seven digits
# What a spreadsheet takes for the beginning of a formula (https://owasp.org/www-community/attacks/CSV_Injection).
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE | re.ASCII)


@dataclass(frozen=True, slots=True)
class Prediction:
    """The answer to one note; an answer that is not a label, or of 'generate', has no numbers and no runner-up."""

    specialty: str | None  # where to file the note; None: the answer is not on the list, or too uncertain (`abstained`)
    answer: str  # the model's answer, verbatim
    probability: float | None  # of the answer, at the fitted temperature, 0 to 1
    margin: float | None  # minus the runner-up's, -1 to 1; below 0 where 'constrained' misses the likeliest label
    runner_up: str | None  # the likeliest other specialty
    abstained: bool  # whether the specialty is withheld because the probability is below `abstain_below`
    cut_tokens: int  # tokens of the note that did not fit and that the model did not see


@dataclass(frozen=True, slots=True)
class SetPrediction(Prediction):
    """The answer to one note, and the set of labels whose probabilities reach the threshold, the likeliest first."""

    set: list[str]
    set_size: int
    set_probabilities: list[float]


def make_predictions(
    prompts: Prompts, answers: Answers, label_set: LabelSet, abstain_below: float | None, threshold: float | None = None
) -> list[Prediction]:
    """Turn a batch's answers into predictions, with the sets that a threshold makes."""
    predictions: list[Prediction] = []
    for i, label in enumerate(answers.label_ids.tolist()):
        is_listed = label < label_set.invalid
        probability = margin = runner_up = None
        if is_listed and answers.probabilities is not None:
            of_labels = answers.probabilities[i].tolist()
            second = max((other for other in range(len(of_labels)) if other != label), key=of_labels.__getitem__)
            probability, margin = of_labels[label], round(of_labels[label] - of_labels[second], _DECIMALS)
            runner_up = label_set.names[second]
        abstained = abstain_below is not None and probability is not None and probability < abstain_below
        prediction = Prediction(
            specialty=label_set.names[label] if is_listed and not abstained else None,
            answer=answers.texts[i],
            probability=None if probability is None else round(probability, _DECIMALS),
            margin=margin,
            runner_up=runner_up,
            abstained=abstained,
            cut_tokens=prompts.cut_tokens[i],
        )
        if threshold is not None and answers.probabilities is not None:
            from medlit.evaluation.sets import prediction_sets

            p = answers.probabilities[i].double().numpy()
            order = (-p).argsort(kind="stable")
            members = order[prediction_sets(p, threshold)[order]]
            names, given = [label_set.names[member] for member in members], p[members].round(_DECIMALS).tolist()
            prediction = SetPrediction(**asdict(prediction), set=names, set_size=len(names), set_probabilities=given)
        predictions.append(prediction)
    return predictions


def table_rows(prompts: Prompts, predictions: Iterable[Prediction]) -> list[dict[str, Any]]:
    """A row of each prediction as plain types, with its note's position in the source and its id."""
    notes = zip(prompts.rows, prompts.ids, predictions, strict=True)
    return [{"row": row, "id": note_id, **asdict(prediction)} for row, note_id, prediction in notes]


def arrow_schema(columns: Sequence[str] = SET_COLUMNS) -> pa.Schema:
    """The types of SET_COLUMNS, or of COLUMNS."""
    import pyarrow as pa

    types = [pa.string(), pa.string(), pa.string(), pa.float64(), pa.float64(), pa.string(), pa.bool_(), pa.int64()]
    types += [pa.list_(pa.string()), pa.int64(), pa.list_(pa.float64())]
    return pa.schema(list(zip(columns, types, strict=False)))


def _write_csv(path: Path, columns: Sequence[str], parts: Iterable[pa.Table], separator: str | None) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        # Every text is quoted: the csv module leaves a lone carriage return unquoted, and readers end the row there.
        writer = csv.writer(file, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
        writer.writerow(columns)
        for part in parts:
            writer.writerows([_cell(value, separator) for value in row.values()] for row in part.to_pylist())


def _cell(value: Any, separator: str | None) -> Any:  # noqa: ANN401 - any cell
    """Join a list. Prefix a text that a spreadsheet would run as a formula with an apostrophe; a number is none."""
    value = str(separator).join(map(str, value)) if isinstance(value, list) else value
    is_formula = isinstance(value, str) and value.startswith(_FORMULA) and not _NUMBER.fullmatch(value)
    return f"'{value}" if is_formula else value


def _write_jsonl(path: Path, _: Sequence[str], parts: Iterable[pa.Table], __: str | None) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for part in parts:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in part.to_pylist())


def _write_parquet(path: Path, columns: Sequence[str], parts: Iterable[pa.Table], _: str | None) -> None:
    import pyarrow.parquet as pq

    with pq.ParquetWriter(path, arrow_schema(columns)) as writer:
        for part in parts:
            writer.write_table(part)


# Suffix of a table -> what writes these columns of its parts; a separator, of lists in CSV, is for those of sets.
FORMATS: dict[str, Callable[..., None]] = {".csv": _write_csv, ".jsonl": _write_jsonl, ".parquet": _write_parquet}
