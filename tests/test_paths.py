"""Paths that settings name are local ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from medlit.errors import UserError
from medlit.paths import cache_dir, local_path


@pytest.mark.parametrize("url", ["s3://bucket/runs", "gs://bucket", "hdfs://host/runs", "file:///tmp/runs", "a+b://c"])
@pytest.mark.parametrize("kind", [str, Path])
def test_a_url_is_no_folder(url: str, kind: type[str] | type[Path]) -> None:
    with pytest.raises(UserError) as refused:
        local_path("run_dir", kind(url))
    shown = url if kind is str else url.replace(":///", "://")
    assert str(refused.value).startswith(f"run_dir: {shown} is a URL, and medlit writes to local folders only")


@pytest.mark.parametrize("path", ["logs", "/tmp/a:b/c", "runs/s3:/x", "12:30", "."])
def test_a_local_path_stays_as_it_is(path: str) -> None:
    assert local_path("run_dir", path) == Path(path)


def test_home_and_variables_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    assert local_path("run_dir", "~/logs") == Path("/home/me/logs")
    assert local_path("run_dir", "$SCRATCH/${SCRATCH}") == Path("/scratch/me//scratch/me")


def test_the_cache_is_no_url(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEDLIT_CACHE", "s3://bucket/cache")
    with pytest.raises(UserError, match="MEDLIT_CACHE: s3://bucket/cache is a URL"):
        cache_dir()
    assert not list(tmp_path.iterdir())
