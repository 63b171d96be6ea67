"""The steps of an export: weights, medlit's own answers, the files, the comparison, the card."""

from __future__ import annotations

import argparse
import gc
import itertools
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import psutil
import torch
from torch import nn

from medlit.bounds import check_settings
from medlit.errors import UserError
from medlit.labels import LabelSet
from medlit.model import adapter as adapters
from medlit.model.backbone import causal_lm
from medlit.preflight import check_device, check_writable
from medlit.quiet import quiet
from medlit.runs import whole_folder, write_json
from medlit.tools.export.card import write_card
from medlit.tools.export.gguf import INSTALL, QUANTISATIONS, check_convertible, has_llama_cpp, write_gguf
from medlit.tools.export.hub import Repository
from medlit.tools.export.merged import model_folder, original_shards, trained_shards, write_merged
from medlit.tools.export.source import Questions, Weights, ask, find_weights, published, recorded
from medlit.tools.export.verify import FILE, Request, Verification, answer
from medlit.tools.settings import data_module, settings
from medlit.weights import load_tokenizer, resolve


def export(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Export, compare, say what came out.

    Args:
        options: the verb's own flags.
        rest: settings as for `medlit fit`.

    Raises:
        UserError: something cannot be used, or the export does not answer alike; nothing is left.
    """
    quiet()
    run = options.run
    if run is not None and not run.is_dir():
        raise UserError(f"run: there is no folder {run}; give the run folder of a fit.")
    has_config = any(argument.split("=")[0] == "--config" for argument in rest)
    beside = run or _run_beside(rest)
    config = settings("export", [*(recorded(beside) if beside is not None and not has_config else []), *rest])
    check_settings(config)
    check_device(config.trainer.accelerator, 1)
    quantisations = _check(options)
    repository = Repository.of(options) if options.to == "hub" else None

    weights = find_weights(config, options.ckpt_path, run)
    if repository is not None:
        repository.check_base(weights.backbone.base_model)
    job = _Job(options, weights, _device(config.trainer.accelerator))
    if options.to == "gguf":
        check_convertible(model_folder(job.onto, weights.backbone.revision), quantisations)
        if not has_llama_cpp():
            _say(
                f"llama.cpp is not installed, so the files are read again with transformers; to have it, run {INSTALL}"
            )
    _say(f"loading {weights.backbone.base_model} and {weights.name}")
    job.model = weights.load(job.device)
    _say("weighing the specialties with medlit's model")
    questions = ask(job.model, data_module(config), LabelSet(tuple(weights.structure.labels)), options.notes)
    with _cleared_away():
        job.write(questions, quantisations, repository)
    return 0


def _undecided(row: dict[str, Any]) -> str:
    return f" ({row['undecided']} of the others lay between two)" if row["undecided"] else ""


class _Job:
    """One export, from the loaded model on.

    Args:
        options: the verb's own flags.
        weights: what is exported.
        device: where to compute.

    Attributes:
        model: medlit's own; let go before another process loads the export.
    """

    model: nn.Module

    def __init__(self, options: argparse.Namespace, weights: Weights, device: torch.device) -> None:
        self.options = options
        self.weights = weights
        self.device = device
        self.original = options.onto == "original" and options.to in ("merged", "gguf")

    @property
    def onto(self) -> str:
        """The base model whose files a merge starts from."""
        return str(self.options.base or self.weights.backbone.base_model)

    @property
    def words(self) -> str:
        """What a merge adds to, for the report and the card."""
        if self.original:
            return "the base model's 16-bit weights, beside which the adapter was not trained"
        four = self.weights.backbone.load_in_4bit
        return f"the weights that it was trained beside ({'4-bit ones, unpacked to 16 bits' if four else '16 bits'})"

    def write(self, questions: Questions, quantisations: list[str], repository: Repository | None) -> None:
        """Write the folder, whole and compared, or nothing."""
        options, output = self.options, self.options.output
        verification = Verification(questions, options.max_changed, options.max_drift)
        if output.exists():
            output.rmdir()  # it is empty
        with whole_folder(output) as folder, _scratch(output) as scratch:
            is_adapter = options.to in ("adapter", "hub")
            adapter = folder if is_adapter else _made(scratch / "adapter")
            self._write_adapter(adapter)
            facts: dict[str, Any] = {"to": options.to, "medlit": _own(self.weights, self.device)}
            if is_adapter:
                self._check_adapter(verification, adapter)
            else:
                merged = folder if options.to == "merged" else _made(scratch / "merged")
                facts["added_to"] = self.words
                _say(f"adding the adapter to {self.words}")
                self._merge(adapter, merged)
                self._check_merged(verification, adapter, merged, folder, quantisations)
            write_card(folder, self.weights, options.to, verification, facts)
            write_json(folder / FILE, verification.report(facts))
        for row in verification.rows:
            own = row["against_medlit"]
            _say(
                f"{row['export']}: {own['notes'] - own['changed']} of {own['notes']} notes get the same specialty"
                f"{_undecided(own)};"
                f" log-likelihood of the answer moved by {own['drift_median']:.4f} nats in the median,"
                f" {own['drift_max']:.4f} at most ({row['reader']})"
            )
        _say(f"written: {output}")
        if repository is not None:
            repository.send(output)

    def _let_go(self) -> None:
        """Give the device's memory back before another process wants it."""
        del self.model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _write_adapter(self, folder: Path) -> None:
        backbone = self.weights.backbone
        named = published(backbone.base_model) if self.options.to == "hub" else backbone.base_model
        adapters.save_adapter(self.model, folder, named, backbone.revision)  # type: ignore[arg-type]
        load_tokenizer(backbone.base_model, backbone.revision).save_pretrained(folder)
        self.weights.describe(folder)

    def _merge(self, adapter: Path, folder: Path) -> None:
        backbone = self.weights.backbone
        if self.original:
            source = model_folder(self.onto, backbone.revision if self.options.base is None else None)
            write_merged(original_shards(source), source, adapter, folder)
        else:
            source = model_folder(backbone.base_model, backbone.revision)
            write_merged(trained_shards(causal_lm(self.model)), source, adapter, folder)
        load_tokenizer(backbone.base_model, backbone.revision).save_pretrained(folder)
        self.weights.describe(folder, whole=True)

    def _check_adapter(self, verification: Verification, adapter: Path) -> None:
        self._let_go()
        backbone = self.weights.backbone
        request = Request("peft", adapter, resolve(backbone.base_model), backbone.revision, backbone.load_in_4bit)
        _say("loading the adapter again with PEFT")
        verification.check("adapter", request, self.device)

    def _check_merged(
        self, verification: Verification, adapter: Path, merged: Path, folder: Path, quantisations: list[str]
    ) -> None:
        self._let_go()
        beside = None
        if self.original:
            _say("answering with the adapter beside those weights, for comparison")
            revision = self.weights.backbone.revision if self.options.base is None else None
            request = Request("peft", adapter, str(model_folder(self.onto, revision)))
            beside = np.array(answer(request, verification.questions, self.device)["nats"])
        if self.options.to == "merged":
            _say("loading the merged model again with transformers")
            verification.check("merged", Request("transformers", merged), self.device, beside)
            return
        for one in quantisations:
            path = folder / f"model-{one}.gguf"
            _say(f"writing {path.name}")
            write_gguf(merged, path, one)
            with_llama_cpp = has_llama_cpp()
            _say(f"loading it again with {'llama.cpp' if with_llama_cpp else 'transformers'}")
            request = Request("llama.cpp" if with_llama_cpp else "transformers-gguf", path)
            verification.check(path.name, request, torch.device("cpu"), beside, one)
        self.weights.describe(folder, whole=True)


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


def _own(weights: Weights, device: torch.device) -> str:
    """What medlit's own answers were made with."""
    return f"{weights.file}, base model in {'4-bit' if weights.backbone.load_in_4bit else '16-bit'}, on {device.type}"


def _made(folder: Path) -> Path:
    folder.mkdir(mode=0o700)
    return folder


@contextmanager
def _cleared_away() -> Iterator[None]:
    """Let a job manager's SIGTERM end the export as Ctrl-C does, with what is half written removed."""

    def stop(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _scratch(output: Path) -> Iterator[Path]:
    """A folder beside the export, on the disk that must take it anyway, for what is only a step on the way."""
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-step-", dir=output.parent) as name:
        yield Path(name)


def _say(text: str) -> None:
    """Tell a step, with the minutes and seconds since the command was given."""
    minutes, seconds = divmod(int(time.time() - psutil.Process().create_time()), 60)
    print(f"medlit: {minutes}:{seconds:02} {text}", file=sys.stderr, flush=True)
