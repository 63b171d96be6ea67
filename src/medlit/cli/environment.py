"""What can be known to fail before notes are read or weights are loaded: in the machine, its environment, its files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from medlit.cli.commands import MODEL_VERBS, TOOLS
from medlit.errors import UserError
from medlit.model.adapter_metadata import AdapterMetadata, check_metadata
from medlit.model.checkpoints import read_checkpoint
from medlit.model.resume import check_progress

ENV_PREFIX = "MEDLIT"
# Names with the prefix that are no settings of a verb.
ENV_OTHERS = ("MEDLIT_CACHE",)
# What tells a process of srun its place.
_SLURM = ("SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID")


def check_environment(parsers: Mapping[str, LightningArgumentParser]) -> None:
    """Check that every variable with medlit's prefix is read by somebody; jsonargparse passes over a misspelt one.

    Args:
        parsers: verb -> its parser; what belongs to a verb that is not among them is passed over.

    Raises:
        UserError: naming the variable.
    """
    for name in sorted(os.environ):
        if not name.startswith(f"{ENV_PREFIX}_") or name in ENV_OTHERS:
            continue
        verb, _, key = name.removeprefix(f"{ENV_PREFIX}_").lower().partition("__")
        if verb not in parsers and verb in {*MODEL_VERBS, *TOOLS}:
            continue
        if verb not in parsers or not any(
            key == action.dest.replace(".", "__").lower() for action in parsers[verb]._actions
        ):
            raise UserError(
                f"{name}: there is no such setting; names are {ENV_PREFIX}_<VERB>__<GROUP>__<KEY>, such as"
                f" {ENV_PREFIX}_FIT__MODEL__LORA__R."
            )


def check_slurm(plugins: Any) -> None:  # noqa: ANN401 - one plugin, several or none, as jsonargparse parsed them
    """Check that `srun` started this process, where a config counts on it, and said how many there are on each machine.

    Raises:
        UserError: it did not.
    """
    wanted = plugins if isinstance(plugins, list) else [plugins]
    if not any(isinstance(each, Namespace) and str(each.class_path).endswith(".SLURMEnvironment") for each in wanted):
        return
    if missing := [name for name in _SLURM if name not in os.environ]:
        raise UserError(
            f"trainer.plugins: SLURMEnvironment wants processes that srun starts, and ${missing[0]} is not set; put"
            " srun before the command, in a job of sbatch, or leave configs/hardware/slurm.yaml out."
        )
    if int(os.environ["SLURM_NTASKS"]) > 1 and "SLURM_NTASKS_PER_NODE" not in os.environ:
        raise UserError(
            "trainer.plugins: SLURMEnvironment must know how many processes a machine has; give sbatch"
            " --ntasks-per-node instead of --ntasks."
        )


def check_writable(key: str, path: Path) -> None:
    """Check that a file or folder can be made.

    Args:
        key: the setting that names it.
        path: where it is to be.

    Raises:
        UserError: its nearest folder is none, or is not open to this user.
    """
    place = next(parent for parent in path.absolute().parents if parent.exists())
    if not place.is_dir():
        raise UserError(f"{key}: {path} cannot be written, since {place} is a file; name another place.")
    if not os.access(place, os.W_OK):
        raise UserError(f"{key}: {path} cannot be written, since you may not write to {place}; name another place.")


def check_device(accelerator: Any, devices: Any) -> None:  # noqa: ANN401 - as free as Lightning's Trainer
    """Check that the GPUs that a config asks for are there.

    Raises:
        UserError: there are none, or fewer.
    """
    if accelerator not in ("gpu", "cuda"):
        return
    if not torch.cuda.is_available():
        raise UserError(
            "trainer.accelerator: the config asks for a GPU and PyTorch sees none; run 'medlit doctor' to see why, or"
            " add --trainer.accelerator auto."
        )
    wanted = int(devices) if str(devices).isdigit() else len(devices) if isinstance(devices, list) else 0
    if wanted > torch.cuda.device_count():
        raise UserError(
            f"trainer.devices: {wanted} GPUs are asked for and PyTorch sees {torch.cuda.device_count()}; set"
            " trainer.devices to that or less."
        )


def check_checkpoint(path: Path, ours: AdapterMetadata, fit_loop: dict[str, Any] | None) -> None:
    """Compare a checkpoint with the config.

    Args:
        path: of the checkpoint.
        ours: the model that the config describes.
        fit_loop: where a fit is to go on: the loop's state as it is; else None.

    Raises:
        UserError: the file is broken, unsafe, not medlit's, or of another model.
    """
    checkpoint = read_checkpoint(path)
    check_metadata(ours, AdapterMetadata.from_dict(checkpoint.get("medlit")), source=f"the checkpoint {path}")
    if fit_loop is not None:
        check_progress(checkpoint, fit_loop, path)


def check_weights_named(run: Path, adapter: str | None) -> None:
    """Check that a verb which answers, with no checkpoint, is not meant to answer with the run that it names.

    Args:
        run: the run folder that the verb's files go to.
        adapter: the setting `model.adapter`.

    Raises:
        UserError: the run holds trained weights, and none are named.
    """
    if adapter is None and (run / "checkpoints" / "best.ckpt").is_file():
        raise UserError(
            f"run: {run} holds a trained model, and no weights are named; add --ckpt_path best to answer with it, or"
            " --model.lora null to use the bare base model."
        )
