"""A run's machine, files and processes: checks before notes are read, warnings to silence, clean-up after a failure."""

import atexit
import logging
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import datasets
import lightning as L
import torch
import transformers
import yaml
from jsonargparse import Namespace
from lightning.fabric.utilities.distributed import _destroy_dist_connection

from medlit.errors import UserError, tell
from medlit.paths import local_path
from medlit.predictions.shards import find_shards
from medlit.predictions.table import PREDICTIONS
from medlit.run_folder import ALIASES, check_run


def check_device(accelerator: Any, devices: Any) -> None:  # noqa: ANN401 - whatever Lightning's Trainer accepts
    """Raise a UserError if PyTorch does not see the GPUs that a config needs."""
    if accelerator not in ("gpu", "cuda"):
        return
    if not torch.cuda.is_available():
        raise UserError(
            "trainer.accelerator: the config needs a GPU and PyTorch sees none; run 'medlit doctor' to see why, or"
            " choose a small model, as --config configs/quickstart.yaml does."
        )
    wanted = int(devices) if str(devices).isdigit() else len(devices) if isinstance(devices, list) else 0
    if wanted > (seen := torch.cuda.device_count()):
        raise UserError(f"trainer.devices: the config needs {wanted} GPUs and PyTorch sees {seen}; set at most {seen}.")


def check_slurm(plugins: Any) -> None:  # noqa: ANN401 - one plugin, a list or None, as jsonargparse parsed them
    """Check that `srun` started this process if the config has Lightning's SLURMEnvironment."""
    given = plugins if isinstance(plugins, list) else [plugins]
    if not any(str(each.class_path).endswith(".SLURMEnvironment") for each in given if isinstance(each, Namespace)):
        return
    of_srun = ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID")  # for each of its processes
    if missing := [name for name in of_srun if name not in os.environ]:
        raise UserError(
            f"trainer.plugins: SLURMEnvironment needs processes that srun starts, and ${missing[0]} is not set; put"
            " srun before the command, in a job of sbatch, or leave configs/hardware/slurm.yaml out."
        )
    if int(os.environ["SLURM_NTASKS"]) > 1 and "SLURM_NTASKS_PER_NODE" not in os.environ:
        raise UserError("trainer.plugins: for SLURMEnvironment give sbatch --ntasks-per-node instead of --ntasks.")


def check_processes(trainer: Any) -> None:  # noqa: ANN401 - as in the other checks; Lightning's strategies differ
    """Check that `srun` or `torchrun` started as many processes as the config has."""
    cluster = getattr(trainer.strategy, "cluster_environment", None)
    try:
        if cluster is not None:
            cluster.validate_settings(num_devices=trainer.num_devices, num_nodes=trainer.num_nodes)
    except ValueError as error:
        raise UserError(f"trainer.devices, trainer.num_nodes: {error}") from error


def check_writable(key: str, path: Path) -> None:
    """Raise a UserError if a file or folder, which the setting `key` names, is a URL or cannot be created."""
    path = local_path(key, path)
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        reason = f"you may not write to {parent}" if parent.is_dir() else f"{parent} is a file"
        raise UserError(f"{key}: {path} cannot be written, since {reason}; name another place.")


def check_weights_named(run_dir: Path | None, model: Namespace) -> None:
    """Check that a command without --ckpt_path does not evaluate a new adapter instead of a run's; report a new one."""
    if model.adapter is not None or model.lora is None:
        return
    if run_dir is not None:
        check_run(run_dir, "a fit, or --model.adapter")
        if named := [name for name in ALIASES if (run_dir / "checkpoints" / f"{name}.ckpt").is_file()]:
            remedy = f"add --ckpt_path {named[0]}, or --model.lora null for the base model"
            raise UserError(f"run_dir: no weights are named; {remedy}.")
    tell("weights: none are named, so the base model answers; --ckpt_path best takes those of a fit")


def silence_warnings() -> None:
    """Filter the known useless messages of Lightning and its dependencies, and their progress bars in a log."""
    if not sys.stderr.isatty():  # in a log, bars are lines without end
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
    # Unsloth gives the root logger a handler, which would print each line of Lightning's a second time.
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).propagate = False
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: not any(advertised in record.getMessage() for advertised in ("litlogger", "TPU available"))
    )
    for message in yaml.safe_load(Path(__file__).with_name("silenced_warnings.yaml").read_text(encoding="utf-8")):
        warnings.filterwarnings("ignore", message=message)


@contextmanager
def clean_up_on_failure(trainer: L.Trainer, folder: Path, existed: bool = True) -> Iterator[None]:
    """Run a verb; a failure ends its other processes, and a user's mistake leaves the run folder as it was."""
    events = set(folder.glob("events.out.tfevents.*"))
    try:
        yield
    except BaseException as error:
        # Lightning (2.6.6) kills all processes when one that it has started fails, but not when the first one does, for
        # which they would wait. `srun` and `torchrun` do so themselves, once this process has ended; with NCCL,
        # Lightning's destruction of the process group at exit waits for all processes, so this one would hang.
        atexit.unregister(_destroy_dist_connection)
        if trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(signal.SIGKILL)
        if trainer.is_global_zero and isinstance(error, UserError):
            # Another verb may be writing to a folder that existed: remove only what this process's logger made.
            for path in set(folder.glob(f"events.out.tfevents.*.{os.getpid()}.*")) - events if existed else ():
                path.unlink()
            if not (existed or (folder / "checkpoints").exists() or find_shards(folder / PREDICTIONS)):
                shutil.rmtree(folder, ignore_errors=True)  # there is nothing to resume from
        raise
    finally:
        for path in () if existed else (folder, folder.parent, folder.parent.parent):
            with suppress(OSError):  # it is not empty
                path.rmdir()
