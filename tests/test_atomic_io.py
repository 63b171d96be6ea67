"""Files and folders appear whole, even if the disk is full, the folder read-only or the process killed."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from medlit import atomic_io
from medlit.atomic_io import atomic_dir, atomic_write, remove_partial, remove_unfinished
from medlit.errors import UserError

if TYPE_CHECKING:
    from conftest import Medlit


def write(path: Path, size: int) -> None:
    with atomic_write(path) as beside:
        beside.write_bytes(b"x" * size)


def fill(folder: Path, *names: str, text: str) -> None:
    with atomic_dir(folder) as beside:
        for name in names:
            (beside / name).parent.mkdir(exist_ok=True)
            (beside / name).write_text(text)


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def killed(work: Callable[[], object]) -> None:
    """Do something in a process that kills itself."""
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def kill(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# --- whole or not at all ----------------------------------------------------------------------------------------------


def test_a_file_is_replaced_whole_or_left_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.json"
    with atomic_write(path) as beside:
        beside.write_text("first")
        assert not path.exists()
        assert beside.suffix == ".json"
    writing = atomic_write(path)
    writing.__enter__().write_text("half of the sec")
    assert not writing.__exit__(KeyError, KeyError(), None)
    assert path.read_text() == "first"
    assert list(path.parent.iterdir()) == [path], "nothing is left beside it"


def test_a_process_killed_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    write(path, 10)

    def half() -> None:
        with atomic_write(path) as beside:
            beside.write_bytes(b"y" * 5)
            kill()

    killed(half)
    assert path.read_bytes() == b"x" * 10
    assert len(list(tmp_path.iterdir())) == 2
    remove_partial(path)
    assert list(tmp_path.iterdir()) == [path]


def test_partial_files_of_a_similar_name_stay(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "answers-2.csv") as beside:
        beside.write_text("id\n")
        remove_partial(tmp_path / "answers.csv")
    assert (tmp_path / "answers-2.csv").read_text() == "id\n"


def test_a_folder_is_replaced_file_by_file_and_none_is_ever_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, names = tmp_path / "adapter", ("a.json", "b.safetensors", "c/d.txt")
    fill(folder, *names, text="old")
    move, seen = os.replace, []
    monkeypatch.setattr(os, "replace", lambda *pair: (move(*pair), seen.append(content(folder)))[0])
    fill(folder, *names, "e", text="new")
    assert all(set(names) <= set(now) for now in seen)
    assert content(folder) == dict.fromkeys((*names, "e"), "new")
    fill(folder, *names, text="newer")
    assert content(folder) == dict.fromkeys(names, "newer")
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_killed_between_two_files_has_every_file_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "adapter"
    fill(folder, "a", "b", text="old")
    move = atomic_io.replace

    def killing(new: Path, old: Path) -> None:
        move(new, old)
        kill()

    with monkeypatch.context() as patch:
        patch.setattr(atomic_io, "replace", killing)
        killed(lambda: fill(folder, "a", "b", text="new"))
    assert content(folder) == {"a": "new", "b": "old"}
    remove_partial(folder)
    assert list(tmp_path.iterdir()) == [folder]
    fill(folder, "a", "b", text="new")
    assert content(folder) == {"a": "new", "b": "new"}


def test_bytes_reach_the_disk_before_the_name_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    flush, move = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (done.append("flush"), flush(handle))[1])
    monkeypatch.setattr(os, "replace", lambda *pair: (done.append("move"), move(*pair))[1])
    write(tmp_path / "last.ckpt", 10)
    assert done == ["flush", "move", "flush"]


def test_files_and_folders_are_readable_by_their_owner_alone(tmp_path: Path) -> None:
    write(tmp_path / "last.ckpt", 1)
    fill(tmp_path / "adapter", "a", text="new")
    assert (tmp_path / "last.ckpt").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "adapter").stat().st_mode & 0o777 == 0o700


def test_a_link_stays_and_what_it_names_is_written(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    file, new, folder = (tmp_path / name for name in ("last.ckpt", "new.ckpt", "adapter"))
    (tmp_path / "disk" / "last.ckpt").write_text("old")
    fill(tmp_path / "disk" / "adapter", "a", text="old")
    for link in (file, new, folder):
        link.symlink_to(Path("disk") / link.name)
    write(file, 10)
    write(new, 5)
    fill(folder, "a", "b", text="new")
    assert all(link.is_symlink() for link in (file, new, folder))
    assert (tmp_path / "disk" / "last.ckpt").read_bytes() == b"x" * 10
    assert (tmp_path / "disk" / "new.ckpt").read_bytes() == b"x" * 5
    assert content(tmp_path / "disk" / "adapter") == {"a": "new", "b": "new"}
    assert not list(tmp_path.rglob(".*")), "nothing is left beside them"


def test_a_file_that_revisions_share_in_the_hub_s_cache_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "blob").write_text("shared")
    (tmp_path / "medlit.json").symlink_to("blob")
    write(tmp_path / "medlit.json", 3)
    assert (tmp_path / "blob").read_text() == "shared"
    assert (tmp_path / "medlit.json").read_text() == "xxx"


def test_a_process_that_ends_at_a_signal_removes_what_it_is_writing(tmp_path: Path) -> None:
    with contextlib.suppress(FileNotFoundError), atomic_write(tmp_path / "a.json"), atomic_dir(tmp_path / "b"):
        assert len(list(tmp_path.iterdir())) == 2
        remove_unfinished()
        assert list(tmp_path.iterdir()) == []
    write(tmp_path / "c", 1)
    remove_unfinished()
    assert list(tmp_path.iterdir()) == [tmp_path / "c"]


# --- a full disk, a read-only folder ----------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB, where this user may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "medlit-tests", str(place)]
    if os.name != "posix" or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_gives_a_message_and_keeps_the_old_file(small_disk: Path) -> None:
    path, folder = small_disk / "last.ckpt", small_disk / "adapter"
    write(path, 1_000_000)
    fill(folder, "a", text="old")
    with pytest.raises(UserError, match=r"last\.ckpt cannot be written \(No space left on device\); free some space"):
        write(path, 4_300_000)
    with pytest.raises(UserError, match=r"adapter cannot be written \(No space left on device\)"):
        fill(folder, "a", text="x" * 4_300_000)
    assert path.read_bytes() == b"x" * 1_000_000
    assert content(folder) == {"a": "old"}
    assert {file.name for file in small_disk.iterdir()} == {"last.ckpt", "adapter"}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG])
def test_every_refused_write_gives_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    path = tmp_path / "last.ckpt"
    write(path, 10)

    def refuse(*_: Any, **__: Any) -> None:  # noqa: ANN401
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    with pytest.raises(UserError, match=r"last\.ckpt cannot be written"):
        write(path, 20)
    assert path.read_bytes() == b"x" * 10


def test_another_error_is_no_user_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "a"):
        (tmp_path / "nowhere").read_text()


def test_a_fit_on_a_disk_that_fills_up_keeps_its_checkpoint(
    run_medlit: Medlit, tiny_config: Path, small_disk: Path
) -> None:
    """The disk holds the fit's first checkpoint and not its second."""
    import torch

    run = small_disk / "version_0"
    short = ["fit", "--config", tiny_config, "--run_dir", run, "--trainer.max_steps"]
    assert run_medlit(*short, 2).code == 0
    free = os.statvfs(small_disk)
    (small_disk / "filler").write_bytes(b"x" * (free.f_bavail * free.f_frsize - 8192))
    outcome = run_medlit(*short, 4, "--ckpt_path", "last")
    assert outcome.code == 2
    assert "Traceback" not in outcome.err
    messages = [line for line in outcome.err.splitlines() if line.startswith("medlit: ")]
    assert len(messages) == 3, outcome.err
    assert messages[0] == f"medlit: weights: {run / 'checkpoints' / 'last.ckpt'}"
    assert messages[1].startswith("medlit: training on ")
    assert "last.ckpt cannot be written (No space left on device)" in messages[2]
    for name in ("last", "best"):
        assert torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True)["global_step"] == 2
    (small_disk / "filler").unlink()
    assert run_medlit(*short, 4, "--ckpt_path", "last").code == 0
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 4


