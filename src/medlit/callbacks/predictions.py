"""Write predictions: every process writes shards, the first one joins them to a table."""

import contextlib
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import TextIO

import lightning as L
import numpy as np
import numpy.typing as npt

from medlit.atomic_io import link_target, remove_partial
from medlit.data.collate import Prompts
from medlit.data.datamodule import TranscriptionDataModule
from medlit.errors import UserError, tell
from medlit.model.adapter import adapter_folder
from medlit.model.adapter_metadata import read_fitted
from medlit.model.decoding import Answers, apply_temperature
from medlit.model.module import SpecialtyClassifier
from medlit.predictions import shards
from medlit.predictions.shards import ResumeKey, check_table
from medlit.predictions.table import Prediction, SetPrediction, make_predictions, table_rows


class PredictionWriter(L.Callback):
    """Writes answers to shards as they come, and at the end one table, `path`, in the order of the source.

    `to_stdout` prints the answers instead. `resume` keeps the shards of an interrupted run and answers the other notes.
    `checkpoint` is the path of the weights, which the trainer has only once it loads them.
    """

    def __init__(self, path: Path, to_stdout: bool, resume: bool, checkpoint: str | None) -> None:
        self.path = path
        self.to_stdout = to_stdout
        self.resume = resume
        self.checkpoint = checkpoint
        self.replaces = path.exists()
        self.written: Path | None = None  # the table, on the first process, once it is complete
        self._writer: shards.ShardWriter | None = None
        self._lock: TextIO | None = None  # of the first process, from setup to the end

    def setup(self, trainer: L.Trainer, pl_module: SpecialtyClassifier, stage: str) -> None:  # type: ignore[override]
        """Claim the table and find an interrupted run's answers; a UserError for another writer or other inputs."""
        if stage != "predict" or self.to_stdout:
            return
        self.path = trainer.strategy.broadcast(self.path)  # on another host the next run's number may differ
        data: TranscriptionDataModule = trainer.datamodule  # type: ignore[attr-defined]
        mistake: str | None = None
        answered: npt.NDArray[np.bool_] | None = None
        if trainer.is_global_zero:
            try:
                self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._lock = shards.lock_table(self.path)
                check_table(self.path, (), self.replaces)  # another process may just have written it
                self._key = ResumeKey.of(pl_module, data, self.checkpoint, trainer.precision)
                answered = self._find_answered()
            except UserError as error:
                mistake = str(error)
        mistake, answered = trainer.strategy.broadcast((mistake, answered))
        if mistake is not None:
            raise UserError(mistake)
        data.answered = answered
        if answered is not None:
            tell(f"{answered.sum()} of {len(answered)} notes were answered before; continuing with the rest.")
        elif self.resume:
            tell(f"there is no interrupted run beside {self.path}; starting with the first note.")

    def _find_answered(self) -> npt.NDArray[np.bool_] | None:
        if not self.resume or (earlier := shards.read_resume_key(self.path)) is None:
            return None
        if (difference := self._key.difference(earlier)) is not None:
            raise UserError(
                f"resume: the interrupted run beside {self.path} had other inputs ({difference}); repeat its command"
                " with --resume, or leave --resume out to start over."
            )
        return shards.answered_rows(shards.keep_whole_shards(self.path), earlier.notes)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prepare the folder of shards."""
        if self.to_stdout:
            return
        if trainer.is_global_zero:
            remove_partial(link_target(self.path))
            if trainer.datamodule.answered is None:  # type: ignore[attr-defined]
                shards.start_shards(self.path, self._key)
        trainer.strategy.barrier()
        self._writer = shards.ShardWriter(self.path, trainer.global_rank)

    def on_predict_batch_end(  # type: ignore[override]
        self, trainer: L.Trainer, pl_module: SpecialtyClassifier, outputs: Answers, batch: Prompts, *_: int
    ) -> None:
        """Write a batch's answers."""
        decoding, threshold = pl_module.decoding, pl_module.thresholds.get(pl_module.decoding.sets)
        predictions = make_predictions(batch, outputs, pl_module.label_set, decoding.abstain_below, threshold)
        if self._writer is not None:
            self._writer.add(table_rows(batch, predictions))
        else:
            print(predictions[0].answer.strip())
            _print_odds(pl_module, batch, predictions[0], self.checkpoint)

    def on_predict_end(self, trainer: L.Trainer, pl_module: SpecialtyClassifier) -> None:  # type: ignore[override]
        """Join the shards, on the first process; a UserError if answers are missing."""
        if self._writer is None:
            return
        self._writer.flush()
        trainer.strategy.barrier()
        if self._lock is not None:
            found, notes = shards.find_shards(self.path), self._key.notes
            missing = int(np.count_nonzero(~shards.answered_rows(found, notes)))
            # A whole number limits the batches; 1.0 is all of them.
            if missing and trainer.limit_predict_batches == 1.0 and isinstance(trainer.limit_predict_batches, float):
                raise UserError(
                    f"output: {missing} of {notes} answers are not beside {self.path}, where this process looks for"
                    " all of them; several machines need a folder that they share."
                )
            separator = trainer.datamodule.labels.separator or "; "  # type: ignore[attr-defined]
            shards.write_table(found, notes, self.path, separator if pl_module.decoding.sets else None)
            self.written = self.path
            shutil.rmtree(shards.shard_folder(self.path))
            self._lock.close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Keep the answers so far; leave nothing behind if there are none."""
        if self._writer is not None:
            with contextlib.suppress(OSError, UserError):  # the exception may be that the disk is full
                self._writer.flush()
        if self._lock is None or self._lock.closed:
            return
        if not shards.find_shards(self.path):
            shutil.rmtree(shards.shard_folder(self.path), ignore_errors=True)  # what matters is the exception
        elif self._writer is not None:
            tell("the answers so far are kept; the same command with --resume continues.")
        self._lock.close()


def _print_odds(module: SpecialtyClassifier, batch: Prompts, given: Prediction, checkpoint: str | None) -> None:
    """Print a note's probability; a generated answer has none, so the note is answered by label likelihood too."""
    odds, start = given, ""
    if module.decoding.mode == "generate" and module.label_set.names:
        decoding = replace(module.decoding, mode="likelihood")
        adapter = None if module.adapter is None else adapter_folder(module.adapter)
        temperature, _, prior = read_fitted(checkpoint, adapter, decoding)
        answers = apply_temperature(module.build_decoder(decoding, prior)(batch), temperature)
        odds = make_predictions(batch, answers, module.label_set, None)[0]
        start = f"{'' if given.specialty else 'the answer is no specialty; the most likely one is '}{odds.answer}: "
    if odds.probability is not None:
        members = f"; set: {'; '.join(odds.set)}" if isinstance(odds, SetPrediction) else ""
        withheld = "; model.decoding.abstain_below would withhold it" if odds.abstained else ""
        numbers = f"probability {odds.probability:.3f}, margin {odds.margin:.3f}, runner-up {odds.runner_up}"
        print(f"medlit: {start}{numbers}{withheld}{members}", file=sys.stderr)
