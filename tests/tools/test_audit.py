"""The audit's counts are those of ten lines of pandas, and its report holds no note."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
import yaml
from builtin_notes import builtin_notes
from fake_tokenizers import byte_tokenizer

from medlit.__main__ import main
from medlit.data.audit import Audit, AuditReport, audit
from medlit.data.datamodule import TranscriptionDataModule
from medlit.data.label_errors import LABELS_CHECKED
from medlit.data.prompt import AlpacaPrompt, NotePrompt
from medlit.data.settings import Labels, Split
from medlit.errors import UserError
from medlit.tools.audit import EXIT_OVER_LIMIT, audit_figure, run


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    # No base model, so lengths are in words; the bundled one would be converted first.
    monkeypatch.setenv("MEDLIT_AUDIT__MODEL__LANGUAGE_MODEL__BASE_MODEL", str(Path(__file__).parent))
    monkeypatch.setenv("COLUMNS", "200")  # a terminal wide enough that no line of a table is broken


@pytest.fixture
def _audited_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Audit a source the first time only, for tests of what the command makes of the result."""
    results: dict[str, Audit] = {}

    def audit_once(data: TranscriptionDataModule, *prompt: Any) -> Audit:  # noqa: ANN401
        if data.source not in results:
            results[data.source] = audit(data, *prompt)
        return results[data.source]

    monkeypatch.setattr("medlit.tools.audit.audit", audit_once)


def planted() -> dict[str, list[dict[str, str]]]:
    """Built-in notes with duplicates, conflicts, leaks, near copies, and columns that give the label away."""
    splits = builtin_notes(train=60, validation=20, test=30)
    train, validation, test = splits["train"], splits["validation"], splits["test"]
    other = {"medical_specialty": "Radiology"}
    train += [{**note, "id": f"again-{note['id']}"} for note in train[:7]]
    train += [{**note, "id": f"conflict-{note['id']}"} | other for note in train[5:9]]
    train += [{**train[0], "id": "spaced", "transcription": f"  {train[0]['transcription']} ".replace(" ", "\n ")}]
    validation += [{**note, "id": f"leaked-{note['id']}"} for note in train[20:23]]
    test += [{**note, "id": f"leaked-{note['id']}"} for note in train[20:25]]
    test += [
        {**note, "id": f"near-{note['id']}", "transcription": note["transcription"] + " Noted."}
        for note in train[30:33]
    ]
    test += [{**test[0], "id": "short", "transcription": "Seen today."}]
    for place, note in enumerate(train + validation + test):
        note["keywords"] = "" if place % 4 == 0 else f"{note['medical_specialty'].lower()}, findings, plan"
        note["code"] = str(sum(note["medical_specialty"].encode()))
        note["ward"] = "north" if place % 2 else "south"
    return splits


def write(folder: Path, splits: dict[str, list[dict[str, str]]]) -> Path:
    folder.mkdir(exist_ok=True)
    for split, notes in splits.items():
        with (folder / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(notes[0]))
            writer.writeheader()
            writer.writerows(notes)
    return folder


def letters() -> AlpacaPrompt:
    """A letter is a token, and eight fit."""
    plenty = AlpacaPrompt(byte_tokenizer())
    return AlpacaPrompt(byte_tokenizer(), max_length=plenty.max_length - plenty.room + 8)


def report_of(
    source: Path | str,
    load_prompt: Callable[[], NotePrompt | None] = lambda: None,
    **settings: Any,  # noqa: ANN401
) -> AuditReport:
    return audit(TranscriptionDataModule(str(source), **settings), load_prompt).report


def test_counts_agree_with_pandas(tmp_path: Path) -> None:
    report = report_of(write(tmp_path / "notes", planted()))

    frame = pd.concat(pd.DataFrame(notes).assign(split=split) for split, notes in planted().items())
    frame["text"] = frame["transcription"].str.split().str.join(" ")
    groups = frame.groupby("text")["medical_specialty"]
    size, labels = groups.transform("size"), groups.transform("nunique")
    assert report.rows == len(frame)
    assert report.classes == frame["medical_specialty"].value_counts().to_dict()
    assert report.splits == frame["split"].value_counts(sort=False).to_dict()
    assert report.duplicates["groups"] == (groups.size() > 1).sum() > 0
    assert report.duplicates["rows"] == (size > 1).sum()
    assert report.conflicts["groups"] == (groups.nunique() > 1).sum() > 0
    assert report.conflicts["rows"] == (labels > 1).sum()
    assert report.accuracy_ceiling == pytest.approx(
        groups.agg(lambda names: names.value_counts().max()).sum() / len(frame)
    )
    texts = frame.groupby("split")["text"].agg(set)
    for pair, rows in report.leakage.items():
        earlier, later = pair.split("/")
        assert rows == frame.loc[frame["split"] == later, "text"].isin(texts[earlier]).sum()
    assert report.leakage == {"train/validation": 3, "train/test": 5, "validation/test": 3}
    words = frame["text"].str.split().str.len()
    assert report.lengths["words"]["max"] == words.max()
    assert report.lengths["words"]["mean"] == pytest.approx(words.mean(), abs=0.05)
    assert report.short["rows"] == (words < 20).sum()


