"""The command: its flags and settings, all that can be wrong with them before anything is loaded, then the job."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path

import torch

from medlit.cli.arguments import make_datamodule, parse_settings
from medlit.cli.environment import check_device, check_writable
from medlit.cli.validation import check_settings
from medlit.cli.warnings import silence_warnings
from medlit.data.labels import LabelSet
from medlit.errors import UserError
from medlit.tools.export.exporter import Job, cleared_away, say
from medlit.tools.export.gguf import INSTALL, QUANTISATIONS, check_convertible, has_llama_cpp
from medlit.tools.export.hub import Repository
from medlit.tools.export.merged import model_folder
from medlit.tools.export.source import ask, find_weights, recorded


def export(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Export, compare, say what came out.

    Args:
        options: the verb's own flags.
        rest: settings as for `medlit fit`.

    Raises:
        UserError: something cannot be used, or the export does not answer alike; nothing is left.
    """
    silence_warnings()
    run = options.run
    if run is not None and not run.is_dir():
        raise UserError(f"run: there is no folder {run}; give the run folder of a fit.")
    has_config = any(argument.split("=")[0] == "--config" for argument in rest)
    beside = run or _run_beside(rest)
    config = parse_settings("export", [*(recorded(beside) if beside is not None and not has_config else []), *rest])
    check_settings(config)
    check_device(config.trainer.accelerator, 1)
    quantisations = _check(options)
    repository = Repository.of(options) if options.to == "hub" else None

    weights = find_weights(config, options.ckpt_path, run)
    if repository is not None:
        repository.check_base(weights.language_model.base_model)
    job = Job(options, weights, _device(config.trainer.accelerator))
    if options.to == "gguf":
        check_convertible(model_folder(job.onto, weights.language_model.revision), quantisations)
        if not has_llama_cpp():
            say(f"llama.cpp is not installed, so the files are read again with transformers; to have it, run {INSTALL}")
    say(f"loading {weights.language_model.base_model} and {weights.name}")
    job.model = weights.load(job.device)
    say("weighing the specialties with medlit's model")
    questions = ask(job.model, make_datamodule(config), LabelSet(tuple(weights.structure.labels)), options.notes)
    with cleared_away():
        job.write(questions, quantisations, repository)
    return 0


def _run_beside(rest: Sequence[str]) -> Path | None:
    """The run folder around an adapter that flags name."""
    for flag, value in itertools.zip_longest(rest, rest[1:], fillvalue=""):
        name, _, given = flag.partition("=")
        folder = Path(given or value)
        if name == "--model.adapter" and (folder.parent / "config_fit.yaml").is_file():
            return folder.parent
    return None


def _check(options: argparse.Namespace) -> list[str]:
    """The quantisations that are asked for; everything that a flag can get wrong by itself."""
    if options.output.is_file() or (options.output.is_dir() and any(options.output.iterdir())):
        raise UserError(f"output: {options.output} is there already and not empty; name a new folder.")
    check_writable("output", options.output)
    if options.notes < 1:
        raise UserError(f"notes: must be at least 1, not {options.notes}.")
    if not 0 <= options.max_changed <= 1:
        raise UserError(f"max_changed: must be a share from 0 to 1, not {options.max_changed:g}.")
    if options.max_drift is not None and not options.max_drift > 0:
        raise UserError(f"max_drift: must be over 0 nats, not {options.max_drift:g}.")
    if options.to != "hub" and (options.push or options.public or options.repo):
        raise UserError("to: --repo, --push and --public are for --to hub; set that, or leave them out.")
    if options.onto == "original" and options.to not in ("merged", "gguf"):
        raise UserError("onto: an adapter is added to nothing; set --to merged or gguf, or leave --onto out.")
    if options.base is not None and options.onto != "original":
        raise UserError("base: it is for --onto original; add that, or leave --base out.")
    wanted = list(dict.fromkeys(filter(None, options.gguf_types.lower().split(","))))
    if not wanted or not set(wanted) <= set(QUANTISATIONS):
        raise UserError(f"gguf_types: {options.gguf_types} is not a list of {', '.join(QUANTISATIONS)}.")
    return wanted


def _device(accelerator: str) -> torch.device:
    return torch.device("cuda", 0) if accelerator != "cpu" and torch.cuda.is_available() else torch.device("cpu")
