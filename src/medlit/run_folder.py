"""Run folders: how they are named, and which files `best` and `last` are.

logs/<config>/version_N/
    config_<verb>.yaml   <verb>_metrics.json   confusion_<verb>.png   events.out.tfevents.*
    <verb>_answers.parquet   checkpoints/best.ckpt   checkpoints/last.ckpt   adapter/   predictions.csv   sets_test.png
    report.html   report.md   test_facts.json   baseline_<name>_metrics.json   baseline_<name>_answers.parquet
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from medlit.atomic_io import lock
from medlit.errors import UserError, tell
from medlit.paths import local_path

ALIASES = ("best", "last")
_FILES = {  # verb -> files that it writes besides those with its name
    "fit": ("split.parquet", "adapter"),  # see `sole_fit` for its checkpoints
    "test": ("test_facts.json", "report.html", "report.md", "sets_test.png"),
    "baseline": ("report.html", "report.md"),
    "audit": ("audit.json", "audit.png"),
}
# Verb -> the file that shows that it has run in a folder, and a part of its text; else the config that Lightning saves.
_TRACES = {
    "baseline": ("baseline_majority_metrics.json", b'"f1_macro"'),
    "audit": ("audit.json", b'"accuracy_ceiling"'),
}
_VERSION = re.compile(r"version_(\d+)")


def run_name(configs: Sequence[str | Path]) -> str:
    """The name of a run: its configs' names joined, such as 'llama31_8b', without those of a `hardware` folder."""
    return "-".join(path.stem for path in map(Path, configs) if path.parent.name != "hardware") or "medlit"


def versions(root: Path, name: str) -> list[Path]:
    """Run folders of one name, newest first."""
    folder = local_path("trainer.default_root_dir", root) / name
    found = [(int(match[1]), path) for path in folder.glob("version_*") if (match := _VERSION.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def next_version(root: Path, name: str) -> Path:
    """The folder of the next run."""
    taken = [int(path.name.removeprefix("version_")) for path in versions(root, name)]
    return local_path("trainer.default_root_dir", root) / name / f"version_{max(taken, default=-1) + 1}"


def claim(folder: Path, numbered: bool) -> tuple[Path, bool]:
    """Make a private run folder, or the next one if a `numbered` one exists; returns it, and whether it is new."""
    while True:
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700, parents=True)
            return folder, True
        if not numbered:
            return folder, False
        folder = folder.with_name(f"version_{int(folder.name.removeprefix('version_')) + 1}")


@contextmanager
def sole_fit(folder: Path, checkpoint: str | None) -> Iterator[None]:
    """Lock a fit's folder; a UserError if another fit is writing to it, or has and is not the one that resumes."""
    weights = folder / "checkpoints"
    continues = checkpoint is not None and Path(checkpoint).parent.resolve() == weights.resolve()
    if not continues and any((weights / f"{name}.ckpt").exists() for name in ALIASES):
        raise UserError(
            f"run_dir: {folder} holds the checkpoints of another fit, which a new one would replace; add --ckpt_path"
            " last to continue that one, or name a new folder."
        )
    handle = os.open(folder, os.O_RDONLY)
    try:
        lock(handle, f"run_dir: another fit is writing to {folder}; wait for its end, or name another folder.")
        yield
    finally:
        os.close(handle)


def check_replaceable(folder: Path, verb: str) -> None:
    """Raise a UserError if a folder holds files with a verb's names and no trace that the verb has run there."""
    names = {f"config_{verb}.yaml", f"{verb}_*metrics.json", f"{verb}_*answers.parquet", f"confusion_{verb}.png"}
    names.update(_FILES.get(verb, ()))
    if _has_run(folder, "test") or _has_run(folder, "baseline"):
        names.difference_update(_FILES["baseline"])
    if any(_has_run(folder, other) for other in ("validate", "test", "predict")):
        names.discard("split.parquet")  # written by the first of them, and replaced by a fit
    found = next((path for name in sorted(names) for path in folder.glob(name)), None)
    if found is not None and not _has_run(folder, verb):
        raise UserError(
            f"{'output' if verb == 'audit' else 'run_dir'}: 'medlit {verb}' would replace {found}, which it did not"
            " write; name another folder, or add --overwrite."
        )


def _has_run(folder: Path, verb: str) -> bool:
    name, text = _TRACES.get(verb, (f"config_{verb}.yaml", b"# lightning.pytorch=="))
    return (folder / name).is_file() and text in (folder / name).read_bytes()


def check_run(run: Path | None, of: str = "a fit", name: str = "run_dir") -> None:
    """Raise a UserError if a run folder, if one is named, is not there or only holds runs."""
    if run is None:
        return
    if not (run := local_path(name, run)).is_dir():
        raise UserError(f"{name}: there is no folder {run}; give the run folder of {of}.")
    folders = [run, *sorted(run.glob("*/"), key=lambda folder: -folder.stat().st_mtime)]
    newest = [str(found[0]) for folder in folders if (found := versions(folder.parent, folder.name))]
    if newest and not any(run.glob("config_*.yaml")):
        raise UserError(f"{name}: {run} holds runs and is none itself; give one, such as {' or '.join(newest[:3])}.")


def resolve_checkpoint(wanted: str, root: Path, name: str, run: Path | None) -> Path:
    """Find the file that `--ckpt_path` means: 'best', 'last' or a path; a UserError if there is none.

    Only the folder `run` is searched, or, if it is None, the runs of this name in `root`, the newest first. A line says
    which file 'best' or 'last' is, and that the newest fit has none.
    """
    if wanted not in ALIASES:
        path = Path(wanted).expanduser()
        if not path.is_file():
            raise UserError(f"ckpt_path: there is no file {path}; give 'best', 'last' or the path of a checkpoint.")
        return path
    check_run(run)
    folders = [run] if run is not None else versions(root, name)
    for folder in folders:
        path = folder / "checkpoints" / f"{wanted}.ckpt"
        if path.is_file():
            newer = [other for other in folders[: folders.index(folder)] if _has_run(other, "fit")]
            tell(f"weights: {path}" + (f", since {newer[0]} has no {wanted} checkpoint" if newer else ""))
            return path
    searched = run or f"any run in {(root / name).absolute()}"
    raise UserError(
        f"ckpt_path: there is no {wanted} checkpoint in {searched}; run 'medlit fit', or give the --run_dir of a fit."
    )


def run_of(checkpoint: Path) -> Path | None:
    """The run folder that holds a checkpoint, or None when it lies elsewhere."""
    return checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else None