def test_near_copies_are_found(tmp_path: Path) -> None:
    report = report_of(write(tmp_path / "notes", planted()))

    assert report.near_threshold == 0.8
    assert report.near_duplicates is not None
    assert report.near_leakage is not None
    assert report.near_duplicates["groups"] == 3
    assert report.near_leakage["train/test"] == report.leakage["train/test"] + 3


@pytest.mark.usefixtures("_audited_once")
def test_files_that_no_audit_wrote_are_replaced_on_request_alone(tmp_path: Path) -> None:
    source = write(tmp_path / "notes", planted())
    (tmp_path / "out").mkdir()
    arguments = [*_flags(source), "--output", str(tmp_path / "out")]
    mine = [tmp_path / "out" / name for name in ("audit.json", "audit.png")]
    for path in mine:
        path.write_text("[1]")
        with pytest.raises(UserError, match=rf"output: 'medlit audit' would replace {path}, which it did not write"):
            run(arguments)
        assert path.read_text() == "[1]"
        path.unlink()
    for path in mine:
        path.write_text("[1]")
    for again in (["--overwrite"], []):
        assert run([*arguments, *again]) == 0
        assert json.loads((tmp_path / "out" / "audit.json").read_text())["rows"] > 0


def test_an_audit_is_not_written_among_the_notes(tmp_path: Path) -> None:
    source = write(tmp_path / "notes", planted())
    with pytest.raises(UserError, match=r"output: audit\.json would be among the notes of"):
        run(["--data.source", str(source), "--output", str(source), "--overwrite"])
    table = (source / "train.csv").rename(tmp_path / "audit.json")
    before = table.read_bytes()
    with pytest.raises(UserError, match=r"output: audit\.json would be among the notes of"):
        run(["--data.source", str(table), "--output", str(tmp_path), "--overwrite"])
    assert table.read_bytes() == before


def test_columns_that_give_the_label_away(tmp_path: Path) -> None:
    leaks = report_of(write(tmp_path / "notes", planted())).label_leaks

    assert leaks == {"code": 1.0, "keywords": 1.0}


def test_notes_of_100_000_characters_with_quoted_line_breaks(tmp_path: Path) -> None:
    long = 'Seen "today", well.\r\n\nPlan: rest.\n' * 4_000
    texts = [long, long.replace("\r\n", "\n"), long + "Noted.", "One\ntwo."]
    notes = [{"id": str(n), "transcription": text, "medical_specialty": "ab"[n % 2]} for n, text in enumerate(texts)]
    source = write(tmp_path / "notes", {"train": notes}) / "train.csv"
    report = report_of(source, load_prompt=letters)

    assert report.lengths["tokens"]["max"] == len(texts[1]) + len("Noted.") > 100_000
    assert report.duplicates == {"groups": 1, "rows": 2, "ids": [["0", "1"]]}
    assert report.conflicts["rows"] == 2
    assert (report.lengths["words"]["min"], report.lengths["words"]["max"]) == (2, 20_001)


@pytest.mark.parametrize(("name", "note", "label"), [("notes.csv", " ", ""), ("notes.parquet", None, None)])
def test_empty_and_unlabelled_notes_are_counted_and_not_refused(
    tmp_path: Path, name: str, note: str | None, label: str | None
) -> None:
    rows = [("a", "one two", "x"), ("b", note, "x"), ("c", "three", label), ("d", "four", "y")]
    table = pd.DataFrame(rows, columns=["id", "transcription", "medical_specialty"])
    table.to_csv(tmp_path / name, index=False) if name.endswith(".csv") else table.to_parquet(tmp_path / name)
    report = report_of(tmp_path / name, load_prompt=letters)

    assert report.lengths["tokens"]["min"] == report.lengths["words"]["min"] == 0
    assert report.empty == {"rows": 1, "ids": ["b"]}
    assert report.unlabelled == 1
    assert report.accuracy_ceiling == 1
    assert report.splits == {"all": 4}
    assert report.leakage == {}


