"""Whether an export answers as medlit's model does: a fresh process loads it, and its answers are compared.

Two things are measured on N notes with K specialties. Labels: the likeliest specialty of each note, against medlit's
own. Drift: how far the log-likelihood of each note's likeliest specialty moved, in nats; not relative to the other
specialties, so that a model which has begun to answer off the list shows.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medlit.errors import UserError
from medlit.evaluation.results import FloatArray
from medlit.tools.export.process import ProcessFailed, own_process
from medlit.tools.export.source import Questions
from medlit.tools.export.tolerances import DRIFT, PLAIN_DRIFT

FILE = "verification.json"
_LARGE = 4 * 2**30  # bytes of weights from which on a CPU computes in 16 bits


@dataclass(frozen=True)
class Request:
    """What a fresh process is to load, in the terms of `reload.py`."""

    loader: str
    path: Path
    base: str | None = None
    revision: str | None = None
    four_bit: bool = False


@dataclass(frozen=True)
class Comparison:
    """N notes answered twice.

    Attributes:
        notes: N.
        changed: notes whose likeliest specialty is another.
        changed_ids: their ids.
        undecided: of them, those that medlit's own model hardly decides: the two specialties are so close that
            rounding may put either one first.
        drift_max: of the first one's likeliest specialty, nats, the largest of all notes.
        drift_median: the same, the median.
        all_max: of all K specialties, the largest.
        all_median: the same, the median.
    """

    notes: int
    changed: int
    changed_ids: list[str]
    undecided: int
    drift_max: float
    drift_median: float
    all_max: float
    all_median: float


@dataclass
class Verification:
    """The comparisons of one export.

    Attributes:
        questions: the notes, and medlit's own answers.
        max_changed: share of notes.
        max_drift: nats; None for what the export's number format brings about.
        rows: one for each file, as they stand in the report.
    """

    questions: Questions
    max_changed: float
    max_drift: float | None
    rows: list[dict[str, Any]] = field(default_factory=list)

    def check(
        self,
        what: str,
        request: Request,
        device: torch.device,
        beside: FloatArray | None = None,
        quantisation: str | None = None,
    ) -> None:
        """Reload an export and compare.

        Args:
            what: the export's name in the report.
            request: how to load it.
            device: where to compute.
            beside: log-likelihoods of the same adapter on the same weights, (N, K), where medlit's own model has other
                weights; drift is then measured against these.
            quantisation: the number format of its weights; None for 16 bits.

        Raises:
            UserError: it answers otherwise, or cannot be loaded at all.
        """
        told = answer(request, self.questions, device)
        theirs = np.array(told["nats"])
        if theirs.shape != self.questions.nats.shape or not np.isfinite(theirs).all():
            raise UserError(
                f"to: {what} does not answer in finite numbers once it is loaded again; nothing is written."
            )
        allowed = self.max_drift or DRIFT.get(quantisation or "", PLAIN_DRIFT)
        near = min(allowed, PLAIN_DRIFT)
        own = compare(self.questions.nats, theirs, self.questions.ids, near)
        fair = own if beside is None else compare(beside, theirs, self.questions.ids, near)
        self.rows.append(
            {"export": what, "reader": told["reader"], "against_medlit": asdict(own)}
            | ({} if beside is None else {"against_adapter_on_these_weights": asdict(fair)})
            | {"tokenizer": None if told["tokens"] is None else "the same", "max_drift": allowed}
        )
        if told["tokens"] not in (None, self.questions.tokens):
            raise UserError(
                f"to: {what} cuts text into other tokens than the base model's tokenizer; nothing is written."
            )
        if own.changed - own.undecided > self.max_changed * own.notes:
            raise UserError(
                f"max_changed: {what} gives {own.changed - own.undecided} of {own.notes} notes clearly another"
                f" specialty than medlit's model ({self.max_changed:g} of them may be); nothing is written. --onto"
                " trained keeps the weights that the adapter was trained beside, a finer quantisation helps, or allow"
                " more."
            )
        if fair.drift_max > allowed:
            raise UserError(
                f"max_drift: {what} moves the log-likelihood of a note's specialty by {fair.drift_max:.3f} nats"
                f" ({allowed:g} are allowed); nothing is written. A finer quantisation helps, or allow more."
            )

    def report(self, facts: dict[str, Any]) -> dict[str, Any]:
        """What `verification.json` says; notes by their ids, no text."""
        notes = {"split": self.questions.split, "ids": self.questions.ids, "specialties": len(self.questions.answers)}
        return facts | {"notes": notes, "max_changed": self.max_changed, "exports": self.rows}


def compare(ours: FloatArray, theirs: FloatArray, ids: list[str], near: float) -> Comparison:
    """Compare log-likelihoods, (N, K).

    Args:
        ours: medlit's.
        theirs: the export's.
        ids: of the notes.
        near: nats within which two specialties are undecided.
    """
    before, after = ours.argmax(axis=1), theirs.argmax(axis=1)
    drift = np.abs(theirs - ours)
    rows = np.arange(len(ours))
    answered, apart = drift[rows, before], ours[rows, before] - ours[rows, after]
    return Comparison(
        notes=len(ours),
        changed=int((before != after).sum()),
        changed_ids=[ids[i] for i in np.flatnonzero(before != after)],
        undecided=int(((before != after) & (apart < near)).sum()),
        drift_max=float(answered.max()),
        drift_median=float(np.median(answered)),
        all_max=float(drift.max()),
        all_median=float(np.median(drift)),
    )


def answer(request: Request, questions: Questions, device: torch.device) -> dict[str, Any]:
    """Load an export in a fresh process and let it weigh the specialties; see `reload.py`.

    Raises:
        UserError: it does not load.
    """
    values = asdict(request) | {
        "path": str(request.path),
        "device": str(device),
        "dtype": _dtype(request, device),
        "prompts": questions.prompts,
        "answers": questions.answers,
        "texts": questions.texts,
    }
    try:
        told: dict[str, Any] = json.loads(own_process("reload.py", values))
    except ProcessFailed as error:
        raise UserError(
            f"to: {request.path.name} does not load with {request.loader} ({error}); nothing is written."
        ) from error
    return told


def _dtype(request: Request, device: torch.device) -> str:
    """Half precision on a GPU, and on a CPU for weights too large to be in memory at 32 bits."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    files = [request.path] if request.path.is_file() else Path(request.base or request.path).glob("*.safetensors")
    return "bfloat16" if sum(file.stat().st_size for file in files) > _LARGE else "float32"
