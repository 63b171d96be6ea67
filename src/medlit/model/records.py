"""From batches to the record of an evaluation, on one process or on many."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import distributed

from medlit.data.collate import EvalBatch
from medlit.data.labels import LabelSet
from medlit.evaluation.calibration import at_temperature
from medlit.evaluation.results import Results
from medlit.model.decoding import Answers


def record(batch: EvalBatch, answers: Answers, label_set: LabelSet) -> Results:
    """One batch's answers, without the notes' text and without the raw answers."""
    prompts = batch.prompts
    given = answers.probabilities
    return Results(
        names=label_set.names,
        rows=np.array(prompts.rows),
        ids=list(prompts.ids),
        text_hashes=list(batch.text_hashes),
        truth=np.array([label_set.index(name) for name in batch.specialties], dtype=np.int64),
        answer=answers.label_ids.cpu().numpy(),
        probabilities=None if given is None else _normalised(given.double().cpu().numpy()),
        tokens=prompts.attention_mask.sum(dim=1).cpu().numpy(),
        cut_tokens=np.array(prompts.cut_tokens),
    )


def _normalised(probabilities: np.ndarray) -> np.ndarray:
    # Rows of float32 add up to 1 to seven digits only.
    out: np.ndarray = probabilities / probabilities.sum(axis=1, keepdims=True)
    return out


def gather(parts: Sequence[Results]) -> Results:
    """The records of all batches and all processes, in the order of the table, on every process."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return Results.join(parts)
    everybody: list[list[Results]] = [[] for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(everybody, list(parts))
    return Results.join([part for theirs in everybody for part in theirs])


def apply_temperature(answers: Answers, temperature: float | None) -> Answers:
    """The same answers with their probabilities at a temperature."""
    if temperature is None or answers.probabilities is None:
        return answers
    scaled = at_temperature(answers.probabilities.double().cpu().numpy(), temperature)
    return answers._replace(probabilities=torch.from_numpy(scaled).float())