def test_tokens_and_the_share_that_is_cut(tmp_path: Path) -> None:
    notes = [{"id": str(n), "transcription": "x" * n, "medical_specialty": "ab"[n % 2]} for n in range(1, 11)]
    source = write(tmp_path / "notes", {"train": notes}) / "train.csv"
    tokens = report_of(source, load_prompt=letters).lengths["tokens"]

    assert tokens["max"] == 10
    assert tokens["limit"] == 8
    assert tokens["share_cut"] == 0.2


def test_a_sample_of_a_large_table_is_tokenised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medlit.data.audit.TOKENISED", 4)
    monkeypatch.setattr("medlit.data.audit.TOKENISED_AT_ONCE", 3)
    notes = [{"id": str(n), "transcription": "x" * n, "medical_specialty": "ab"[n % 2]} for n in range(1, 11)]
    source = write(tmp_path / "notes", {"train": notes}) / "train.csv"
    lengths = audit(TranscriptionDataModule(str(source)), letters).lengths

    assert lengths["tokens"].tolist() == [1, 4, 7, 10]
    assert len(lengths["words"]) == 10


def test_audit_writes_counts_and_a_figure_but_no_note(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notes = planted()
    source = write(tmp_path / "notes", notes)
    output = tmp_path / "out"
    assert run([*_flags(source), "--output", str(output)]) == 0

    content = (output / "audit.json").read_text(encoding="utf-8")
    expected = {
        "rows",
        "classes",
        "lengths",
        "duplicates",
        "near_duplicates",
        "conflicts",
        "accuracy_ceiling",
        "leakage",
        "label_leaks",
    }
    assert expected <= json.loads(content).keys()
    assert (output / "audit.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    for note in notes["train"]:
        assert note["transcription"][:25] not in content + printed


def _flags(source: Path | str) -> list[str]:
    return [f"--data.source={source}", f"--model.language_model.base_model={Path(__file__).parent}"]


@pytest.mark.usefixtures("_audited_once")
def test_strict_fails_over_a_limit(tmp_path: Path) -> None:
    flags = _flags(write(tmp_path / "notes", planted()))
    for limits, code in (
        ([], EXIT_OVER_LIMIT),
        (["--max_leakage", "1", "--max_conflicts", "1"], 0),
        (["--max_leakage=1"], EXIT_OVER_LIMIT),
    ):
        assert run([*flags, "--strict", *limits]) == code, limits
        assert run([*flags, *limits]) == 0, limits


def test_builtin_notes_pass_a_strict_audit(tmp_path: Path) -> None:
    assert run([*_flags("builtin"), "--strict", "--output", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "audit.json").read_text(encoding="utf-8"))
    assert report["duplicates"]["rows"] == 0
    assert report["near_leakage"] == {"train/validation": 0, "train/test": 0, "validation/test": 0}


def test_empty_and_unlabelled_notes_fail_a_strict_audit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [("a", "one two", "x"), ("b", " ", "x"), ("c", "three", ""), ("d", "four", "y")]
    notes = [dict(zip(("id", "transcription", "medical_specialty"), row, strict=True)) for row in rows]
    source = write(tmp_path / "notes", {"train": notes}) / "train.csv"

    assert run([*_flags(source), "--strict"]) == EXIT_OVER_LIMIT
    printed = capsys.readouterr().out
    assert "over a limit: notes that are empty: 1" in printed
    assert "over a limit: notes without a label: 1" in printed


# --- on the command line ---------------------------------------------------------------------------------------------

RECIPE = Path(__file__).parents[2] / "configs" / "llama31_8b.yaml"


def verb(*arguments: object) -> int:
    """`medlit audit` with these arguments; the exit code."""
    with pytest.raises(SystemExit) as stop:
        main(["audit", *map(str, arguments)])
    return int(stop.value.code or 0)


def test_the_config_for_a_gpu_audits_here_with_a_flag_on_top(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "notes", planted())
    arguments = ["--config", RECIPE, "--data.source", source]
    assert verb(*arguments, "--output", tmp_path) == 0
    out, err = capsys.readouterr()
    assert json.loads((tmp_path / "audit.json").read_text(encoding="utf-8"))["source"] == str(source)
    assert f"medlit audit: {source}" in out
    assert "test notes whose text is also in train" in out
    assert "lengths are in words only, because the tokenizer is not available" in err
    assert "would fail with --strict: notes whose text has several labels: " in out
    assert "% (--max_conflicts 0)" in out
    assert verb(*arguments, "--strict") == EXIT_OVER_LIMIT


def test_columns_and_labels_of_a_config_are_used(tmp_path: Path) -> None:
    names = {"id": "key", "transcription": "note", "medical_specialty": "department"}
    rows = [{names.get(key, key): value for key, value in note.items()} for note in planted()["train"]]
    source = write(tmp_path / "notes", {"train": rows}) / "train.csv"
    config = tmp_path / "own.yaml"
    data = {"source": str(source), "columns": {"id": "key", "text": "note", "label": "department"}}
    config.write_text(yaml.safe_dump({"data": data | {"labels": {"aliases": {"Radiology": "Imaging"}}}}))
    assert verb("--config", config, "--output", tmp_path) == 0
    report = json.loads((tmp_path / "audit.json").read_text(encoding="utf-8"))
    assert report["rows"] == len(rows)
    assert report["classes"]["Imaging"] > 0
    assert "Radiology" not in report["classes"]
    assert {"key", "note"}.isdisjoint(report["label_leaks"])


def test_the_settings_that_mend_labels_are_printed_and_can_be_pasted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = ["Neurology"] * 4 + ["Neurolgy", "Neurology.", "nan", "None", "yes", "Cardiology; Neurology", "Old"]
    labels += ["Cardiology", "Pe\u0301diatrie \u2013 Nuit", "P\u00e9diatrie - Nuit"]
    notes = [
        {"id": str(n), "transcription": f"note {n}", "medical_specialty": label, "code": label.upper()}
        for n, label in enumerate(labels)
    ]
    source = write(tmp_path / "notes", {"train": notes}) / "train.csv"
    assert verb(*_flags(source), "--data.labels.drop", "[Old]", "--output", tmp_path) == 0
    report = json.loads((tmp_path / "audit.json").read_text(encoding="utf-8"))
    assert report["label_review"] == {
        "similar": {"Neurolgy": "Neurology", "Neurology.": "Neurology"},
        "combined": {"Cardiology; Neurology": ["Neurology", "Cardiology"]},
        "placeholders": ["None", "nan"],
    }
    assert report["classes"]["P\u00e9diatrie - Nuit"] == 2
    out = capsys.readouterr().out
    assert "'Neurolgy' = 'Neurology'; 'Neurology.' = 'Neurology'" in out
    assert "'Cardiology; Neurology' = 'Neurology' + 'Cardiology'" in out, "the more frequent one first"
    block = out.partition("they are merged and left out:\n")[2].partition("\n\n")[0]
    assert yaml.safe_load(block)["data"]["labels"]["drop"] == ["Old", "None", "nan"]

    (tmp_path / "own.yaml").write_text(block, encoding="utf-8")
    assert verb("--config", tmp_path / "own.yaml", *_flags(source), "--output", tmp_path) == 0
    report = json.loads((tmp_path / "audit.json").read_text(encoding="utf-8"))
    assert report["label_review"] == {"similar": {}, "combined": {}, "placeholders": []}
    assert report["classes"] == {"Neurology": 7, "Cardiology": 1, "P\u00e9diatrie - Nuit": 2, "yes": 1}
    assert "Check these labels" not in capsys.readouterr().out


def test_a_column_gives_a_label_away_whatever_its_spelling(tmp_path: Path) -> None:
    labels = ["Pe\u0301diatrie", "P\u00e9diatrie", "ENT - Nose", "ENT \u2013 Nose"] * 3
    notes = [
        {"id": str(n), "transcription": f"note {n}", "medical_specialty": label, "code": f"c{n % 4 // 2}"}
        for n, label in enumerate(labels)
    ]
    assert report_of(write(tmp_path / "notes", {"train": notes}) / "train.csv").label_leaks == {"code": 1.0}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--data.sorce", "notes.csv"], "sorce"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--data.source", "nowhere.csv"], "medlit: data.source: there is no file or folder nowhere.csv"),
        (["--data.split.near_threshold", "2"], "medlit: data.split.near_threshold"),
        (["--max_cut", "some"], "--max_cut"),
    ],
)
def test_a_mistake_exits_with_2(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert verb(*arguments) == 2
    err = capsys.readouterr().err
    assert expected in err
    assert "Traceback" not in err


def test_a_broken_table_exits_with_2_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.csv").write_text("id,transcription,medical_specialty\n1,not, quoted,a\n", encoding="utf-8")
    assert verb("--data.source", tmp_path / "notes.csv", "--output", tmp_path / "out") == 2
    assert f"{tmp_path / 'notes.csv'}, line 2: 4 fields where the header has 3" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", [["--data.columns.text", "remarks"], ["--data.columns.label", "ward"]])
def test_a_wrong_column_is_reported_before_the_tokenizer_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str]
) -> None:
    monkeypatch.setattr("medlit.data.datamodule.load_tokenizer", lambda *_: pytest.fail("the tokenizer was loaded"))
    (tmp_path / "notes.csv").write_text("transcription,medical_specialty\nA cough.,a\nA rash.,b\n", encoding="utf-8")
    with pytest.raises(UserError, match=rf"{flags[0].removeprefix('--')}: .* has no column"):
        run(["--data.source", str(tmp_path / "notes.csv"), *flags])


