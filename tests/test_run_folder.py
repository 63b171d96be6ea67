"""Properties of run folders: their names, and which one a command finds."""

from __future__ import annotations

import multiprocessing
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from medlit.errors import UserError
from medlit.run_folder import (
    check_replaceable,
    check_run,
    claim,
    next_version,
    resolve_checkpoint,
    run_name,
    run_of,
    sole_fit,
    versions,
)


def checkpoint(root: Path, run: str, name: str) -> Path:
    path = root / "small" / run / "checkpoints" / f"{name}.ckpt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


@pytest.mark.parametrize(
    ("configs", "name"),
    [
        ([], "medlit"),
        (["configs/llama31_8b.yaml"], "llama31_8b"),
        (["configs/llama31_8b.yaml", "configs/debug/fast.yaml"], "llama31_8b-fast"),
        (["configs/llama31_8b.yaml", "configs/hardware/ddp.yaml"], "llama31_8b"),
        (["configs/hardware/ddp.yaml"], "medlit"),
    ],
)
def test_a_run_is_named_by_its_configs_without_the_hardware(configs: list[str], name: str) -> None:
    assert run_name(configs) == name


def test_versions_count_up_as_numbers(tmp_path: Path) -> None:
    assert next_version(tmp_path, "small") == tmp_path / "small" / "version_0"
    for name in ("version_2", "version_10", "version_x", "notes"):
        (tmp_path / "small" / name).mkdir(parents=True)
    assert [path.name for path in versions(tmp_path, "small")] == ["version_10", "version_2"]
    assert next_version(tmp_path, "small").name == "version_11"


def test_the_words_mean_the_newest_run_that_has_such_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = checkpoint(tmp_path, "version_9", "best")
    older = checkpoint(tmp_path, "version_2", "best")
    last = checkpoint(tmp_path, "version_10", "last")
    found = [resolve_checkpoint(word, tmp_path, "small", None) for word in ("best", "last")]
    found += [resolve_checkpoint("best", tmp_path, "other", older.parent.parent)]
    assert found == [best, last, older]
    assert capsys.readouterr().err == "".join(f"medlit: weights: {path}\n" for path in found)


def test_a_line_says_that_the_newest_fit_has_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best, newest = checkpoint(tmp_path, "version_0", "best"), tmp_path / "small" / "version_2"
    for name in ("version_1", "version_2", "version_3"):
        (tmp_path / "small" / name).mkdir()
    assert resolve_checkpoint("best", tmp_path, "small", None) == best
    assert capsys.readouterr().err == f"medlit: weights: {best}\n"
    (newest / "config_fit.yaml").write_text("# lightning.pytorch==2.6.6\n")
    assert resolve_checkpoint("best", tmp_path, "small", None) == best
    assert capsys.readouterr().err == f"medlit: weights: {best}, since {newest} has no best checkpoint\n"


def test_a_named_run_is_the_only_place_that_is_searched(tmp_path: Path) -> None:
    old = checkpoint(tmp_path, "version_0", "best")
    checkpoint(tmp_path, "version_1", "best")
    assert resolve_checkpoint("best", tmp_path, "small", old.parent.parent) == old
    with pytest.raises(UserError, match=r"no last checkpoint in .*version_0"):
        resolve_checkpoint("last", tmp_path, "small", old.parent.parent)


@pytest.mark.parametrize("word", ["best", "last"])
def test_a_word_without_a_file_is_refused(tmp_path: Path, word: str) -> None:
    with pytest.raises(UserError, match=f"ckpt_path: there is no {word} checkpoint in any run in .*run 'medlit fit'"):
        resolve_checkpoint(word, tmp_path, "small", None)


def test_a_path_is_taken_as_it_is_if_there_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = checkpoint(tmp_path, "version_0", "step=3")
    assert resolve_checkpoint(str(path), tmp_path, "other", None) == path
    assert capsys.readouterr().err == "", "the command names it"
    with pytest.raises(UserError, match=r"ckpt_path: there is no file .*gone\.ckpt"):
        resolve_checkpoint(str(tmp_path / "gone.ckpt"), tmp_path, "small", None)
    with pytest.raises(UserError, match="there is no file"):
        resolve_checkpoint(str(tmp_path), tmp_path, "small", None)


def test_a_checkpoint_knows_its_run(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, "version_0", "best")
    assert run_of(path) == tmp_path / "small" / "version_0"
    assert run_of(tmp_path / "best.ckpt") is None


def claim_with_the_others(barrier: Any, root: Path) -> None:  # noqa: ANN401 - a barrier of processes has no public type
    barrier.wait()
    (claim(root / "small" / "version_3", numbered=True)[0] / "mine").mkdir()


def test_ten_starts_at_once_give_ten_folders(tmp_path: Path) -> None:
    (tmp_path / "small" / "version_3").mkdir(parents=True)
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(10)
    started = [context.Process(target=claim_with_the_others, args=(barrier, tmp_path)) for _ in range(10)]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
    assert [process.exitcode for process in started] == [0] * 10, "one found a folder that another one has"
    claimed = versions(tmp_path, "small")
    assert [path.name for path in claimed] == [f"version_{number}" for number in range(13, 2, -1)]
    assert {stat.S_IMODE(path.stat().st_mode) for path in claimed[:-1]} == {0o700}


def test_a_fit_that_died_before_its_first_file_hides_no_earlier_checkpoint(tmp_path: Path) -> None:
    best = checkpoint(tmp_path, "version_0", "best")
    assert claim(next_version(tmp_path, "small"), numbered=True) == (tmp_path / "small" / "version_1", True)
    assert resolve_checkpoint("best", tmp_path, "small", None) == best
    assert next_version(tmp_path, "small").name == "version_2"