def test_a_fit_in_a_read_only_folder_keeps_its_checkpoint(
    run_medlit: Medlit, tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    run = tmp_path / "version_0"
    short = ["fit", "--config", tiny_config, "--run_dir", run, "--trainer.max_steps"]
    assert run_medlit(*short, 2).code == 0
    make = atomic_io.tempfile.mkstemp

    def closed(**where: Any) -> object:  # noqa: ANN401 - root may write anywhere, so the system's answer is faked
        if "checkpoints" in str(where["dir"]):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return make(**where)

    monkeypatch.setattr(atomic_io.tempfile, "mkstemp", closed)
    outcome = run_medlit(*short, 4, "--ckpt_path", "last")
    assert outcome.code == 2
    assert "last.ckpt cannot be written (Read-only file system)" in outcome.err
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2


def test_a_folder_that_was_moved_stays_when_the_disk_then_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flush = os.fsync

    def fail_after(handle: int) -> None:
        if Path(f"/proc/self/fd/{handle}").resolve() == tmp_path.resolve():  # whose entry has changed
            raise OSError(errno.EIO, "Input/output error")
        flush(handle)

    monkeypatch.setattr(os, "fsync", fail_after)
    with pytest.raises(OSError, match="Input/output"):
        fill(tmp_path / "adapter", "weights", text="new")
    assert content(tmp_path / "adapter") == {"weights": "new"}


@pytest.mark.parametrize("text", ["[]", '""', '[["a", "b"]]', "7", "null"])
def test_json_that_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(TypeError):
        atomic_io.read_json(tmp_path / "a.json")