def test_help_is_quick_and_names_settings_limits_and_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert verb("--help") == 0
    out = capsys.readouterr().out
    for part in ("--config FILE", "--data.source", "--output DIR", "--strict", "--max_leakage", "exit code: 0; 3 when"):
        assert part in out


def test_a_table_too_large_for_near_duplicates_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("medlit.data.audit.NEAR_ROWS", 50)
    source = write(tmp_path / "notes", planted())
    assert verb(*_flags(source)) == 0
    assert "set --data.split.near_threshold" in capsys.readouterr().out
    assert report_of(source, split=Split(near_threshold=0.8)).near_duplicates is not None


def test_picture_of_a_table_with_one_very_long_note(tmp_path: Path) -> None:
    notes = [
        {"id": str(n), "transcription": "x " * n, "medical_specialty": "ab"[n % 2]} for n in [*range(1, 300), 100_000]
    ]
    found = audit(TranscriptionDataModule(str(write(tmp_path / "n", {"train": notes}) / "train.csv")))
    lengths = audit_figure(found).axes[1]

    assert lengths.get_xlim()[1] < 1000
    assert sum(bar.get_height() for bar in lengths.patches) == 300


@pytest.mark.parametrize("size", [6, 10, 24])
def test_a_picture_of_few_notes_counts_whole_ones(tmp_path: Path, size: int) -> None:
    notes = [{"id": str(n), "transcription": "x " * (n + 1), "medical_specialty": "ab"[n % 2]} for n in range(size)]
    found = audit(TranscriptionDataModule(str(write(tmp_path / "n", {"train": notes}) / "train.csv")))
    balance, lengths = audit_figure(found).axes
    for axis in (balance.xaxis, lengths.xaxis, lengths.yaxis):
        assert all(tick == round(tick) for tick in axis.get_ticklocs())


