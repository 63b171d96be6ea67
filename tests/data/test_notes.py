"""A typed note is read, or refused in one sentence."""

from __future__ import annotations

import contextlib

from hypothesis import given
from hypothesis import strategies as st

from medlit.data.notes import read_predict_notes
from medlit.data.settings import Columns, Labels, Predict
from medlit.errors import UserError


@given(text=st.text().filter("-".__ne__))  # "-" means standard input
def test_any_typed_note_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(UserError):
        rows = read_predict_notes(Predict(text=text), Columns(), Labels())
        assert len(rows) == 1
        assert rows[0]["transcription"].strip()
