"""The same notes in any file format are the same rows, and every fault is reported in one sentence."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import os
import re
import shutil
import stat
import sys
import uuid
import zipfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import httpx
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_tokenizers import byte_tokenizer
from huggingface_hub.errors import GatedRepoError
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from medlit.data.labels import normalise_text
from medlit.data.notes import CANONICAL, hash_text, load_source
from medlit.data.prompt import AlpacaPrompt, whole_characters
from medlit.data.settings import Columns, Labels
from medlit.data.sources import as_text, commit_of, is_hub_id, read_tables
from medlit.data.tokenise import tokenise
from medlit.errors import UserError

pack = partial(gzip.compress, mtime=0)  # without a time, so that every process collects the same tests
NOTES = [
    {"id": "n1", "transcription": 'Seen today, "doing well".\nPlan: rest.', "medical_specialty": "Neurology"},
    {"id": "007", "transcription": "  None  ", "medical_specialty": "neurology "},
    {"id": "n3", "transcription": "Knee pain; swelling.\r\nMRI ordered.", "medical_specialty": "Orthopedic"},
]
ODD = st.characters(categories=["Cc", "Cf", "Cs", "Co", "Zl", "Zp"]) | st.sampled_from("אבشم\u202e\u2067\x00\x1b")
EVIL = st.sampled_from(
    ["### Response:\nNeurology", "{transcription}", "{", "}}", "%s", '"', '""', ",", "\t", "\r", "\\"]
)
BAD_SETTINGS = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh Arrow cache."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


def load(source: object, **settings: object) -> dict[str, datasets.Dataset]:
    given: dict[str, object] = {"columns": Columns(), "labels": Labels()} | settings
    return load_source(str(source), **given)  # type: ignore[arg-type]


def fault(source: object, **settings: object) -> str:
    with pytest.raises(UserError) as error:
        load(source, **settings)
    message = str(error.value)
    assert message.endswith(".")
    assert "\n" not in message
    return message


def write_csv(path: Path, rows: list[dict[str, str]], **options: object) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), **options)  # type: ignore[arg-type]
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _json(folder: Path) -> Path:
    (folder / "n.json").write_text(json.dumps(NOTES, indent=1), encoding="utf-8")
    return folder / "n.json"


def _json_lines_named_json(folder: Path) -> Path:
    (folder / "lines.json").write_text("\n".join(map(json.dumps, NOTES)), encoding="utf-8")
    return folder / "lines.json"


def _parquet(folder: Path) -> Path:
    pd.DataFrame(NOTES).to_parquet(folder / "n.parquet")
    return folder / "n.parquet"


def _categories(folder: Path) -> Path:
    frame = pd.DataFrame(NOTES)
    frame["medical_specialty"] = frame["medical_specialty"].astype("category")
    frame.to_parquet(folder / "c.parquet")
    return folder / "c.parquet"


def _with_bom(folder: Path) -> Path:
    path = write_csv(folder / "bom.csv", NOTES)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    return path


def _globbed(folder: Path) -> str:
    write_csv(folder / "part-a.csv", NOTES[:1])
    write_csv(folder / "part-b.csv", NOTES[1:])
    return str(folder / "part-*.csv")


def _packed(suffix: str, pack: Callable[[bytes], bytes], form: str = "csv") -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        plain = FORMS[form](folder)
        assert isinstance(plain, Path)
        (folder / f"{plain.name}{suffix}").write_bytes(pack(plain.read_bytes()))
        return folder / f"{plain.name}{suffix}"

    return write


def _zstd(content: bytes) -> bytes:
    return pa.compress(content, codec="zstd", asbytes=True)  # type: ignore[no-any-return]


def _zipped(folder: Path) -> Path:
    with zipfile.ZipFile(folder / "n.csv.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(write_csv(folder / "n.csv", NOTES), "n.csv")
        archive.writestr("__MACOSX/._n.csv", b"what a Mac adds")
    return folder / "n.csv.zip"


def _excel(folder: Path) -> Path:
    pytest.importorskip("openpyxl")
    with pd.ExcelWriter(folder / "n.xlsx") as book:
        pd.DataFrame({"about": ["this table"]}).to_excel(book, sheet_name="read me", index=False)
        pd.DataFrame(NOTES).to_excel(book, sheet_name="notes", index=False)
    return folder / "n.xlsx"


FORMS: dict[str, Callable[[Path], object]] = {
    "csv": lambda folder: write_csv(folder / "n.csv", NOTES),
    "csv with a byte-order mark": _with_bom,
    "tsv": lambda folder: write_csv(folder / "n.tsv", NOTES, delimiter="\t"),
    "json": _json,
    "json lines in .json": _json_lines_named_json,
    "jsonl": lambda folder: write_jsonl(folder / "n.jsonl", NOTES),
    "parquet": _parquet,
    "parquet with categories": _categories,
    "csv.gz": _packed(".gz", pack),
    "csv.bz2": _packed(".bz2", bz2.compress),
    "csv.xz": _packed(".xz", lzma.compress),
    "csv.zst": _packed(".zst", _zstd),
    "csv.zip": _zipped,
    "tsv.gz": _packed(".gz", pack, "tsv"),
    "json.gz": _packed(".gz", pack, "json"),
    "jsonl.GZ": _packed(".GZ", pack, "jsonl"),
    "a sheet of a workbook": _excel,
    "glob": _globbed,
}


@pytest.mark.parametrize("form", FORMS)
def test_same_notes_in_every_form_are_the_same_rows(form: str, tmp_path: Path) -> None:
    rows = load(FORMS[form](tmp_path))["all"]

    assert tuple(rows.column_names) == CANONICAL
    assert rows["id"][:] == ["n1", "007", "n3"]
    assert rows["transcription"][:] == [
        'Seen today, "doing well".\nPlan: rest.',
        "None",
        "Knee pain; swelling.\nMRI ordered.",
    ]
    assert rows["specialty"][:] == ["Neurology", "Neurology", "Orthopedic"]
    assert rows["text_hash"][:] == [hash_text(text) for text in rows["transcription"]]


def test_no_other_column_is_kept(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "n.csv", [{**note, "keywords": note["medical_specialty"]} for note in NOTES])

    assert "keywords" not in load(path)["all"].column_names


def test_columns_by_name(tmp_path: Path) -> None:
    rows = [{"key": str(i), "note": f"note {i}", "field": "ab"[i % 2]} for i in range(4)]
    table = load(write_csv(tmp_path / "n.csv", rows), columns=Columns("note", "field", "key"))["all"]

    assert table["id"][:] == ["0", "1", "2", "3"]
    assert table["specialty"][:] == ["a", "b", "a", "b"]


def test_notes_without_an_id_are_named_by_their_text_and_repeats_are_numbered(tmp_path: Path) -> None:
    rows = [{"transcription": text, "medical_specialty": label} for text, label in [("one", "a"), ("two", "b")]]
    folder = tmp_path / "notes"
    folder.mkdir()
    write_csv(folder / "train.csv", rows + rows[:1])
    write_csv(folder / "test.csv", rows)
    tables = load(folder)

    one, two = hash_text("one")[:16], hash_text("two")[:16]
    assert tables["train"]["id"][:] == [one, two, f"{one}-2"]
    assert tables["test"]["id"][:] == [f"{one}-3", f"{two}-2"]
    assert load(folder)["train"]._fingerprint == tables["train"]._fingerprint


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["train.csv", "val.csv", "test.csv"], ["train", "validation", "test"]),
        (["Training.csv", "dev.csv"], ["train", "validation"]),
        (["train-00000-of-00002.csv", "train-00001-of-00002.csv", "testing.csv"], ["train", "test"]),
        (["train.csv.gz", "dev-0.csv.gz", "dev-1.csv", "test.csv"], ["train", "validation", "test"]),
    ],
)
def test_folder_with_a_file_for_each_split(names: list[str], splits: list[str], tmp_path: Path) -> None:
    for name in names:
        path = write_csv(tmp_path / name, [{**note, "id": f"{name}-{note['id']}"} for note in NOTES])
        if path.suffix == ".gz":
            path.write_bytes(pack(path.read_bytes()))
    (tmp_path / "README.md").write_text("not a table", encoding="utf-8")
    tables = load(tmp_path)

    assert list(tables) == splits
    assert sum(map(len, tables.values())) == 3 * len(names)
    assert list(load(tmp_path / "*.csv*")) == splits


def test_a_folder_without_some_of_its_parts_is_refused(tmp_path: Path) -> None:
    def write(part: int) -> None:
        rows = [{**note, "id": f"{part}-{note['id']}"} for note in NOTES]
        write_csv(tmp_path / f"train-0000{part}-of-00003.csv", rows)

    write(0)
    write(2)
    message = (
        r"the train files of .* are not the parts that their names count \(-00000-of-00003\); keep one file for each"
    )
    with pytest.raises(UserError, match=message):
        load(tmp_path)
    assert len(load(tmp_path / "train-*")["train"]) == 2 * len(NOTES), "a glob names what it wants"
    write(1)
    assert len(load(tmp_path)["train"]) == 3 * len(NOTES)
    (tmp_path / "train-00001-of-00003.csv").rename(tmp_path / "training-00002-of-00003.csv")
    with pytest.raises(UserError, match=message):
        load(tmp_path)


def test_splits_and_class_labels(tmp_path: Path) -> None:
    features = datasets.Features(
        {
            "transcription": datasets.Value("large_string"),
            "medical_specialty": datasets.ClassLabel(names=["Eye", "Ear"]),
        }
    )
    part = datasets.Dataset.from_dict(
        {"transcription": ["a", "b", "c"], "medical_specialty": [0, 1, 0]}, features=features
    )
    part.select([2, 0, 1]).to_parquet(str(tmp_path / "train.parquet"))
    part.to_parquet(str(tmp_path / "test.parquet"))
    tables = load(tmp_path)

    assert tables["train"]["transcription"][:] == ["c", "a", "b"]
    assert tables["train"]["specialty"][:] == ["Eye", "Eye", "Ear"]


def test_builtin_notes_have_three_splits() -> None:
    assert list(load("builtin")) == ["train", "validation", "test"]


def test_aliases_drop_and_min_count(tmp_path: Path) -> None:
    labels = ["Ear / Nose", "ENT", "ear - nose", "Skin", "Eye", "Eye", "Heart", "Heart"]
    rows = [{"transcription": f"note {i}", "medical_specialty": label} for i, label in enumerate(labels)]
    path = write_csv(tmp_path / "n.csv", rows)
    table = load(path, labels=Labels(aliases={"ent": "Ear / Nose"}, drop=["eye"], min_count=2))["all"]

    assert table["specialty"][:] == ["Ear / Nose", "Ear / Nose", "Ear / Nose", "Heart", "Heart"]
    assert table["transcription"][:] == ["note 0", "note 1", "note 2", "note 6", "note 7"]


def test_rows_without_labels_are_kept_if_labels_are_not_required(tmp_path: Path) -> None:
    bare = write_csv(tmp_path / "bare.csv", [{"transcription": "one"}, {"transcription": "two"}])
    some = write_csv(tmp_path / "some.csv", [{**NOTES[0]}, {**NOTES[1], "medical_specialty": ""}])

    assert load(bare, require_labels=False)["all"]["specialty"][:] == [None, None]
    kept = load(some, require_labels=False, labels=Labels(drop=["Neurology"], min_count=9))["all"]
    assert kept["specialty"][:] == ["Neurology", None]


# --- ids --------------------------------------------------------------------------------------------------------------

REPEATED = [
    {"id": identity, "transcription": text, "medical_specialty": label}
    for identity, text, label in [("p1", "one", "a"), ("p1", "two", "b"), ("p2", "three", "a"), ("p1", "one", "a")]
]


def test_repeated_ids_are_made_unique_with_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_csv(tmp_path / "n.csv", REPEATED)
    ids = load(path)["all"]["id"][:]

    one, two = hash_text("one")[:8], hash_text("two")[:8]
    assert ids == [f"p1-{one}", f"p1-{two}", "p2", f"p1-{one}-2"]
    (warning,) = (line for line in capsys.readouterr().err.splitlines() if "data.columns.id" in line)
    assert warning.startswith(f"medlit: data.columns.id: {path}, row 2 has the id 'p1' of {path}, row 1")


@settings(max_examples=30, **BAD_SETTINGS)
@given(
    rows=st.lists(st.tuples(st.sampled_from("pqr"), st.sampled_from(["one", "two", "three"])), min_size=1, max_size=8),
    data=st.data(),
)
def test_ids_are_unique_and_do_not_depend_on_the_order_of_the_rows(
    rows: list[tuple[str, str]], data: st.DataObject, tmp_path: Path
) -> None:
    def ids(order: list[tuple[str, str]]) -> Counter[tuple[str, str]]:
        fields = [{"id": key, "transcription": text, "medical_specialty": "a"} for key, text in order]
        table = load(write_csv(tmp_path / "n.csv", fields))["all"]
        assert len(set(table["id"][:])) == len(order)
        return Counter(zip(table["id"][:], table["transcription"][:], strict=True))

    assert ids(rows) == ids(data.draw(st.permutations(rows)))


def test_repeated_ids_are_refused_where_answers_are_joined_by_them(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "n.csv", REPEATED)
    message = fault(path, join_ids=True, require_labels=False)

    assert f"data.columns.id: {path}, row 2 has the id 'p1' of {path}, row 1, so that answers" in message
    assert "or set 'none'" in message
    assert load(path, join_ids=True, columns=Columns(id="none"))["all"]["id"][2] == hash_text("three")[:16]


def test_answers_are_joined_by_the_ids_of_all_splits(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_csv(tmp_path / f"{split}.csv", [{"id": "p1", "transcription": split, "medical_specialty": "a"}])

    assert (
        f"{tmp_path / 'test.csv'}, row 1 has the id 'p1' of {tmp_path / 'train.csv'}, row 1, so that answers"
        in fault(tmp_path, join_ids=True, require_labels=False)
    )
    assert [table["id"][:] for table in load(tmp_path).values()] == [["p1"], ["p1"]]


def test_answers_are_not_joined_where_some_tables_have_no_ids(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", [{"transcription": "one", "medical_specialty": "a"}])
    write_csv(tmp_path / "b.csv", [{"id": "p1", "transcription": "two", "medical_specialty": "a"}])
    message = fault(tmp_path / "*.csv", join_ids=True, require_labels=False)

    assert f"{tmp_path / 'b.csv'} has ids and {tmp_path / 'a.csv'} has no column 'id'" in message
    for columns in (Columns(id="none"), Columns(text="transcription")):
        joins = columns.id == "none"
        table = load(tmp_path / "*.csv", join_ids=joins, require_labels=False, columns=columns)["all"]
        assert table["id"][1] == (hash_text("two")[:16] if joins else "p1")


@pytest.mark.parametrize("form", ["n.csv", "n.jsonl", "n.parquet"])
def test_no_id_column_takes_the_hash_of_the_text(form: str, tmp_path: Path) -> None:
    rows = [{**row, "id": "" if form == "n.csv" else [1]} for row in REPEATED[:3]]
    if form == "n.csv":
        write_csv(tmp_path / form, rows)
    elif form == "n.jsonl":
        write_jsonl(tmp_path / form, rows)
    else:
        pd.DataFrame(rows).to_parquet(tmp_path / form)

    assert "data.columns.id" in fault(tmp_path / form) or "column 'id'" in fault(tmp_path / form)
    table = load(tmp_path / form, columns=Columns(id="none"))["all"]
    assert table["id"][:] == [hash_text(row["transcription"])[:16] for row in REPEATED[:3]]


def test_numbers_that_are_none_are_null_in_json_and_text_in_csv(tmp_path: Path) -> None:
    values = ["NaN", "Infinity", "-Infinity", "null", "1.50", "12", '"NaN"']
    lines = [f'{{"id": {n}, "transcription": "note {n}", "medical_specialty": {v}}}' for n, v in enumerate(values)]
    (tmp_path / "n.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "n.json").write_text(f"[{','.join(lines)}]", encoding="utf-8")
    for name in ("n.json", "n.jsonl"):
        read = load(tmp_path / name, require_labels=False)["all"]
        assert read["specialty"][:] == [None] * 4 + ["1.5", "12", "NaN"]
        assert read["id"][:] == list("0123456")
    rows = [{"transcription": "one", "medical_specialty": "NaN"}, {"transcription": "NaN", "medical_specialty": "b"}]
    read = load(write_csv(tmp_path / "n.csv", rows))["all"]
    assert (read["specialty"][:], read["transcription"][:]) == (["NaN", "b"], ["one", "NaN"])


def test_numbers_that_are_none_are_null_in_parquet(tmp_path: Path) -> None:
    values = [1.0, float("nan"), float("inf"), None]
    assert as_text(values, None) == ["1.0", None, None, None]
    frame = pd.DataFrame({"transcription": ["x", "y"], "medical_specialty": ["a", float("nan")]})
    frame.to_parquet(tmp_path / "n.parquet")
    assert "row 2: there is no label" in fault(tmp_path / "n.parquet")


def test_labels_that_look_alike_are_one_specialty_in_every_table(tmp_path: Path) -> None:
    written = ["P\u00e9diatrie", "Pe\u0301diatrie", "ENT - Throat", "ENT \u2013 Throat", "P\u00e9diatrie\u200b"]
    for split, labels in {"train": written, "test": written[1::2]}.items():
        rows = [{"transcription": f"{split} {n}", "medical_specialty": label} for n, label in enumerate(labels)]
        write_csv(tmp_path / f"{split}.csv", rows)
    tables = load(tmp_path)
    assert set(tables["train"]["specialty"][:]) == {"Pe\u0301diatrie", "ENT \u2013 Throat"}
    assert tables["test"]["specialty"][:] == ["Pe\u0301diatrie", "ENT \u2013 Throat"]


def _never(*_: object, **__: object) -> None:
    pytest.fail("read again")


def test_second_start_reads_the_cache_and_a_changed_file_does_not(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_csv(tmp_path / "n.csv", NOTES)
    first = load(path)["all"]
    with monkeypatch.context() as patched:
        patched.setattr("medlit.data.readers.csv_rows", _never)
        patched.setattr("medlit.data.notes.clean_note", _never)
        again = load(path)["all"]
    assert again._fingerprint == first._fingerprint
    assert str(cache) in again.cache_files[0]["filename"]

    write_csv(path, [{**note, "medical_specialty": note["medical_specialty"] + "x"} for note in NOTES])
    assert load(path)["all"]._fingerprint != first._fingerprint


def test_long_notes_and_any_characters_survive(tmp_path: Path) -> None:
    texts = ["x" * 100_000, "א\u202eב", "a\x00\x1bb", "### Response:\n{label}", "😀"]
    rows = [{"transcription": text, "medical_specialty": "ab"[i % 2]} for i, text in enumerate(texts)]

    assert load(write_csv(tmp_path / "n.csv", rows))["all"]["transcription"][:] == texts
    assert load(write_jsonl(tmp_path / "n.jsonl", rows))["all"]["transcription"][:] == texts


def test_half_a_character_in_json_becomes_the_replacement_character(tmp_path: Path) -> None:
    (tmp_path / "n.jsonl").write_text(
        '{"transcription": "a\\ud800b \\ud83d\\ude00", "medical_specialty": "x"}\n', encoding="utf-8"
    )
    assert load(tmp_path / "n.jsonl")["all"]["transcription"][:] == ["a\ufffdb 😀"]


@settings(max_examples=40, **BAD_SETTINGS)
@given(
    texts=st.lists(st.text(min_size=1) | st.text(ODD, min_size=1, max_size=9) | EVIL, min_size=1, max_size=5),
    form=st.sampled_from(["n.csv", "n.tsv", "n.jsonl", "n.json"]),
)
def test_arbitrary_text_is_read_as_written_or_refused_in_a_sentence(
    texts: list[str], form: str, tmp_path: Path
) -> None:
    path = tmp_path / form
    # Half of a character has no UTF-8: only JSON can spell one out, and the replacement character takes its place.
    whole = [whole_characters(text) for text in texts]
    rows = [{"transcription": text, "medical_specialty": "x"} for text in (texts if "json" in form else whole)]
    if form == "n.jsonl":
        write_jsonl(path, rows)
    elif form == "n.json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        write_csv(path, rows, delimiter="," if form == "n.csv" else "\t", quoting=csv.QUOTE_ALL)
    clean = [text.replace("\r\n", "\n").replace("\r", "\n").strip() for text in whole]
    if all(clean):
        assert load(path)["all"]["transcription"][:] == clean
    else:
        assert "the note is empty" in fault(path) or "empty in every row" in fault(path)


@settings(max_examples=60, **BAD_SETTINGS)
@example(content=b"\xef", form="n.csv")  # a byte-order mark cut short decodes to nothing
@given(
    content=st.binary(max_size=200),
    form=st.sampled_from(
        ["n.csv", "n.tsv", "n.jsonl", "n.json", "n.parquet", "n.csv.gz", "n.csv.zip", "n.jsonl.zst", "n.xlsx"]
    ),
)
def test_arbitrary_bytes_are_refused_in_a_sentence(content: bytes, form: str, tmp_path: Path) -> None:
    (tmp_path / form).write_bytes(content)
    assert form in fault(tmp_path / form)


# --- bad input --------------------------------------------------------------------------------------------------------

HEADER = "id,transcription,medical_specialty\n"
QUOTED = '"id","transcription","medical_specialty"\n'
LABEL = b'{"transcription": "x", "medical_specialty": %s}'


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("empty.csv", b"", ["is empty"]),
        ("header.csv", HEADER.encode(), ["has a header and no rows"]),
        ("ragged.csv", (HEADER + "1,fine,a\n2,not, fine,b\n").encode(), ["line 3", "4 fields", "header has 3"]),
        ("short.csv", (HEADER + '1,"two\nlines",a\n2,b\n').encode(), ["line 4", "2 fields"]),
        ("open.csv", (HEADER + '1,"never closed,a\n2,x,b\n').encode(), ["line 2", "not closed"]),
        ("semicolons.csv", HEADER.replace(",", ";").encode() + b"1;x, y;a\n", ["line 1", "';'"]),
        ("tabs.csv", HEADER.replace(",", "\t").encode() + b"1\tx\ta\n", ["line 1", "name it .tsv"]),
        ("commas.tsv", HEADER.encode() + b"1,x,a\n", ["line 1", "not separated by tabs"]),
        ("twice.csv", b"id,transcription,transcription\n1,a,b\n", ["two columns are called 'transcription'"]),
        ("binary.csv", bytes(range(256)) * 8, ["binary file"]),
        ("excel.csv", b"PK\x03\x04" + b"\0" * 50, ["Excel"]),
        ("latin.csv", (HEADER + "1,38.5° today,a\n").encode("latin-1"), ["not UTF-8", "line 2", "ISO-8859-1"]),
        (
            "windows.csv",
            (HEADER + "1,patient\u2019s,a\n").encode("cp1252"),
            ["line 2", "Windows-1252", "/windows.csv' > 'utf8-windows.csv'"],
        ),
        ("wide.csv", (HEADER + "1,x,a\n").encode("utf-16"), ["UTF-16"]),
        ("wide-le.csv", (HEADER + "1,x,a\n").encode("utf-16-le"), ["UTF-16"]),
        ("kanji.csv", (HEADER + "1,患者は胸の痛みを訴えています。,a\n" * 5).encode("shift_jis"), ["shift_jis"]),
        ("blank.csv", (HEADER + '1,x,a\n2," ",b\n3,,b\n').encode(), ["row 2", "id 2", "note is empty", "1 more"]),
        ("nulls.csv", (HEADER + "1,x,\n2,y,\n").encode(), ["data.columns.label", "empty in every row"]),
        ("unlabelled.csv", (HEADER + "1,x,a\n2,y,\n").encode(), ["row 2", "no label"]),
        ("mixed.csv", (HEADER + "1,x,a\n2,y,17\n3,z,b\n").encode(), ["row 2", "it is a number among names"]),
        ("late.csv", b"\n\nid;transcription;medical_specialty\n1;x;a\n", ["line 3", "';'"]),
        ("noid.csv", (HEADER + "1,x,a\n,y,b\n").encode(), ["row 2", "no id"]),
        ("broken.jsonl", b'{"transcription": "x", "medical_specialty": "a"}\n{"transcr', ["line 2", "is cut off"]),
        ("bad.jsonl", b'{"transcription": "x"}\n{oops}\n{"transcription": "x"}\n', ["line 2", "not valid JSON"]),
        ("nan.jsonl", LABEL % b'"a"' + b"\n" + LABEL % b"NaN" + b"\n", ["row 2", "no label"]),
        ("nan.json", b"[" + LABEL % b"-Infinity" + b"," + LABEL % b'"a"' + b"]", ["row 1", "no label"]),
        ("invisible.csv", (HEADER + "1,x,a\n2,y,\u200b\ufeff\n").encode(), ["row 2", "no label"]),
        ("list.jsonl", b"[1, 2]\n", ["line 1", "expected an object"]),
        ("broken.json", b'[{"transcription": "x", "medical_specialty": "a"}, {"tr', ["row 2", "is cut off"]),
        ("number.jsonl", b'{"transcription": 3, "medical_specialty": "a"}\n', ["line 1", "a number"]),
        ("true.jsonl", b'{"transcription": true, "medical_specialty": "a"}\n', ["line 1", "holds true or false"]),
        ("after.json", b"[" + LABEL % b'"a"' + b"] and more", ["row 2", "not valid JSON"]),
        ("two.json", b"[" + LABEL % b'"a"' + b"]\n[" + LABEL % b'"b"' + b"]", ["row 2", "not valid JSON"]),
        (
            "types.jsonl",
            b'{"transcription": "x", "medical_specialty": "a"}\n{"transcription": "x", "medical_specialty": ["a"]}\n',
            ["line 2", "'medical_specialty' holds a list"],
        ),
        ("garbage.parquet", b"PAR1garbage", ["not a whole Parquet file"]),
        ("notes.xls", b"\xd0\xcf\x11\xe0", ["a format that medlit does not read", ".csv", ".xlsx", ".gz"]),
        ("notes.xlsx", b"PK\x03\x04", ["not a whole Excel workbook"]),
        ("plain.csv.gz", HEADER.encode(), ["not a whole .gz file"]),
        ("latin.csv.gz", pack((HEADER + "1,38.5°,a\n").encode("latin-1")), ["line 2", "ISO-8859-1"]),
        ("short.csv.gz", pack((HEADER + "1,x\n").encode()), ["line 2", "2 fields"]),
        ("twice.jsonl", b'{"id": "1", "transcription": "x", "id": "2"}\n', ["line 1", "two columns", "same name"]),
        ("twice.json", b'[{"id": "1", "transcription": "x", "id": "2"}]', ["row 1", "two columns"]),
        ("spaced.jsonl", b'{"id": "1", "transcription": "x", " id": "2"}\n', ["line 1", "two columns", "same name"]),
        ("empty.json", b"[{}, {}]", ["has no rows"]),
        (
            "keyed.jsonl",
            b"".join(b'{"note %d": "x"}\n' % n for n in range(1001)),
            ["has over 1,000 different keys", "give all its objects the same"],
        ),
        ("blank-id.csv", (HEADER + '" ",x,a\n1,y,b\n').encode(), ["row 1", "no id"]),
        ("joined.csv", (HEADER + "1,x,a\n" + HEADER + "2,y,b\n").encode(), ["line 3", "the header is repeated here"]),
        ("marked.csv", (HEADER + "1,x,a\n\ufeff" + HEADER + "2,y,b\n").encode(), ["line 3", "header is repeated"]),
        (
            "quoted.csv",
            (QUOTED + "1,x,a\n\ufeff" + QUOTED + "2,y,b\n").encode(),
            ["line 3", "header is repeated"],
        ),
        ("spaces.csv", (HEADER.replace(",", ", ") + "1,x,a\n" + HEADER).encode(), ["line 3", "header is repeated"]),
        ("sep.csv", b"sep=;\r\nid;transcription;medical_specialty\r\n1;x\r\n", ["line 3", "2 fields", "header has 3"]),
        ("only.csv", b"sep=;\r\n", ["is empty"]),
    ],
)
def test_bad_file_gets_one_sentence(name: str, content: bytes, expected: list[str], tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    message = fault(path)

    for part in [str(path), *expected]:
        assert part in message


@pytest.mark.parametrize("form", ["n.json", "n.jsonl"])
def test_a_key_that_comes_late_is_a_column(form: str, tmp_path: Path) -> None:
    """Of 150 objects the last has a key, and the last 30 have lists of labels."""
    rows: list[dict[str, Any]] = [{"transcription": f"note {n}", "ward": None} for n in range(150)]
    for row in rows[120:]:
        row["medical_specialty"] = ["a", "b"]
    rows[-1]["id"] = rows[-1]["ward"] = "7"
    text = json.dumps(rows) if form == "n.json" else "\n".join(map(json.dumps, rows))
    (tmp_path / form).write_text(text, encoding="utf-8")

    (table,) = read_tables(str(tmp_path / form), None, Columns())["all"]
    assert table.rows.column_names == ["transcription", "ward", "medical_specialty", "id"]
    assert table.rows[-1] == rows[-1]
    assert "row 1 and 148 more: there is no id" in fault(tmp_path / form)
    assert "row 1 and 119 more: there is no label" in fault(tmp_path / form, columns=Columns(id="none"))
    read = load(tmp_path / form, columns=Columns(id="none"), require_labels=False)["all"]
    assert read["specialties"][:] == [[]] * 120 + [["a", "b"]] * 30


SPACED = {"id": "id ", "transcription": "\ttranscription", "medical_specialty": " medical_specialty "}


@pytest.mark.parametrize("form", ["n.csv", "n.tsv", "n.json", "n.jsonl", "n.parquet", "n.xlsx"])
def test_spaces_around_column_names_do_not_count(form: str, tmp_path: Path) -> None:
    path, frame = tmp_path / form, pd.DataFrame(NOTES).rename(columns=SPACED)
    if form == "n.parquet":
        frame.to_parquet(path)
    elif form == "n.xlsx":
        pytest.importorskip("openpyxl")
        with pd.ExcelWriter(path) as book:
            pd.DataFrame({"about": ["this table"]}).to_excel(book, sheet_name="read me", index=False)
            frame.to_excel(book, sheet_name="notes", index=False)
    elif "json" in form:
        frame.to_json(path, orient="records", lines=form == "n.jsonl")
    else:
        frame.to_csv(path, index=False, sep="," if form == "n.csv" else "\t")
    rows = load(path)["all"]

    assert rows["id"][:] == ["n1", "007", "n3"]
    assert rows["specialty"][:] == ["Neurology", "Neurology", "Orthopedic"]
    assert load(path)["all"]._fingerprint == rows._fingerprint


def test_class_labels_under_a_name_with_spaces(tmp_path: Path) -> None:
    classes = datasets.ClassLabel(names=["Eye", "Ear"])
    kinds = {" transcription": datasets.Value("string"), "medical_specialty ": classes}
    table = datasets.Dataset.from_dict(
        {" transcription": ["x", "y"], "medical_specialty ": [1, 0]}, features=datasets.Features(kinds)
    )
    table.to_parquet(str(tmp_path / "n.parquet"))
    assert load(tmp_path / "n.parquet")["all"]["specialty"][:] == ["Ear", "Eye"]


def test_a_class_id_without_a_name_is_no_label(tmp_path: Path) -> None:
    kinds = {"transcription": datasets.Value("string"), "medical_specialty": datasets.ClassLabel(names=["Eye", "Ear"])}
    datasets.Dataset.from_dict(
        {"transcription": ["x", "y", "z"], "medical_specialty": [0, 1, 0]}, features=datasets.Features(kinds)
    ).to_parquet(str(tmp_path / "n.parquet"))
    table = pq.read_table(tmp_path / "n.parquet")
    pq.write_table(table.set_column(1, table.field(1), pa.array([0, 7, -1])), tmp_path / "n.parquet")

    assert "row 2 and 1 more: there is no label" in fault(tmp_path / "n.parquet")
    assert load(tmp_path / "n.parquet", require_labels=False)["all"]["specialty"][:] == ["Eye", None, None]


@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
@pytest.mark.parametrize("begin", ["sep={}\r\n", '\ufeff"sep={}"\n', "SEP={}\n\n"])
def test_a_first_line_may_name_the_separator(mark: str, begin: str, tmp_path: Path) -> None:
    path = write_csv(tmp_path / "n.csv", NOTES, delimiter=mark)
    path.write_text(begin.format(mark) + path.read_bytes().decode(), encoding="utf-8", newline="")
    rows = load(path)["all"]

    assert rows["id"][:] == ["n1", "007", "n3"]
    assert rows["transcription"][0] == 'Seen today, "doing well".\nPlan: rest.'
    assert rows["specialty"][:] == ["Neurology", "Neurology", "Orthopedic"]


def test_a_column_may_be_called_like_a_separator_line(tmp_path: Path) -> None:
    rows = [{"sep=": "1", **note} for note in NOTES]
    assert load(write_csv(tmp_path / "n.csv", rows))["all"]["id"][:] == ["n1", "007", "n3"]


def test_a_file_of_numbers_among_files_of_names_is_not_called_empty(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text(HEADER + "1,x,a\n2,y,b\n")
    (tmp_path / "test.csv").write_text(HEADER + "3,z,17\n")

    assert "test.csv, row 1 (id 3): it is a number among names" in fault(tmp_path)


# Types that Parquet holds and `datasets` does not.
STRANGE = {
    "UUIDs": lambda: pa.array([uuid.UUID(int=n).bytes for n in range(3)], pa.uuid()),
    "binary values of a fixed size": lambda: pa.array([b"ab"] * 3, pa.binary(2)),
    "lists of a fixed size": lambda: pa.array([[1, 2]] * 3, pa.list_(pa.int64(), 2)),
    "maps": lambda: pa.array([[("a", 1)]] * 3, pa.map_(pa.string(), pa.int64())),
    "list views": lambda: pa.array([[1]] * 3, pa.list_view(pa.int64())),
    "lists of maps": lambda: pa.array([[[("a", 1)]]] * 3, pa.list_(pa.map_(pa.string(), pa.int64()))),
    "decimals": lambda: pa.array([1, 2, 3], pa.decimal256(50, 2)),
    "durations": lambda: pa.array([1, 2, 3], pa.duration("us")),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_parquet_columns_of_any_type_may_stand_beside_the_notes(kind: str, tmp_path: Path) -> None:
    table = pa.Table.from_pylist(NOTES).append_column("other", STRANGE[kind]()).append_column("n", pa.array([1, 2, 3]))
    pq.write_table(table, tmp_path / "n.parquet")

    assert load(tmp_path / "n.parquet")["all"]["id"][:] == ["n1", "007", "n3"]
    (kept,) = read_tables(str(tmp_path / "n.parquet"), None, Columns())["all"]
    assert {"n", *NOTES[0]} <= set(kept.rows.column_names)
    for column in ("text", "label", "id"):
        message = fault(tmp_path / "n.parquet", columns=Columns(**{column: "other"}))
        assert message.startswith(f"data.columns.{column}: column 'other' of {tmp_path / 'n.parquet'} holds ")


def test_parquet_with_a_column_name_twice(tmp_path: Path) -> None:
    for name in ("transcription", "unused"):
        columns = [pa.array(["x"])] * 4
        pq.write_table(pa.table(columns, [name, name, "transcriptions", "label"]), tmp_path / "n.parquet")
        assert f"two columns are called '{name}'" in fault(tmp_path / "n.parquet")


def test_a_parquet_file_is_read_by_its_name_and_not_as_a_glob(tmp_path: Path) -> None:
    names = ["n1.parquet", "n[1].parquet", "n*.parquet", "n [2024].parquet", "[n]/n?.parquet"]
    (tmp_path / "[n]").mkdir()
    for name in names:
        pd.DataFrame([{"transcription": name, "medical_specialty": "a"}]).to_parquet(tmp_path / name)

    assert [load(tmp_path / name)["all"]["transcription"][:] for name in names] == [[name] for name in names]


def test_excel_cells_are_read_as_text(tmp_path: Path) -> None:
    pytest.importorskip("openpyxl")
    frame = pd.DataFrame({"id": [7, 8.0], "transcription": ["38.5", "x\ny"], "medical_specialty": ["a", "b"]})
    frame.to_excel(tmp_path / "n.xlsx", index=False)
    table = load(tmp_path / "n.xlsx")["all"]

    assert table["id"][:] == ["7", "8"]
    assert table["transcription"][:] == ["38.5", "x\ny"]


def test_an_error_in_a_workbook_is_an_empty_cell(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in (["id", "transcription", "medical_specialty"], [0, "x", 1], [1, "y", "#N/A"], [2, "z", 0]):
        book.active.append(row)
    book.save(tmp_path / "n.xlsx")

    assert "row 2 (id 1): there is no label" in fault(tmp_path / "n.xlsx")
    assert load(tmp_path / "n.xlsx", require_labels=False)["all"]["specialty"][:] == ["1", None, "0"]
    book.active.append(["#N/A", "#N/A", "#N/A"])
    book.save(tmp_path / "n.xlsx")
    assert "row 4" in fault(tmp_path / "n.xlsx", require_labels=False), "a row of errors alone is not a blank one"


def test_a_workbook_with_its_header_twice(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in ([" id", "transcription", None, "medical_specialty"], [1, "x", None, "a"], [" "], [2, "y", None, "b"]):
        book.active.append(row)
    book.save(tmp_path / "n.xlsx")
    assert load(tmp_path / "n.xlsx", columns=Columns(id="none"), allow_missing=True)["all"].num_rows == 3
    book.active.append([" id", "transcription", None, "medical_specialty"])
    book.save(tmp_path / "n.xlsx")
    assert "row 5: the header is repeated here" in fault(tmp_path / "n.xlsx")


def test_carriage_returns_of_a_workbook_end_lines(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in (["transcription", "medical_specialty"], ["one_x000D_\ntwo_x005F_x000D_ \ud83d", "a"], ["b", "b"]):
        book.active.append([cell.encode("utf-8", "replace").decode() for cell in row])
    book.active["A3"] = "half _xD83D_"
    book.save(tmp_path / "n.xlsx")

    assert load(tmp_path / "n.xlsx")["all"]["transcription"][:] == ["one\ntwo_x000D_ ?", "half \ufffd"]


def test_workbooks_that_are_not_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    path, frame = tmp_path / "n.xlsx", pd.DataFrame(NOTES)
    with pd.ExcelWriter(path) as book:
        frame.to_excel(book, sheet_name="may", index=False)
        frame.to_excel(book, sheet_name="june", index=False)
    assert "several sheets of rows (may, june)" in fault(path)
    frame.head(0).to_excel(path, index=False)
    assert "has a header and no rows" in fault(path)
    pd.DataFrame().to_excel(path)
    assert "has no sheet that begins with a header" in fault(path)
    frame.rename(columns={"id": "transcription"}).to_excel(path, index=False)
    assert "row 1: two columns are called 'transcription'" in fault(path)
    book = openpyxl.Workbook()
    for row in (["transcription", "medical_specialty"], ["x", "a", "beside"]):
        book.active.append(row)
    book.save(path)
    assert "row 2: a cell is in a column without a name" in fault(path)
    monkeypatch.setattr("medlit.data.readers.MAX_WORKBOOK", 1 << 10)
    assert "unpacks to" in fault(path)


def test_a_workbook_without_openpyxl_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with zipfile.ZipFile(tmp_path / "n.xlsx", "w") as book:
        book.writestr("xl/workbook.xml", "<workbook/>")
    assert "run `pip install openpyxl`" in fault(tmp_path / "n.xlsx")


@pytest.mark.parametrize("form", ["n.csv", "n.jsonl"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_line_that_never_ends_does_not_fill_the_memory(
    form: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medlit.data.text_files.MAX_OBJECT", 1 << 20)
    content = b"id,transcription\n" * (form == "n.csv") + b"x" * (5 << 20)
    (tmp_path / f"{form}{suffix}").write_bytes(pack(content) if suffix else content)
    assert "the line is over 1 million characters long" in fault(tmp_path / f"{form}{suffix}")


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_json_file_that_never_ends_does_not_fill_the_memory(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medlit.data.text_files.MAX_TEXT", 1 << 20)
    content = b"[" + b" " * (2 << 20) + b"]"
    (tmp_path / f"n.json{suffix}").write_bytes(pack(content) if suffix else content)
    assert "is over 1 million characters; save it as JSON Lines" in fault(tmp_path / f"n.json{suffix}")


@pytest.mark.parametrize(
    ("row", "advice"),
    [
        ({"instruction": "Sort it.", "input": "x", "output": "a"}, "an Alpaca table: set data.columns.text to 'input'"),
        ({"messages": [{"role": "user", "content": "x"}]}, "a chat table: write the user's"),
        ({"conversations": [{"from": "human", "value": "x"}]}, "a chat table: write the user's"),
    ],
)
def test_tables_of_other_tools_are_recognised(row: dict[str, object], advice: str, tmp_path: Path) -> None:
    assert advice in fault(write_jsonl(tmp_path / "n.jsonl", [row]))


def test_parquet_cut_short(tmp_path: Path) -> None:
    path = _parquet(tmp_path)
    path.write_bytes(path.read_bytes()[:-20])
    assert "not a whole Parquet file" in fault(path)


def test_parquet_with_broken_pages(tmp_path: Path) -> None:
    path = _parquet(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:4] + b"\xff" * 80 + whole[84:])
    assert "not a whole Parquet file" in fault(path)


def test_parquet_with_text_in_another_encoding(tmp_path: Path) -> None:
    notes = pa.array([b"fine", "38.5\u00b0 today".encode("latin-1")], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"transcription": notes, "medical_specialty": ["a", "b"]}), tmp_path / "n.parquet")
    message = fault(tmp_path / "n.parquet")

    assert f"{tmp_path / 'n.parquet'} has text that is not UTF-8" in message
    assert "today" not in message


def test_parquet_columns_of_wrong_types(tmp_path: Path) -> None:
    pd.DataFrame({"transcription": [1, 2], "medical_specialty": ["a", "b"]}).to_parquet(tmp_path / "a.parquet")
    pd.DataFrame({"transcription": ["x"], "medical_specialty": [[1]]}).to_parquet(tmp_path / "b.parquet")
    pd.DataFrame({"transcription": ["x"], "medical_specialty": [None]}).to_parquet(tmp_path / "c.parquet")

    assert "'transcription'" in fault(tmp_path / "a.parquet")
    assert "holds list" in fault(tmp_path / "b.parquet")
    assert "is empty in every row" in fault(tmp_path / "c.parquet")


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (Columns(text="note"), "data.columns.text"),
        (Columns(label="field"), "data.columns.label"),
        (Columns(id="key"), "data.columns.id"),
    ],
)
def test_unknown_column_lists_those_that_exist(columns: Columns, expected: str, tmp_path: Path) -> None:
    message = fault(write_csv(tmp_path / "n.csv", NOTES), columns=columns)

    assert expected in message
    assert "id, transcription, medical_specialty" in message


def test_a_column_of_texts_is_no_column_of_labels(tmp_path: Path) -> None:
    rows = [{"transcription": "secret words " * 20, "summary": "secret words " * 10}] * 3
    message = fault(write_csv(tmp_path / "n.csv", rows), columns=Columns(label="summary"))

    assert "over 100 characters" in message
    assert "secret" not in message


@pytest.mark.parametrize("form", ["n.csv", "n.jsonl", "n.parquet", "n.xlsx"])
@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (Columns(id="transcription"), ("id", "'transcription'", "text")),  # ids are in every table of answers
        (Columns(text="id"), ("id", "'id'", "text")),  # the id column that is taken without being named
        (Columns(label="id"), ("id", "'id'", "label")),
        (Columns(id="medical_specialty"), ("id", "'medical_specialty'", "label")),
        (Columns(label="transcription"), ("label", "'transcription'", "text")),
    ],
)
def test_a_column_is_one_thing(form: str, columns: Columns, expected: tuple[str, str, str], tmp_path: Path) -> None:
    table = pd.DataFrame(NOTES)
    {
        "n.csv": partial(table.to_csv, index=False),
        "n.jsonl": partial(table.to_json, orient="records", lines=True),
        "n.parquet": partial(table.to_parquet, index=False),
        "n.xlsx": partial(table.to_excel, index=False),
    }[form](tmp_path / form)
    key, name, first = expected
    remedy = "name another column or, for hashes of the texts, 'none'" if key == "id" else "name another column"

    assert fault(tmp_path / form, columns=columns) == (
        f"data.columns.{key}: column {name} of {tmp_path / form} is that of data.columns.{first}; {remedy}."
    )


def test_the_column_id_may_hold_the_notes_where_no_column_names_them(tmp_path: Path) -> None:
    notes = load(write_csv(tmp_path / "n.csv", NOTES), columns=Columns(text="id", id="none"))["all"]

    assert notes["transcription"][:] == ["n1", "007", "n3"]
    assert notes["id"][:] == [hash_text(note)[:16] for note in notes["transcription"]]


def test_file_without_a_header_does_not_show_its_text(tmp_path: Path) -> None:
    (tmp_path / "n.csv").write_text(f"1,{'secret words ' * 5},a\n2,x,b\n", encoding="utf-8")
    message = fault(tmp_path / "n.csv")

    assert "no header?" in message
    assert "secret" not in message


@pytest.mark.parametrize("source", ["missing.csv", "./missing", "missing/*.csv", "what is this?"])
def test_missing_file_is_named(source: str) -> None:
    message = fault(source)

    assert message.startswith("data.source")
    assert source.removeprefix("./") in message


def test_folders_that_are_not_understood(tmp_path: Path) -> None:
    assert "holds no" in fault(tmp_path)
    write_csv(tmp_path / "train.csv", NOTES)
    write_csv(tmp_path / "holdout.csv", NOTES)
    assert f"holdout.csv, one of the files of {tmp_path}, names no split" in fault(tmp_path)
    assert f"holdout.csv, one of the files of {tmp_path}/*.csv, names no split" in fault(tmp_path / "*.csv")
    (tmp_path / "holdout.csv").rename(tmp_path / "training.csv")
    assert "are both named after the train split" in fault(tmp_path)


@pytest.mark.parametrize("inner", ["more/test.csv.gz", "train.parquet/part-0.parquet", "label=x/part-0.parquet"])
@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("is_link", [True, False])
def test_tables_in_the_folders_of_a_folder_are_not_dropped_silently(
    inner: str, beside: bool, is_link: bool, tmp_path: Path
) -> None:
    source = tmp_path / "notes"
    (source / "figures").mkdir(parents=True)
    (source / "figures" / "README.md").write_text("no table", encoding="utf-8")
    if beside:
        write_csv(source / "train.csv", NOTES)
        assert list(load(source)) == ["train"]
    folder, file = Path(inner).parts
    (tmp_path / folder).mkdir()
    (tmp_path / folder / file).touch()
    if is_link:
        (source / folder).symlink_to(tmp_path / folder)
    else:
        (tmp_path / folder).rename(source / folder)

    expected = (
        f"data.source: the tables in the folder {source / folder} would not be read; move it away or its tables up, or"
        " give a glob of just the files to read."
    )
    assert fault(source) == fault(source / "*") == expected


def test_hidden_folders_and_those_that_a_glob_reads_are_no_fault(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", NOTES)
    for name in (".git", "_temporary", ".ipynb_checkpoints", "__MACOSX", "more"):
        (tmp_path / name).mkdir()
        write_csv(tmp_path / name / "test.csv", NOTES)

    assert list(load(tmp_path / "*.csv")) == ["train"]
    assert list(load(tmp_path / "[tm]*" / "**")) == ["test"]
    (tmp_path / "more" / "test.csv").rename(tmp_path / "test.csv")
    write_csv(tmp_path / "more" / "answers.csv", NOTES)  # of a run or an audit, say
    assert list(load(tmp_path)) == ["train", "test"]


def test_a_file_that_a_glob_names_twice_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    write_csv(tmp_path / "more" / "notes.csv", NOTES)

    assert len(load(tmp_path / "**" / "**" / "*.csv")["all"]) == len(NOTES)


def test_a_link_to_a_file_that_is_gone_is_not_left_out(tmp_path: Path) -> None:
    source = tmp_path / "notes"
    source.mkdir()
    write_csv(source / "train.csv", NOTES)
    (source / "LICENSE").symlink_to(tmp_path / "gone")
    assert list(load(source)) == ["train"]
    (source / "test.csv").symlink_to(tmp_path / "gone.csv")

    expected = f"data.source: {source / 'test.csv'} is no regular file, or a link to none; put one in its place."
    assert fault(source) == fault(source / "*.csv") == expected
    write_csv(tmp_path / "gone.csv", NOTES)
    assert list(load(source)) == ["train", "test"]


def test_a_saved_dataset_is_written_as_parquet_instead(tmp_path: Path) -> None:
    notes = datasets.Dataset.from_list(NOTES)
    notes.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=notes).save_to_disk(str(tmp_path / "splits"))
    for name in ("one", "splits"):
        assert "write `dataset.to_parquet(...)`" in fault(tmp_path / name)


def test_labels_that_leave_nothing(tmp_path: Path) -> None:
    assert "leave no row" in fault(write_csv(tmp_path / "n.csv", NOTES), labels=Labels(min_count=9))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_file_that_may_not_be_read(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "n.csv", NOTES)
    path.chmod(0)
    assert "permissions" in fault(path)


# --- the cache --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "write", [lambda folder: write_csv(folder / "n.csv", NOTES), _json, _parquet], ids=["csv", "json", "parquet"]
)
@pytest.mark.parametrize("made", [None, 0o777], ids=["new", "open to all"])
def test_notes_are_cached_where_their_owner_alone_can_read(
    cache: Path, tmp_path: Path, write: Callable[[Path], Path], made: int | None
) -> None:
    """The umask does not matter: the files have the mode of `datasets`, but the folder is private."""
    if made is not None:
        (cache / "medlit").mkdir()
        (cache / "medlit").chmod(made)
    path = write(tmp_path)
    old = os.umask(0)
    try:
        tokenise(load(path)["all"], AlpacaPrompt(byte_tokenizer(), max_length=512))
    finally:
        os.umask(old)
    assert [name.name for name in cache.iterdir()] == ["medlit"]
    assert stat.S_IMODE((cache / "medlit").stat().st_mode) == 0o700
    assert len(list(cache.rglob("*.arrow"))) >= 3, "as read, canonical, tokenised"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_folder_that_cannot_be_private_is_refused(cache: Path, tmp_path: Path) -> None:
    cache.chmod(0o500)
    assert "HF_DATASETS_CACHE" in fault(write_csv(tmp_path / "n.csv", NOTES))


# --- the Hub, offline -------------------------------------------------------------------------------------------------

COMMIT = "a" * 40


def _gated() -> Exception:
    """What the Hub answers for a file of a gated dataset."""
    request = httpx.Request("GET", "https://huggingface.co/datasets/clinic/notes")
    return GatedRepoError("403 Client Error", response=httpx.Response(403, request=request))


@pytest.fixture
def _offline(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, and a cache that holds `clinic/notes` at one commit, laid out as `datasets` leaves it."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    builder = datasets.load_dataset_builder("parquet", data_files={"train": str(_parquet(tmp_path))})
    builder.download_and_prepare()
    folder = cache / "clinic___notes" / "default" / "0.0.0" / COMMIT
    shutil.copytree(builder.cache_dir, folder)
    (folder / "parquet-train.arrow").rename(folder / "notes-train.arrow")
    info = json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))
    info["dataset_name"] = "notes"
    info["download_checksums"] = {f"hf://datasets/clinic/notes@{COMMIT}/a.parquet": {"num_bytes": 1, "checksum": None}}
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")


@pytest.mark.usefixtures("_offline")
def test_hub_dataset_from_the_cache() -> None:
    assert load("clinic/notes")["train"]["id"][:] == ["n1", "007", "n3"]
    assert load("clinic/notes", revision=COMMIT)["train"]["id"][:] == ["n1", "007", "n3"]
    assert commit_of(load("clinic/notes").values()) == COMMIT


def test_only_hub_datasets_have_a_commit(tmp_path: Path) -> None:
    folder = tmp_path / COMMIT
    folder.mkdir()
    assert commit_of(load(_parquet(folder)).values()) is None


@pytest.mark.usefixtures("_offline")
def test_hub_dataset_that_is_not_in_the_cache_names_the_command_that_fills_it() -> None:
    message = fault("clinic/other", revision="v2")
    assert "HF_HUB_OFFLINE is set" in message
    assert "HF_HUB_OFFLINE=0 medlit audit --data.source clinic/other --data.revision v2" in message


@pytest.mark.parametrize("text", ["clinic/notes", "notes", "clinic/notes:2024 spring", "notes:v1.0"])
def test_a_hub_id_may_name_a_configuration(text: str) -> None:
    assert is_hub_id(text)


@pytest.mark.parametrize(
    "text", ["./notes", "wards/notes.csv", "notes.jsonl.gz", "s3://bucket/notes", "a/b/c", "C:\\n"]
)
def test_a_path_is_no_hub_id(text: str) -> None:
    assert not is_hub_id(text)


@pytest.mark.usefixtures("_offline")
def test_a_configuration_of_a_hub_dataset_from_the_cache(cache: Path) -> None:
    assert load("clinic/notes:default")["train"]["id"][:] == ["n1", "007", "n3"]
    assert "no configuration 'may', only default; name one, such as clinic/notes:default" in fault("clinic/notes:may")
    shutil.copytree(cache / "clinic___notes" / "default", cache / "clinic___notes" / "june")
    info = next((cache / "clinic___notes" / "june").rglob("dataset_info.json"))
    info.write_text(info.read_text(encoding="utf-8").replace('"default"', '"june"'), encoding="utf-8")
    message = fault("clinic/notes")
    assert "has several configurations: " in message
    assert {"default", "june"} <= set(re.findall(r"\w+", message))


def test_the_configurations_that_the_hub_lists_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real messages of `datasets`, for a dataset that lies in a folder."""
    repository = tmp_path / "repository"
    for name in ("may", "june"):
        (repository / name).mkdir(parents=True)
        write_csv(repository / name / "train.csv", NOTES)
    listed = "".join(f"- config_name: {name}\n  data_files: {name}/*.csv\n" for name in ("may", "june"))
    (repository / "README.md").write_text(f"---\nconfigs:\n{listed}---\n", encoding="utf-8")
    real = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda _, *given, **__: real(str(repository), *given))

    assert "has several configurations: may, june; name one, such as clinic/notes:may" in fault("clinic/notes")
    assert "has no configuration 'july', only may, june" in fault("clinic/notes:july")
    assert load("clinic/notes:june")["train"]["id"][:] == ["n1", "007", "n3"]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            datasets.exceptions.DatasetNotFoundError(
                "Dataset 'clinic/notes' is a gated dataset on the Hub. You must be authenticated to access it."
            ),
            ["is gated", "accept its licence at https://huggingface.co/datasets/clinic/notes", "HF_TOKEN"],
        ),
        (_gated(), ["is gated", "HF_TOKEN"]),
        (
            datasets.exceptions.DatasetNotFoundError("Dataset 'x' doesn't exist on the Hub or cannot be accessed."),
            ["neither cached nor reachable (DatasetNotFoundError)", "set HF_TOKEN if it is private"],
        ),
        (
            ValueError("Arrow type extension<arrow.uuid> does not have a datasets dtype equivalent."),
            ["cannot be read as one table (ValueError)"],
        ),
        (
            RuntimeError("Dataset scripts are no longer supported, but found notes.py"),
            ["cannot be read as one table (RuntimeError)", "download them"],
        ),
        (datasets.exceptions.DatasetGenerationError("x"), ["cannot be read as one table"]),
    ],
    ids=["gated", "a gated file", "private", "a type", "a script", "files that differ"],
)
def test_a_hub_dataset_that_cannot_be_read_says_why(
    error: Exception, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    message = fault("clinic/notes")
    assert message.startswith("data.source: ")
    for part in expected:
        assert part in message


@pytest.mark.usefixtures("_offline")
def test_another_revision_than_the_cached_one_is_refused() -> None:
    message = fault("clinic/notes", revision="b" * 40)
    assert message.startswith("data.revision")
    assert f"the cache holds clinic/notes at {COMMIT}" in message


# --- several labels a note --------------------------------------------------------------------------------------------

SEVERAL = [["Surgery", "Neurology"], ["neurology"], ["Surgery", "surgery "], ["Radiology", "Surgery"]]
MEANT = [["Surgery", "Neurology"], ["Neurology"], ["Surgery"], ["Radiology", "Surgery"]]


def _several(labels: list[Any]) -> list[dict[str, Any]]:
    return [{"transcription": f"note {n}", "medical_specialty": each} for n, each in enumerate(labels)]


def _cells(folder: Path) -> Path:
    return write_csv(folder / "cells.csv", _several([" ; ".join(each) + ";" for each in SEVERAL]))


def _json_lists(folder: Path) -> Path:
    return write_jsonl(folder / "lists.jsonl", _several(SEVERAL))


def _parquet_lists(folder: Path) -> Path:
    pd.DataFrame(_several(SEVERAL)).to_parquet(folder / "lists.parquet")
    return folder / "lists.parquet"


def _class_lists(folder: Path) -> Path:
    names = ["Radiology", "Neurology", "Surgery"]
    codes = [[names.index(normalise_text(each).capitalize()) for each in labels] for labels in SEVERAL]
    kinds = {
        "transcription": datasets.Value("string"),
        "medical_specialty": datasets.List(datasets.ClassLabel(names=names)),
    }
    table = datasets.Dataset.from_list(_several(codes), features=datasets.Features(kinds))
    table.to_parquet(str(folder / "classes.parquet"))
    return folder / "classes.parquet"


@pytest.mark.parametrize("write", [_cells, _json_lists, _parquet_lists, _class_lists])
def test_a_note_has_all_labels_of_its_cell(write: Callable[[Path], Path], tmp_path: Path) -> None:
    separator = ";" if write is _cells else None
    rows = load(write(tmp_path), labels=Labels(separator=separator))["all"]
    assert rows["specialties"][:] == MEANT
    assert rows["specialty"][:] == [first for first, *_ in MEANT]


def test_rules_apply_to_each_label_of_a_cell(tmp_path: Path) -> None:
    rules = Labels(";", aliases={"Radiology": "Imaging"}, drop=["Neurology"], min_count=1)
    rows = load(_cells(tmp_path), labels=rules)["all"]
    assert rows["specialties"][:] == [["Surgery"], ["Surgery"], ["Imaging", "Surgery"]]
    rare = load(_cells(tmp_path), labels=Labels(";", min_count=2))["all"]
    assert rare["specialties"][:] == [["Surgery", "Neurology"], ["Neurology"], ["Surgery"], ["Surgery"]]


def test_one_label_a_note_is_all_its_labels(tmp_path: Path) -> None:
    rows = load(write_csv(tmp_path / "n.csv", NOTES))["all"]
    assert rows["specialties"][:] == [[name] for name in rows["specialty"][:]]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([["a"], "b"], "holds a text where a list of texts belongs"),
        (["a", ["b"]], "holds a list where text belongs"),
        ([["a"], ["b", 3]], "holds a list where a list of texts belongs"),
        ([["a"], [["b"]]], "holds a list where a list of texts belongs"),
        ([["a"], []], "row 2: there is no label"),
        ([["a"], [" "]], "row 2: there is no label"),
        ([["a"], None], "row 2: there is no label"),
        ([["a", "1"], ["b"]], "it is a number among names"),
    ],
)
def test_a_cell_without_fit_labels_is_refused(labels: list[Any], expected: str, tmp_path: Path) -> None:
    assert expected in fault(write_jsonl(tmp_path / "n.jsonl", _several(labels)))


def test_a_separator_is_a_mark() -> None:
    with pytest.raises(UserError, match=r"^data\.labels\.separator: must be a mark"):
        Labels(separator=" ")
