"""Checks of the machine, the environment and the files, made before notes are read or weights are loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace

from medlit.cli import MODEL_VERBS, TOOLS
from medlit.errors import UserError
from medlit.model.adapter_metadata import AdapterMetadata, check_metadata
from medlit.model.checkpoints import check_progress, read_checkpoint

ENV_PREFIX = "MEDLIT"
# Variables with the prefix that are not settings.
_NOT_SETTINGS = ("MEDLIT_CACHE",)
# What `srun` sets for each of its processes.
_SLURM = ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID")


def check_variables(parsers: Mapping[str, ArgumentParser]) -> None:
    """Check that every variable with medlit's prefix is a setting; jsonargparse ignores a misspelt one.

    Args:
        parsers: verb -> its parser. Variables of other verbs are ignored.

    Raises:
        UserError: naming the variable.
    """
    for name in sorted(os.environ):
        if not name.startswith(f"{ENV_PREFIX}_") or name in _NOT_SETTINGS:
            continue
        verb, _, key = name.removeprefix(f"{ENV_PREFIX}_").lower().partition("__")
        if verb not in parsers and verb in {*MODEL_VERBS, *TOOLS}:
            continue
        settings = parsers[verb]._actions if verb in parsers else []
        if key not in [action.dest.replace(".", "__").lower() for action in settings]:
            raise UserError(
                f"{name}: there is no such setting; names are {ENV_PREFIX}_<VERB>__<GROUP>__<KEY>, such as"
                f" {ENV_PREFIX}_FIT__MODEL__LORA__R."
            )


def check_device(accelerator: Any, devices: Any) -> None:  # noqa: ANN401 - whatever Lightning's Trainer accepts
    """Check that PyTorch sees the GPUs that a config needs.

    Raises:
        UserError: it sees none, or fewer.
    """
    if accelerator not in ("gpu", "cuda"):
        return
    if not torch.cuda.is_available():
        raise UserError(
            "trainer.accelerator: the config needs a GPU and PyTorch sees none; run 'medlit doctor' to see why, or"
            " add --trainer.accelerator auto."
        )
    wanted = int(devices) if str(devices).isdigit() else len(devices) if isinstance(devices, list) else 0
    if wanted > torch.cuda.device_count():
        raise UserError(
            f"trainer.devices: the config needs {wanted} GPUs and PyTorch sees {torch.cuda.device_count()}; set"
            " trainer.devices to that number or less."
        )


def check_slurm(plugins: Any) -> None:  # noqa: ANN401 - one plugin, a list or None, as jsonargparse parsed them
    """Check that `srun` started this process if the config has Lightning's SLURMEnvironment.

    Raises:
        UserError: it did not, or it did not set the number of processes of each machine.
    """
    names = [str(each.class_path) for each in (plugins if isinstance(plugins, list) else [plugins]) if each]
    if not any(name.endswith(".SLURMEnvironment") for name in names):
        return
    if missing := [name for name in _SLURM if name not in os.environ]:
        raise UserError(
            f"trainer.plugins: SLURMEnvironment needs processes that srun starts, and ${missing[0]} is not set; put"
            " srun before the command, in a job of sbatch, or leave configs/hardware/slurm.yaml out."
        )
    if int(os.environ["SLURM_NTASKS"]) > 1 and "SLURM_NTASKS_PER_NODE" not in os.environ:
        raise UserError(
            "trainer.plugins: SLURMEnvironment needs the number of processes of each machine; give sbatch"
            " --ntasks-per-node instead of --ntasks."
        )


def check_processes(trainer: Any) -> None:  # noqa: ANN401 - as in the other checks; Lightning's strategies differ
    """Check that `srun` or `torchrun` started as many processes as the config has.

    Raises:
        UserError: it started another number.
    """
    cluster = getattr(trainer.strategy, "cluster_environment", None)
    try:
        if cluster is not None:
            cluster.validate_settings(num_devices=trainer.num_devices, num_nodes=trainer.num_nodes)
    except ValueError as error:
        raise UserError(f"trainer.devices, trainer.num_nodes: {error}") from error


def check_writable(key: str, path: Path) -> None:
    """Check that a file or folder can be created.

    Args:
        key: the setting that names it.
        path: the file or folder.

    Raises:
        UserError: the nearest existing folder is a file, or closed to this user.
    """
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    if not parent.is_dir():
        raise UserError(f"{key}: {path} cannot be written, since {parent} is a file; name another place.")
    if not os.access(parent, os.W_OK):
        raise UserError(f"{key}: {path} cannot be written, since you may not write to {parent}; name another place.")


def check_checkpoint(path: Path, ours: AdapterMetadata, fit_loop: dict[str, Any] | None) -> None:
    """Compare a checkpoint with the config.

    Args:
        path: of the checkpoint.
        ours: the model that the config describes.
        fit_loop: for a fit that resumes: state of the new fit loop.

    Raises:
        UserError: the file is broken, unsafe, not medlit's, or of another model.
    """
    checkpoint = read_checkpoint(path)
    check_metadata(ours, AdapterMetadata.from_dict(checkpoint.get("medlit")), source=f"the checkpoint {path}")
    if fit_loop is not None:
        check_progress(checkpoint, fit_loop, path)


def check_weights_named(run_dir: Path, model: Namespace) -> None:
    """Check that a run folder with trained weights is not evaluated with untrained ones by mistake.

    Args:
        run_dir: the run folder that the verb writes to; the command names no checkpoint.
        model: the model's settings.

    Raises:
        UserError: the folder holds trained weights, and neither they nor the bare base model are named.
    """
    if model.adapter is None and model.lora is not None and (run_dir / "checkpoints" / "best.ckpt").is_file():
        raise UserError(
            f"run_dir: {run_dir} holds a trained model, and no weights are named; add --ckpt_path best to use it, or"
            " --model.lora null to use the bare base model."
        )