def test_an_existing_folder_that_is_named_stays_as_it_is(tmp_path: Path) -> None:
    assert claim(tmp_path / "mine", numbered=False) == (tmp_path / "mine", True)
    (tmp_path / "mine").chmod(0o750)
    assert claim(tmp_path / "mine", numbered=False) == (tmp_path / "mine", False)
    assert stat.S_IMODE((tmp_path / "mine").stat().st_mode) == 0o750


def test_a_new_fit_does_not_write_over_the_weights_of_another(tmp_path: Path) -> None:
    run, other = tmp_path / "small" / "version_0", checkpoint(tmp_path, "version_1", "last")
    run.mkdir()
    with sole_fit(run, None):
        last = checkpoint(tmp_path, "version_0", "last")
    (tmp_path / "link").symlink_to(run)
    with sole_fit(run, str(last)), sole_fit(run.with_name("version_1"), str(other)):
        pass
    with sole_fit(tmp_path / "link", str(last)):
        pass
    for start in (None, str(other)):
        refused = pytest.raises(UserError, match=r"run_dir: .*version_0 holds .*add --ckpt_path last .* or name a new")
        with refused, sole_fit(run, start):
            pass


def test_two_fits_do_not_write_to_one_folder(tmp_path: Path) -> None:
    refused = pytest.raises(UserError, match="run_dir: another fit is writing to")
    with sole_fit(tmp_path, None), refused, sole_fit(tmp_path, None):
        pass
    with sole_fit(tmp_path, None):
        assert not list(tmp_path.iterdir())


# --- files that medlit did not write ----------------------------------------------------------------------------------

OWN = {
    "fit": [
        "config_fit.yaml",
        "fit_metrics.json",
        "fit_answers.parquet",
        "confusion_fit.png",
        "split.parquet",
        "adapter",
    ],
    "validate": ["config_validate.yaml", "validate_metrics.json", "validate_answers.parquet", "confusion_validate.png"],
    "test": [
        "config_test.yaml",
        "test_metrics.json",
        "test_answers.parquet",
        "confusion_test.png",
        "sets_test.png",
        "test_facts.json",
        "report.html",
        "report.md",
    ],
    "predict": ["config_predict.yaml"],
    "baseline": ["baseline_majority_metrics.json", "baseline_tfidf_answers.parquet", "report.html", "report.md"],
    "audit": ["audit.json", "audit.png"],
}
TRACES = {
    "audit": ("audit.json", '{"accuracy_ceiling": 1}'),
    "baseline": ("baseline_majority_metrics.json", '{"f1_macro": 1}'),
}


@pytest.mark.parametrize(("verb", "name"), [(verb, name) for verb, names in OWN.items() for name in names])
def test_a_verb_replaces_its_own_files_and_no_one_else_s(tmp_path: Path, verb: str, name: str) -> None:
    (tmp_path / "notes.csv").touch()
    check_replaceable(tmp_path, verb)
    check_replaceable(tmp_path / "new", verb)
    (tmp_path / name).write_text("trainer: {}\n")
    with pytest.raises(
        UserError, match=rf"'medlit {verb}' would replace .*{name}, which it did not write; .* --overwrite\."
    ):
        check_replaceable(tmp_path, verb)
    trace, text = TRACES.get(verb, (f"config_{verb}.yaml", "# lightning.pytorch==2.6.6\ntrainer: {}\n"))
    (tmp_path / trace).write_text(text)
    check_replaceable(tmp_path, verb)


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_a_fit_may_follow_an_evaluation_that_wrote_the_split(tmp_path: Path, verb: str) -> None:
    (tmp_path / "split.parquet").touch()
    (tmp_path / f"config_{verb}.yaml").write_text("# lightning.pytorch==2.6.6\n")
    check_replaceable(tmp_path, "fit")


def test_the_report_of_a_test_is_rewritten_by_a_baseline_and_the_other_way_round(tmp_path: Path) -> None:
    (tmp_path / "report.md").touch()
    for verb, other in (("test", "baseline"), ("baseline", "test")):
        trace, text = TRACES.get(verb, ("config_test.yaml", "# lightning.pytorch==2.6.6\n"))
        (tmp_path / trace).write_text(text)
        check_replaceable(tmp_path, other)
        (tmp_path / trace).unlink()


def test_a_folder_that_holds_runs_is_not_one(tmp_path: Path) -> None:
    for newest in ("version_0", "version_10"):
        (tmp_path / "mine" / newest).mkdir(parents=True)
        with pytest.raises(UserError, match=rf"^run_dir: .*mine holds runs and is none itself; .*/{newest}\."):
            check_run(tmp_path / "mine")
    with pytest.raises(UserError, match=r"^beside: there is no folder .*theirs; give the run folder of a test\."):
        check_run(tmp_path / "theirs", "a test", "beside")
    with pytest.raises(UserError, match=r"^run_dir: s3:/+bucket/x is a URL"):
        check_run(Path("s3://bucket/x"))
    check_run(tmp_path / "mine" / "version_0")
    (tmp_path / "other" / "version_2").mkdir(parents=True)
    (tmp_path / "notes" / "may").mkdir(parents=True)
    os.utime(tmp_path / "other", (0, 0))  # the newest first
    with pytest.raises(UserError, match=r"holds runs and is none itself; .*/mine/version_10 or .*/other/version_2\."):
        check_run(tmp_path)
    check_run(tmp_path / "notes")
    (tmp_path / "mine" / "config_fit.yaml").touch()
    check_run(tmp_path / "mine")
