"""Results are joined by row and read back as they were written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from made_results import make_results, random_results

from medlit.errors import UserError
from medlit.evaluation.results import Results


@pytest.mark.parametrize("with_probabilities", [True, False])
def test_results_are_read_back_as_written(tmp_path: Path, with_probabilities: bool) -> None:
    one = make_results(
        [0, 1, 2], [0, 3, 2], [[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0, 0, 1]] if with_probabilities else None
    )
    one.write(tmp_path / "test_answers.parquet")
    again = Results.read(tmp_path / "test_answers.parquet")
    for name, value in vars(one).items():
        assert np.array_equal(getattr(again, name), value), name
    assert [path.name for path in tmp_path.iterdir()] == ["test_answers.parquet"]


def test_parts_are_joined_by_row_and_repeats_count_once() -> None:
    one = random_results(n=7, k=3)
    picks = ([3, 0, 5], [1, 6, 3], [2, 4])
    parts = [one.select(np.array(rows)) for rows in picks]
    joined = Results.join(parts)
    assert joined.ids == one.ids
    assert joined.text_hashes == one.text_hashes
    assert np.array_equal(joined.probabilities, one.probabilities)  # type: ignore[arg-type]
    parts[1] = replace(parts[1], probabilities=None)
    assert Results.join(parts).probabilities is None


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "test_answers.parquet"
    with pytest.raises(UserError, match=r"test_answers\.parquet is missing or damaged"):
        Results.read(path)
    path.write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"test_answers\.parquet is missing or damaged"):
        Results.read(path)


def test_an_invalid_answer_has_no_confidence() -> None:
    one = make_results([0, 1], [0, 3], [[0.7, 0.2, 0.1], [0.1, 0.8, 0.1]])
    assert one.confidence == pytest.approx([0.7, 0])


def test_all_labels_of_a_note_survive_a_file(tmp_path: Path) -> None:
    several = replace(make_results([0, 1, 2], [1, 1, 3]), accepted=[[0, 1], [1], [2, 0]])
    several.write(tmp_path / "several.parquet")
    read = Results.read(tmp_path / "several.parquet")
    assert read.accepted == [[0, 1], [1], [2, 0]]
    assert read.any_of.tolist() == [True, True, False]
    assert read.correct.tolist() == [False, True, False]
    assert read.select(np.array([2, 0])).accepted == [[2, 0], [0, 1]]
    one = make_results([0, 1], [1, 1])
    one.write(tmp_path / "one.parquet")
    assert "labels" not in pq.read_schema(tmp_path / "one.parquet").names
    assert Results.read(tmp_path / "one.parquet").any_of.tolist() == one.correct.tolist()


def test_batches_with_and_without_several_labels_are_joined() -> None:
    first, second = make_results([0, 1], [1, 1]), make_results([2], [2])
    joined = Results.join([first, replace(second, rows=np.array([2]), accepted=[[2, 1]])])
    assert joined.accepted == [[0], [1], [2, 1]]
