"""The notes of `medlit predict` that are in no split: one typed note, or a source of their own."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from medlit.data.notes import clean_note, load_source
from medlit.data.settings import Columns, Labels, Predict
from medlit.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset


def read_predict_notes(predict: Predict, columns: Columns, labels: Labels) -> Dataset:
    """Read the notes to classify into canonical columns.

    Raises:
        UserError: the note is empty, or the source cannot be read.
    """
    import datasets

    if predict.text is not None:
        text = clean_note(_read_stdin() if predict.text == "-" else predict.text)
        if not text:
            raise UserError(
                "data.predict.text: the note is empty; give its text, or '-' and the text on standard input."
            )
        return datasets.Dataset.from_dict({"id": ["text"], "transcription": [text], "specialty": [None]})
    try:
        tables = load_source(predict.source, columns=columns, labels=labels, require_labels=False)
    except UserError as error:
        raise UserError(str(error).replace("data.source", "data.predict.source", 1)) from error
    return datasets.concatenate_datasets(list(tables.values()))


def _read_stdin() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UserError(
            f"data.predict.text: the standard input is not {error.encoding.upper()}; convert it, for example with"
            " iconv."
        ) from None
