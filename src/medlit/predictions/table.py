"""The rows of a table of predictions, and its file formats: CSV, JSON Lines and Parquet."""

from __future__ import annotations

import csv
import itertools
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medlit.data.sources import reads
from medlit.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

    from medlit.data.collate import Prompts
    from medlit.data.labels import LabelSet
    from medlit.model.decoding import Answers

COLUMNS = ("id", "specialty", "answer", "probability", "margin", "runner_up", "abstained", "cut_tokens")
_ROW_GROUP = 10_000  # rows, of Parquet
_DECIMALS = 6  # of a probability: float32 has seven digits
# What a spreadsheet takes for the beginning of a formula (https://owasp.org/www-community/attacks/CSV_Injection).
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE | re.ASCII)


@dataclass(frozen=True, slots=True)
class Prediction:
    """The answer to one note.

    `probability`, `margin` and `runner_up` are None for an answer that is not on the list of specialties, and in the
    mode 'generate', which does not score the labels.
    """

    specialty: str | None  # where to file the note; None: the answer is not on the list, or too uncertain (`abstained`)
    answer: str  # the model's answer, verbatim
    probability: float | None  # of the answer, at the fitted temperature, 0 to 1
    # the answer's probability minus that of the runner-up, -1 to 1. In the mode 'constrained' it can be below 0, since
    # decoding token by token does not always find the likeliest label.
    margin: float | None
    runner_up: str | None  # the likeliest other specialty
    abstained: bool  # whether the specialty is withheld because the probability is below `abstain_below`
    cut_tokens: int  # tokens of the note that did not fit and that the model did not see


def make_predictions(
    prompts: Prompts, answers: Answers, label_set: LabelSet, abstain_below: float | None
) -> list[Prediction]:
    """Turn a batch's answers into predictions."""
    predictions = []
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
        predictions.append(prediction)
    return predictions


def table_rows(prompts: Prompts, predictions: Iterable[Prediction]) -> list[dict[str, Any]]:
    """A row of each prediction as plain types, with its note's position in the source and its id."""
    notes = zip(prompts.rows, prompts.ids, predictions, strict=True)
    return [{"row": row, "id": note_id, **asdict(prediction)} for row, note_id, prediction in notes]


def check_table(path: Path, sources: Iterable[str], overwrite: bool) -> None:
    """Raise a UserError if a path is a folder, if a source reads it, or if it exists and may not be replaced."""
    if path.exists() and not path.is_file():
        raise UserError(f"output: {path} is not a file; name a file for the table.")
    if source := next((source for source in sources if reads(source, path)), None):
        raise UserError(f"output: {path} is among the notes of {source}; name a file in another folder.")
    if path.exists() and not overwrite:
        raise UserError(f"output: {path} exists; name another file, or add --overwrite to replace it.")


def arrow_schema() -> pa.Schema:
    """The types of COLUMNS."""
    import pyarrow as pa

    types = (pa.string(), pa.string(), pa.string(), pa.float64(), pa.float64(), pa.string(), pa.bool_(), pa.int64())
    return pa.schema(list(zip(COLUMNS, types, strict=True)))


def _write_csv(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        # Every text is quoted: the csv module leaves a lone carriage return unquoted, and readers end the row there.
        writer = csv.writer(file, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows([_escape_formula(row[name]) for name in COLUMNS] for row in rows)


def _escape_formula(value: Any) -> Any:  # noqa: ANN401 - any cell
    """Prefix a text that a spreadsheet would run as a formula with an apostrophe; a number is none."""
    is_formula = isinstance(value, str) and value.startswith(_FORMULA) and not _NUMBER.fullmatch(value)
    return f"'{value}" if is_formula else value


def _write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps({name: row[name] for name in COLUMNS}, ensure_ascii=False) + "\n")


def _write_parquet(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema, remaining = arrow_schema(), iter(rows)
    with pq.ParquetWriter(path, schema) as writer:
        # No name for the list: the rows of a group would stay in memory beside those of the next.
        while len(batch := pa.RecordBatch.from_pylist(list(itertools.islice(remaining, _ROW_GROUP)), schema=schema)):
            writer.write_batch(batch)


# Suffix of a table -> what writes its rows, given as column -> value.
FORMATS: dict[str, Callable[[Path, Iterable[dict[str, Any]]], None]] = {
    ".csv": _write_csv,
    ".jsonl": _write_jsonl,
    ".parquet": _write_parquet,
}
