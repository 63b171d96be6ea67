"""One export: check the settings, write the files, verify them in a fresh process, add the card; all or nothing."""

import argparse
import gc
import shutil
import sys
import time
from collections.abc import Sequence
from typing import Any

import psutil
import torch

from medlit.atomic_io import atomic_dir, temporary_dir, write_json
from medlit.base_model import load_tokenizer, resolve
from medlit.cli.arguments import make_datamodule, parse_settings
from medlit.cli.environment import check_device, check_writable
from medlit.cli.validation import adopt_adapter
from medlit.errors import UserError
from medlit.model.adapter import save_adapter
from medlit.model.adapter_metadata import METADATA_FILE
from medlit.model.prior import PRIOR_FILE
from medlit.paths import local_path
from medlit.run_folder import check_run
from medlit.tools import recorded_settings
from medlit.tools.export import formats
from medlit.tools.export.card import write_card
from medlit.tools.export.source import FIT_CONFIG, find_weights, reference_answers, reference_notes, run_of_adapter
from medlit.tools.export.verify import Verification


def export(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Export, verify and report, or leave nothing on disk; `rest` are settings as for `medlit fit`."""
    quantisations = _check_options(options)
    config = _read_settings(options, rest)
    weights = find_weights(config, options.ckpt_path, options.run_dir)
    base = weights.language_model
    if options.to == "gguf":
        formats.check_convertible(base.base_model, base.revision, quantisations)
        if not formats.has_llama_cpp():
            log(f"llama.cpp is not installed, so transformers verifies the files; to install it, run {formats.INSTALL}")

    data = make_datamodule(config)
    split, notes = reference_notes(data, options.notes)
    device = torch.device("cuda:0" if config.trainer.accelerator != "cpu" and torch.cuda.is_available() else "cpu")
    log(f"loading {base.base_model} and {weights.path}")
    model = weights.load(device)
    log("scoring the labels with medlit's model")
    reference = reference_answers(model, data, weights.metadata.labels, notes)
    verification = Verification(reference, options.max_changed, options.max_drift)
    bits = "4-bit" if base.load_in_4bit else "FP8" if base.load_in_fp8 else "16-bit"
    facts = {"to": options.to, "medlit": f"{weights.path.name}, base model in {bits}, on {device.type}"}
    step = f".{options.output.name}-step-"  # on the disk of the export
    with atomic_dir(options.output) as folder, temporary_dir(step, folder.parent.parent) as scratch:
        model_folder = scratch if options.to == "gguf" else folder
        tokenizer = load_tokenizer(base.base_model, base.revision)
        if options.to == "adapter":
            save_adapter(model, tokenizer, weights.metadata, model_folder)
            if weights.prior is not None:
                shutil.copyfile(weights.prior, model_folder / PRIOR_FILE)
        else:
            facts["added_to"] = weights.merged_into
            log(f"merging the adapter into {weights.merged_into}")
            if weights.prior is not None:
                log("the TF-IDF prior stays with the adapter: the exported model answers without it")
            formats.write_merged(model, base.base_model, base.revision, model_folder)
            tokenizer.save_pretrained(model_folder)
        del model  # the fresh process needs the memory
        gc.collect()
        torch.cuda.empty_cache()
        if options.to == "gguf":
            loader = "llama.cpp" if formats.has_llama_cpp() else "transformers-gguf"
            for quantisation in quantisations:
                path = folder / f"model-{quantisation}.gguf"
                log(f"writing {path.name}")
                formats.write_gguf(model_folder, path, quantisation)
                log(f"reloading it with {loader.removesuffix('-gguf')}")
                verification.check(path.name, loader, path, "cpu", quantisation)
        elif options.to == "merged":
            log("reloading the merged model with transformers")
            verification.check("merged", "transformers", folder, str(device))
        else:
            log("reloading the adapter with PEFT")
            origin: dict[str, Any] = {"revision": base.revision, "load_in_4bit": base.load_in_4bit}
            verification.check("adapter", "peft", folder, str(device), base=resolve(base.base_model), **origin)
        write_json(folder / METADATA_FILE, weights.metadata.public(with_base=options.to != "adapter").to_dict())
        write_card(folder, weights, options.to, verification, data.prompt)
        verified = {"split": split, "ids": reference.ids, "specialties": len(reference.answers)}
        report = {"notes": verified, "max_changed": options.max_changed, "exports": verification.rows}
        write_json(folder / "verification.json", facts | report)
    for line in verification.summary():
        log(line)
    log(f"written: {options.output}")
    return 0


def _check_options(options: argparse.Namespace) -> list[str]:
    """Check each flag by itself; return the requested GGUF types."""
    output = options.output = local_path("output", options.output)
    check_run(options.run_dir)
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise UserError(f"output: {output} exists and is not empty; name a new folder.")
    check_writable("output", output)
    if options.notes < 1:
        raise UserError(f"notes: must be at least 1, not {options.notes}.")
    if not 0 <= options.max_changed <= 1:
        raise UserError(f"max_changed: must be a share from 0 to 1, not {options.max_changed:g}.")
    if options.max_drift is not None and not options.max_drift > 0:
        raise UserError(f"max_drift: must be over 0 nats, not {options.max_drift:g}.")
    quantisations = list(dict.fromkeys(filter(None, options.gguf_types.lower().split(","))))
    if not quantisations or not set(quantisations) <= set(formats.QUANTISATIONS):
        raise UserError(f"gguf_types: {options.gguf_types} is not a list of {', '.join(formats.QUANTISATIONS)}.")
    return quantisations


def _read_settings(options: argparse.Namespace, rest: Sequence[str]) -> Any:  # noqa: ANN401 - jsonargparse's Namespace
    """Read the flags over --config, or over the settings of the run's fit."""
    run = options.run_dir or run_of_adapter(options.adapter)
    settings = list(rest)
    if run is not None and not any(argument.startswith(("-c", "--config")) for argument in rest):
        settings = recorded_settings(run / FIT_CONFIG, "accelerator") + settings
    if options.adapter is not None:
        settings += ["--model.adapter", options.adapter]
    config = parse_settings("export", settings)
    adopt_adapter(config, settings, "EXPORT")
    check_device(config.trainer.accelerator, 1)
    return config


def log(message: str) -> None:
    """Print a message to standard error, with the time since the command started."""
    minutes, seconds = divmod(int(time.time() - psutil.Process().create_time()), 60)
    print(f"medlit: [{minutes} min {seconds:02} s] {message}", file=sys.stderr, flush=True)
