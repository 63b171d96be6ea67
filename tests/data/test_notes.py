"""A typed note is read, or refused in one sentence."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

import pytest
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


@pytest.mark.parametrize(
    "text",
    ["notes.csv", "wards/may.jsonl.gz", "./notes", "/srv/notes", "~/notes", "here it is", "s3://bucket/notes.parquet"],
)
def test_the_name_of_a_file_is_no_note(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here it is").write_text("A knee.")
    with pytest.raises(
        UserError, match=r"^data\.predict\.text: this is the name of a file .* data\.predict\.source, or"
    ):
        read_predict_notes(Predict(text=text), Columns(), Labels())


@pytest.mark.parametrize(
    "text", ["A knee, see notes.csv", "/ 2 weeks of pain", "knee", "and/or", "...", "a" * 5_000, "x\0y"]
)
def test_a_note_is_no_name_of_a_file(text: str) -> None:
    assert read_predict_notes(Predict(text=text), Columns(), Labels())["transcription"][:] == [text]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("38.5° since Monday".encode("latin-1"), "not UTF-8 from line 1 on (its encoding looks like ISO-8859-1)"),
        ("a knee\n“swollen”".encode("cp1252"), "not UTF-8 from line 2 on (its encoding looks like Windows-1252)"),
        ("A knee.".encode("utf-16"), "UTF-16"),
        (b"PK\x03\x04" + bytes(64), "is a ZIP archive"),
        (bytes(range(256)), "is a binary file"),
    ],
)
@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # as in a UTF-8 and in a C locale
def test_standard_input_is_decoded_as_a_file_is(
    content: bytes, expected: str, errors: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), encoding="ascii", errors=errors))
    with pytest.raises(UserError) as error:
        read_predict_notes(Predict(text="-"), Columns(), Labels())
    assert str(error.value).startswith("data.predict.text: the standard input ")
    assert expected in str(error.value)


def test_standard_input_is_utf_8_in_any_locale(monkeypatch: pytest.MonkeyPatch) -> None:
    content = "\ufeff38.5° since Monday\r\n".encode()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), encoding="ascii", errors="surrogateescape"))
    assert read_predict_notes(Predict(text="-"), Columns(), Labels())["transcription"][:] == ["38.5° since Monday"]


def test_predict_refuses_repeated_ids(tmp_path: Path) -> None:
    (tmp_path / "n.csv").write_text("id,transcription\np1,one\np1,two\n")
    predict = Predict(source=str(tmp_path / "n.csv"))
    with pytest.raises(UserError, match=r"data\.columns\.id: .*row 2 has the id 'p1' of .*set 'none'"):
        read_predict_notes(predict, Columns(), Labels())
    assert len(read_predict_notes(predict, Columns(id="none"), Labels())) == 2


def test_predict_does_not_read_the_label_column(tmp_path: Path) -> None:
    rows = "".join(f"note {n},code {n}\n" for n in range(10_001))
    (tmp_path / "n.csv").write_text(f"transcription,medical_specialty\n{rows}long,{'text ' * 50}\n", encoding="utf-8")
    (tmp_path / "n.jsonl").write_text('{"transcription": "x", "medical_specialty": {"a": [1]}}\n', encoding="utf-8")
    for name, number in (("n.csv", 10_002), ("n.jsonl", 1)):
        read = read_predict_notes(Predict(source=str(tmp_path / name)), Columns(), Labels(min_count=5))
        assert read["specialty"][:] == [None] * number
