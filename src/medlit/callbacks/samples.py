"""A few notes with their answers, to look at: only for a user who asked, and for that user's eyes alone."""

from __future__ import annotations

import json
import os
from typing import Any

import lightning as L

from medlit.callbacks.run_folder import run_folder, verb_of
from medlit.model.module import SpecialtyClassifier

SAMPLES_FILE = "samples.jsonl"


class Samples(L.Callback):
    """Appends the first notes of each validation or test to `samples.jsonl`: what was asked, and what was answered.

    Patients' text is written nowhere else but in predictions, so this is off by default, and the file can be read by
    its owner alone. A trial run (`fast_dev_run`) leaves none.

    Args:
        notes: how many of the first process's notes.
    """

    def __init__(self, notes: int) -> None:
        self.notes = notes
        self._left = 0

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin again; all processes ask for the folder, of which the first one writes."""
        self._folder = run_folder(trainer)
        rehearsal = trainer.sanity_checking or trainer.fast_dev_run  # type: ignore[attr-defined]
        self._left = self.notes if trainer.is_global_zero and not rehearsal else 0

    on_test_start = on_validation_start

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,  # noqa: ANN401 - Lightning's signature; answers here
        batch: Any,  # noqa: ANN401 - EvalBatch
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write those of this batch."""
        if not self._left or not isinstance(pl_module, SpecialtyClassifier):
            return
        prompts, step = batch.prompts, trainer.global_step
        with open(self._folder / SAMPLES_FILE, "a", encoding="utf-8", opener=_private) as file:
            for i in range(min(self._left, len(prompts.ids))):
                asked = prompts.input_ids[i][prompts.attention_mask[i].bool()]
                sample = {
                    "verb": verb_of(trainer),
                    "step": step,
                    "id": prompts.ids[i],
                    "prompt": pl_module.tokenizer.decode(asked, skip_special_tokens=True),
                    "specialty": batch.specialties[i],
                    "answer": outputs["answers"].texts[i],
                }
                file.write(json.dumps(sample, ensure_ascii=False) + "\n")
                self._left -= 1

    on_test_batch_end = on_validation_batch_end


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
