"""Predictions as a table: every process writes its own part, the first one joins them and renames the file in."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.utilities.exceptions import SIGTERMException

from medlit.atomic_io import remove_partial
from medlit.data.datamodule import TranscriptionDataModule
from medlit.errors import UserError
from medlit.model.adapter import adapter_folder
from medlit.model.module import SpecialtyClassifier
from medlit.predictions.columns import Row, rows
from medlit.predictions.resume_key import Origin, hash_notes, hash_weights, settings_of
from medlit.predictions.shards import PartFile, answered, find_parts, part_path, read_part
from medlit.predictions.write import FORMATS, write_table

__all__ = ["FORMATS", "PredictionWriter"]


class PredictionWriter(L.Callback):
    """Writes answers down as they come, and in the end one table in the order of the source.

    Args:
        path: the table; its suffix chooses CSV, JSONL or Parquet.
        to_stdout: print the raw answers instead, how sure they are on standard error, and write nothing.
        resume: keep what an interrupted run has left beside the table and ask about the other notes only.
        checkpoint: the weights, which the trainer itself does not know of until it loads them.

    Attributes:
        written: the table, on the first process; None until it is there.
    """

    def __init__(
        self, path: Path, to_stdout: bool = False, resume: bool = False, checkpoint: str | None = None
    ) -> None:
        self.path = path
        self.to_stdout = to_stdout
        self.resume = resume
        self.checkpoint = checkpoint
        self.written: Path | None = None
        self._kept: dict[Path, int] = {}  # part -> bytes of it that count
        self._file: PartFile | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Look for answers of an interrupted run; all processes do, before any goes on.

        Raises:
            UserError: it asked something else.
        """
        if stage != "predict" or self.to_stdout or not isinstance(pl_module, SpecialtyClassifier):
            return
        self.path = trainer.strategy.broadcast(self.path)  # to another host the next run's number may be another one
        data: TranscriptionDataModule = trainer.datamodule  # type: ignore[attr-defined]
        self._origin = _origin(trainer, pl_module, data, self.checkpoint)
        if not self.resume:
            return
        parts = [part for part in map(read_part, find_parts(self.path)) if part.origin is not None]
        for part in parts:
            difference = self._origin.difference(part.origin) if part.origin is not None else None
            if difference is not None:
                raise UserError(
                    f"resume: the run that was interrupted beside {self.path} asked otherwise ({difference}); give what"
                    " it was given, or leave --resume out to begin anew."
                )
        self._kept = {part.path: part.end for part in parts}
        done = answered(parts, self._origin.notes)
        data.skip_answered(done)
        if trainer.is_global_zero:
            told = f"{done.sum()} of {len(done)} notes were answered before; going on with the rest"
            nothing = f"no interrupted run lies beside {self.path}; beginning with the first note"
            print(f"medlit: {told if parts else nothing}.", file=sys.stderr)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open this process's part."""
        if self.to_stdout:
            return
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if trainer.is_global_zero:
            remove_partial(self.path)
            for path in find_parts(self.path):
                if path not in self._kept:
                    path.unlink()
        trainer.strategy.barrier()
        mine = part_path(self.path, trainer.global_rank)
        self._file = PartFile(mine, self._origin, self._kept.get(mine, 0))

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,  # noqa: ANN401 - Lightning's signature; Answers here
        batch: Any,  # noqa: ANN401 - Prompts
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write a batch's answers down; stop here if somebody asked for it, which Lightning overlooks."""
        if isinstance(pl_module, SpecialtyClassifier):
            found = rows(batch, outputs, pl_module.label_set, pl_module.decoding.abstain_below)
            if self.to_stdout:
                for row in found:
                    _print(row)
            elif self._file is not None:
                self._file.add(found)
        if trainer.received_sigterm:
            raise SIGTERMException

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Join the parts, on the first process.

        Raises:
            UserError: a note's answer is nowhere to be seen.
        """
        if self._file is None:
            return
        self._file.close()
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            parts = [read_part(path) for path in find_parts(self.path)]
            missing = int(np.count_nonzero(~answered(parts, self._origin.notes)))
            if missing and _asked_all(trainer):
                raise UserError(
                    f"output: {missing} of {self._origin.notes} answers are not beside {self.path}, where this process"
                    " looks for all of them; several machines need a folder that they share."
                )
            write_table(parts, self._origin.notes, self.path)
            self.written = self.path
            for part in parts:
                part.path.unlink()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Keep what was answered, and say so; leave nothing behind where nothing was."""
        if self._file is None:
            return
        with contextlib.suppress(OSError):  # the disk is full, and that is the exception
            self._file.close()
        if self._file.empty:
            self._file.path.unlink(missing_ok=True)
        if trainer.is_global_zero and find_parts(self.path):
            print("medlit: what was answered so far is kept; the same command with --resume goes on.", file=sys.stderr)


def _print(row: Row) -> None:
    print(row["answer"].strip())
    if row["probability"] is not None:
        withheld = "; model.decoding.abstain_below would withhold it" if row["abstained"] else ""
        sure = f"probability {row['probability']:.3f}, margin {row['margin']:.3f}, runner-up {row['runner_up']}"
        print(f"medlit: {sure}{withheld}", file=sys.stderr)


def _origin(
    trainer: L.Trainer, module: SpecialtyClassifier, data: TranscriptionDataModule, checkpoint: str | None
) -> Origin:
    notes = data.predict_rows
    adapter = None if module.adapter is None else adapter_folder(module.adapter)
    others = {
        "data.instruction": data.instruction,
        "data.max_response_tokens": data.max_response_tokens,
        "trainer.precision": str(trainer.precision),
        "labels": None if data.label_set is None else list(data.label_set.names),
    }
    return Origin(
        notes=len(notes),
        notes_hash=hash_notes(notes),
        weights_hash=hash_weights(checkpoint, adapter, module.decoding),
        settings=settings_of(module.language_model, module.lora, module.decoding, others),
    )


def _asked_all(trainer: L.Trainer) -> bool:
    # A whole number counts batches; 1.0 is all of them.
    return isinstance(trainer.limit_predict_batches, float) and trainer.limit_predict_batches == 1.0
