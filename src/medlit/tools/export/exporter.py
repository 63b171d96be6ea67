"""One export from the loaded model on: the files, the comparison, the card; whole, or nothing."""

from __future__ import annotations

import argparse
import gc
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import psutil
import torch
from torch import nn

from medlit.atomic_io import atomic_dir, write_json
from medlit.base_model import load_tokenizer, resolve
from medlit.model import adapter as adapters
from medlit.model.families import causal_lm
from medlit.tools.export.card import write_card
from medlit.tools.export.gguf import has_llama_cpp, write_gguf
from medlit.tools.export.hub import Repository
from medlit.tools.export.merged import model_folder, original_shards, trained_shards, write_merged
from medlit.tools.export.source import Questions, Weights, published
from medlit.tools.export.verify import FILE, Request, Verification, answer


def _undecided(row: dict[str, Any]) -> str:
    return f" ({row['undecided']} of the others lay between two)" if row["undecided"] else ""


class Job:
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
        return str(self.options.base or self.weights.language_model.base_model)

    @property
    def words(self) -> str:
        """What a merge adds to, for the report and the card."""
        if self.original:
            return "the base model's 16-bit weights, beside which the adapter was not trained"
        four = self.weights.language_model.load_in_4bit
        return f"the weights that it was trained beside ({'4-bit ones, unpacked to 16 bits' if four else '16 bits'})"

    def write(self, questions: Questions, quantisations: list[str], repository: Repository | None) -> None:
        """Write the folder, whole and compared, or nothing."""
        options, output = self.options, self.options.output
        verification = Verification(questions, options.max_changed, options.max_drift)
        if output.exists():
            output.rmdir()  # it is empty
        with atomic_dir(output) as folder, _scratch(output) as scratch:
            is_adapter = options.to in ("adapter", "hub")
            adapter = folder if is_adapter else _made(scratch / "adapter")
            self._write_adapter(adapter)
            facts: dict[str, Any] = {"to": options.to, "medlit": _own(self.weights, self.device)}
            if is_adapter:
                self._check_adapter(verification, adapter)
            else:
                merged = folder if options.to == "merged" else _made(scratch / "merged")
                facts["added_to"] = self.words
                say(f"adding the adapter to {self.words}")
                self._merge(adapter, merged)
                self._check_merged(verification, adapter, merged, folder, quantisations)
            write_card(folder, self.weights, options.to, verification, facts)
            write_json(folder / FILE, verification.report(facts))
        for row in verification.rows:
            own = row["against_medlit"]
            say(
                f"{row['export']}: {own['notes'] - own['changed']} of {own['notes']} notes get the same specialty"
                f"{_undecided(own)};"
                f" log-likelihood of the answer moved by {own['drift_median']:.4f} nats in the median,"
                f" {own['drift_max']:.4f} at most ({row['reader']})"
            )
        say(f"written: {output}")
        if repository is not None:
            repository.send(output)

    def _let_go(self) -> None:
        """Give the device's memory back before another process wants it."""
        del self.model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _write_adapter(self, folder: Path) -> None:
        language_model = self.weights.language_model
        named = published(language_model.base_model) if self.options.to == "hub" else language_model.base_model
        adapters.save_adapter(self.model, folder, named, language_model.revision)  # type: ignore[arg-type]
        load_tokenizer(language_model.base_model, language_model.revision).save_pretrained(folder)
        self.weights.describe(folder)

    def _merge(self, adapter: Path, folder: Path) -> None:
        language_model = self.weights.language_model
        if self.original:
            source = model_folder(self.onto, language_model.revision if self.options.base is None else None)
            write_merged(original_shards(source), source, adapter, folder)
        else:
            source = model_folder(language_model.base_model, language_model.revision)
            write_merged(trained_shards(causal_lm(self.model)), source, adapter, folder)
        load_tokenizer(language_model.base_model, language_model.revision).save_pretrained(folder)
        self.weights.describe(folder, whole=True)

    def _check_adapter(self, verification: Verification, adapter: Path) -> None:
        self._let_go()
        language_model = self.weights.language_model
        request = Request(
            "peft", adapter, resolve(language_model.base_model), language_model.revision, language_model.load_in_4bit
        )
        say("loading the adapter again with PEFT")
        verification.check("adapter", request, self.device)

    def _check_merged(
        self, verification: Verification, adapter: Path, merged: Path, folder: Path, quantisations: list[str]
    ) -> None:
        self._let_go()
        beside = None
        if self.original:
            say("answering with the adapter beside those weights, for comparison")
            revision = self.weights.language_model.revision if self.options.base is None else None
            request = Request("peft", adapter, str(model_folder(self.onto, revision)))
            beside = np.array(answer(request, verification.questions, self.device)["nats"])
        if self.options.to == "merged":
            say("loading the merged model again with transformers")
            verification.check("merged", Request("transformers", merged), self.device, beside)
            return
        for one in quantisations:
            path = folder / f"model-{one}.gguf"
            say(f"writing {path.name}")
            write_gguf(merged, path, one)
            with_llama_cpp = has_llama_cpp()
            say(f"loading it again with {'llama.cpp' if with_llama_cpp else 'transformers'}")
            request = Request("llama.cpp" if with_llama_cpp else "transformers-gguf", path)
            verification.check(path.name, request, torch.device("cpu"), beside, one)
        self.weights.describe(folder, whole=True)


def _own(weights: Weights, device: torch.device) -> str:
    """What medlit's own answers were made with."""
    return f"{weights.file}, base model in {'4-bit' if weights.language_model.load_in_4bit else '16-bit'}, on {device.type}"


def _made(folder: Path) -> Path:
    folder.mkdir(mode=0o700)
    return folder


@contextmanager
def cleared_away() -> Iterator[None]:
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


def say(text: str) -> None:
    """Tell a step, with the minutes and seconds since the command was given."""
    minutes, seconds = divmod(int(time.time() - psutil.Process().create_time()), 60)
    print(f"medlit: {minutes}:{seconds:02} {text}", file=sys.stderr, flush=True)
