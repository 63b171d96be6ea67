"""Broken tables, and files of arbitrary bytes, are refused in one sentence."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from corpus import tables
from hypothesis import HealthCheck, given
from hypothesis import settings as effort
from hypothesis import strategies as st

from medlit.data.notes import load_source
from medlit.data.settings import Columns, Labels, Split
from medlit.data.splits import split_notes
from medlit.errors import UserError

quick = effort(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize(("what", "suffix", "content"), tables(), ids=lambda value: value if type(value) is str else "")
def test_bad_tables_are_refused(tmp_path: Path, what: str, suffix: str, content: bytes) -> None:
    source = tmp_path / f"notes{suffix}"
    source.write_bytes(content)
    with pytest.raises(UserError) as error:
        # As a fit begins: read, split, and learn the labels.
        split_notes(load_source(str(source), columns=Columns(), labels=Labels()), Split()).label_set(str(source))
    assert len(str(error.value).splitlines()) == 1


@quick
@given(
    content=st.one_of(
        st.binary(max_size=200),
        st.text(max_size=200).map(lambda rest: b"id,transcription,medical_specialty\n" + rest.encode()),
    ),
    suffix=st.sampled_from([".csv", ".tsv", ".json", ".jsonl", ".parquet"]),
)
def test_any_bytes_are_notes_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes, suffix: str) -> None:
    source = tmp_path_factory.mktemp("any") / f"notes{suffix}"
    source.write_bytes(content)
    with contextlib.suppress(UserError):
        splits = load_source(str(source), columns=Columns(), labels=Labels())
        assert sum(map(len, splits.values())) > 0
