"""Verify that an export answers like medlit's model: a fresh process reloads it and scores the labels of some notes.

Two things are measured on N notes and K labels. Changed: notes whose most likely label differs from medlit's. Drift:
how far the log-likelihood of each note's most likely label moved, in nats. Drift is absolute, not relative to the other
labels, so a model that has started to answer off the list is detected too.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medlit.errors import UserError
from medlit.evaluation.results import FloatArray

# Largest allowed drift in nats, and the number formats with their own bound: above everything measured, far below
# what a mistake causes. The 4-bit bound rests on one run of a 135M Llama whose rows are no multiples of 256, so 180 of
# its 272 tensors were kept in 5 or 8 bits: a model that is 4-bit throughout may drift further.
MAX_DRIFT = 0.5
MAX_DRIFT_OF = {"q4_k_m": 3.0}
_LARGE = 4 * 2**30  # bytes of weights above which a CPU computes in 16 bits


@dataclass(frozen=True)
class Reference:
    """What medlit's own model answers for N notes."""

    ids: list[str]
    prompts: list[list[int]]  # token ids, N of them
    answers: list[list[int]]  # token ids of the K labels, each with its EOS
    texts: list[str]  # what the exported tokenizer must tokenize alike: the labels and the instruction
    tokens: list[list[int]]  # token ids of each text
    log_likelihood: FloatArray  # of each label after each prompt, in nats, (N, K)


@dataclass
class Verification:
    """The comparisons of one export."""

    reference: Reference
    max_changed: float  # share of notes that may get another label
    max_drift: float | None  # in nats; None for the default of the number format
    rows: list[dict[str, Any]] = field(default_factory=list)  # one per file, as in `verification.json`

    def check(
        self, name: str, loader: str, path: Path, device: str, quantisation: str | None = None, **base: object
    ) -> None:
        """Reload an export in a fresh process and compare its answers with medlit's.

        `loader` and `base` are as in `reload_worker.py`; `quantisation` is the weights' format, None for 16 bits.
        """
        reference = self.reference
        request = {"loader": loader, "path": str(path), "device": device, "dtype": _dtype(path, device, base), **base}
        request |= {"prompts": reference.prompts, "answers": reference.answers, "texts": reference.texts}
        try:
            result = run_worker(request)
        except RuntimeError as error:
            raise UserError(
                f"to: {path.name} does not load with {loader} ({error}), so nothing was written; check that its"
                " package is installed and supports the base model."
            ) from error
        log_likelihood = np.array(result["log_likelihood"])
        if log_likelihood.shape != reference.log_likelihood.shape or not np.isfinite(log_likelihood).all():
            fault = "does not give finite log-likelihoods once reloaded, so nothing was written"
            raise UserError(f"to: {name} {fault}; check the weights with 'medlit test'.")
        if result["tokens"] not in (None, reference.tokens):
            raise UserError(
                f"to: {name} tokenizes text differently from the base model, so nothing was written; use the versions"
                " of transformers and tokenizers that saved the base model."
            )
        max_drift = self.max_drift or MAX_DRIFT_OF.get(quantisation or "", MAX_DRIFT)
        row = compare(reference.log_likelihood, log_likelihood, reference.ids, min(max_drift, MAX_DRIFT))
        entry = {"export": name, "reader": result["reader"], "against_medlit": row}
        tokenizer = None if result["tokens"] is None else "the same"
        self.rows.append(entry | {"tokenizer": tokenizer, "max_drift": max_drift})
        changed = row["changed"] - row["undecided"]
        if changed > self.max_changed * row["notes"]:
            raise UserError(
                f"max_changed: {name} clearly gives {changed} of {row['notes']} notes another label than medlit's"
                f" model (allowed share: {self.max_changed:g}), so nothing was written; use a finer quantisation or"
                " allow more."
            )
        if row["drift_max"] > max_drift:
            raise UserError(
                f"max_drift: {name} moves the log-likelihood of a note's label by {row['drift_max']:.3f} nats"
                f" (allowed: {max_drift:g}), so nothing was written; use a finer quantisation or allow more."
            )

    def summary(self) -> Iterator[str]:
        """One line per file."""
        for row in self.rows:
            ours = row["against_medlit"]
            undecided = f" ({ours['undecided']} of the others are undecided)" if ours["undecided"] else ""
            yield (
                f"{row['export']}: {ours['notes'] - ours['changed']} of {ours['notes']} notes get the same"
                f" label{undecided}; log-likelihood of the answer moved by {ours['drift_median']:.4f} nats in the"
                f" median, {ours['drift_max']:.4f} at most ({row['reader']})"
            )


def compare(ours: FloatArray, theirs: FloatArray, ids: list[str], close: float) -> dict[str, Any]:
    """Compare log-likelihoods, (N, K), of medlit's model and an export.

    Returns:
        notes: N; changed: notes whose most likely label differs, changed_ids: their ids; undecided: for how many of
        them medlit's own model holds the two labels less than `close` nats apart, so that rounding may put either
        first; drift_max, drift_median: of medlit's most likely label, in nats; all_max, all_median: of all labels.
    """
    rows, before, after = np.arange(len(ours)), ours.argmax(axis=1), theirs.argmax(axis=1)
    changed, drift = before != after, np.abs(theirs - ours)
    margin = ours[rows, before] - ours[rows, after]
    return {
        "notes": len(ours),
        "changed": int(changed.sum()),
        "changed_ids": [ids[i] for i in np.flatnonzero(changed)],
        "undecided": int((changed & (margin < close)).sum()),
        "drift_max": float(drift[rows, before].max()),
        "drift_median": float(np.median(drift[rows, before])),
        "all_max": float(drift.max()),
        "all_median": float(np.median(drift)),
    }


def _dtype(path: Path, device: str, base: dict[str, Any]) -> str:
    """Half precision on a GPU, and on a CPU for weights too large to hold in 32 bits."""
    if device.startswith("cuda"):
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    files = [path] if path.is_file() else Path(base.get("base", path)).glob("*.safetensors")
    return "bfloat16" if sum(file.stat().st_size for file in files) > _LARGE else "float32"


def run_worker(request: dict[str, Any]) -> dict[str, Any]:
    """Run `reload_worker.py` in a fresh process, which may abort without ending medlit.

    Raises a RuntimeError if it fails, with the last line of its standard error.
    """
    done = subprocess.run(
        [sys.executable, "-P", str(Path(__file__).with_name("reload_worker.py"))],  # this folder is not on its path
        input=json.dumps(request),
        capture_output=True,
        text=True,
        errors="replace",
        # Without GGML_NO_BACKTRACE an abort in llama.cpp prints the whole stack after its message.
        env=os.environ | {"HF_HUB_OFFLINE": "1", "GGML_NO_BACKTRACE": "1"},
    )
    if done.returncode != 0:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    return dict(json.loads(done.stdout))