# --- several labels a text --------------------------------------------------------------------------------------------

LONG = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"


def overlapping(folder: Path) -> Path:
    """Three texts under two or three labels, one of them in a near copy too, and two under one."""
    rows = [
        ("p", "A"),
        ("p", "B"),
        ("q", "A"),
        ("q", "B"),
        ("q", "C"),
        (LONG, "A"),
        (LONG, "C"),
        ("r", "A"),
        ("s", "B"),
    ]
    rows.append((f"{LONG} more", "B"))
    notes = [{"transcription": text, "medical_specialty": label} for text, label in rows]
    return write(folder, {"all": notes}) / "all.csv"


def test_pairs_of_labels_that_share_texts_and_both_ceilings(tmp_path: Path) -> None:
    report = report_of(overlapping(tmp_path))
    assert report.label_pairs == [
        {"labels": ["A", "B"], "texts": 2, "share": 0.5},
        {"labels": ["A", "C"], "texts": 2, "share": 1.0},
        {"labels": ["B", "C"], "texts": 1, "share": 0.5},
    ]
    assert report.accuracy_ceiling == pytest.approx(6 / 10)
    assert report.near_accuracy_ceiling == pytest.approx(5 / 10)
    assert report.conflicts["groups"] == 3


def test_a_merged_text_is_one_note_with_all_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = overlapping(tmp_path)
    merged = report_of(source, label_conflicts="merge")
    assert (merged.rows, merged.splits) == (6, {"all": 6})
    assert merged.classes == {"A": 4, "B": 4, "C": 2}
    assert merged.conflicts["rows"] == merged.duplicates["rows"] == 0
    assert merged.accuracy_ceiling == 1
    assert merged.label_pairs == report_of(source).label_pairs

    assert run([*_flags(source), "--strict"]) == EXIT_OVER_LIMIT
    out = capsys.readouterr().out
    assert "'A' + 'B': 2; 'A' + 'C': 2; 'B' + 'C': 1" in out
    assert "`data.label_conflicts: merge` makes a text" in out
    assert run([*_flags(source), "--strict", "--data.label_conflicts=merge"]) == 0
    assert "`data.label_conflicts: merge` makes a text" not in capsys.readouterr().out


def test_probable_label_errors_are_ids_in_the_table_and_in_audit_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    notes = builtin_notes(train=650)["train"]
    right, notes[0]["medical_specialty"] = notes[0]["medical_specialty"], notes[1]["medical_specialty"]
    assert run([*_flags(write(tmp_path / "n", {"train": notes}) / "train.csv"), "--output", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "audit.json").read_text(encoding="utf-8"))["label_errors"]
    assert found["mislabelled"][0]["id"] == notes[0]["id"]
    assert found["mislabelled"][0]["suggested"] == right
    printed = capsys.readouterr().out
    assert f"{notes[0]['id']}: {notes[1]['medical_specialty']} " in printed
    assert "probably mislabelled (TF-IDF agrees with 9" in printed
    assert notes[0]["transcription"][:25] not in printed


def test_many_specialties_with_few_notes_are_named_and_their_labels_not_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    notes = builtin_notes(train=50)["train"]
    for row, note in enumerate(notes):
        note["medical_specialty"] = f"Specialty {row % 40}"
    assert run(_flags(write(tmp_path / "n", {"train": notes}) / "train.csv")) == 0
    printed = capsys.readouterr().out
    assert "specialties with fewer than 10 notes, too few to test" in printed
    assert "'Specialty 0' (2)" in printed
    assert f"not searched for: under 3 texts per label, or over {LABELS_CHECKED} labels" in printed


@pytest.mark.parametrize("cells", [("A;B", "B;C"), ("B;A", "C;B"), ("A;B", "C;B"), ("B;A", "B;C")])
def test_a_column_gives_away_any_of_several_labels(tmp_path: Path, cells: tuple[str, str]) -> None:
    code = {"A;B": "x", "B;A": "x", "B;C": "x", "C;B": "x", "D": "y"}  # x: always B among others; y: always D
    notes = [
        {"transcription": f"note {n}", "medical_specialty": cell, "code": code[cell], "names_it": f"ward {'BD'[n % 2]}"}
        for n, cell in enumerate([cells[0], "D", cells[1], "D"] * 3)
    ]
    for n, note in enumerate(notes):
        note["any"] = f"v{n % 3}"  # recurs with B and with D
    source = write(tmp_path / "notes", {"train": notes}) / "train.csv"
    leaks = audit(TranscriptionDataModule(str(source), labels=Labels(separator=";"))).report.label_leaks
    assert leaks == {"code": 1.0, "names_it": 1.0}


def test_a_column_of_lists_of_classes_gives_the_label_away(tmp_path: Path) -> None:
    wards = datasets.List(datasets.ClassLabel(names=["ward a", "ward b"]))
    text = datasets.Value("string")
    features = datasets.Features({"transcription": text, "medical_specialty": text, "wards": wards})
    rows = {
        "transcription": [f"note {n}" for n in range(6)],
        "medical_specialty": ["A", "B"] * 3,
        "wards": [[0], [1], [0], [1], [], None],
    }
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "notes.parquet"))
    assert audit(TranscriptionDataModule(str(tmp_path / "notes.parquet"))).report.label_leaks == {"wards": 1.0}


def test_cells_of_several_labels_are_no_conflict(tmp_path: Path) -> None:
    notes = [{"transcription": "p", "medical_specialty": cell} for cell in ("A;B", "B; A")]
    notes.append({"transcription": "q", "medical_specialty": "B"})
    source = write(tmp_path, {"all": notes}) / "all.csv"
    report = audit(TranscriptionDataModule(str(source), labels=Labels(separator=";"))).report
    assert report.conflicts["groups"] == 0
    assert report.classes == {"B": 3, "A": 2}
    assert report.label_pairs == [{"labels": ["A", "B"], "texts": 1, "share": 1.0}]
