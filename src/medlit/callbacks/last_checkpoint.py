"""The newest weights: `checkpoints/last.ckpt`, from which a fit goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from medlit.atomic_io import remove_partial
from medlit.callbacks.run_folder import run_folder, verb_of

PATHS = ("best_model_path", "kth_best_model_path", "last_model_path")  # of ModelCheckpoint's state


def _paths(state: dict[str, Any]) -> set[str]:
    return {state[key] for key in PATHS if state.get(key)} | set(state.get("best_k_models", ()))


class LastCheckpoint(Checkpoint):
    """Writes `last.ckpt` before and after every validation of a fit, and at its end where none came last.

    Before, since answering hundreds of notes is where a fit dies first; after, since the callbacks' scores belong to
    it. `ModelCheckpoint(save_last=True)` writes it only together with a new best one, so that the last of a fit that
    got no better is missing. Comes after the other callbacks: the file holds their state too.
    """

    def __init__(self) -> None:
        self._saved_at = -1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Clear away what a process left that was killed while it wrote."""
        folder = run_folder(trainer)
        if trainer.is_global_zero:
            for path in (self._path(folder), folder / "checkpoints" / "best.ckpt", folder / "adapter"):
                remove_partial(path)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Know the best checkpoint again in a run folder that was moved, or is named in another way than it was."""
        # Lightning forgets the best score where the folder's name is not the same, letter by letter.
        for callback in trainer.checkpoint_callbacks:
            state = checkpoint["callbacks"].get(callback.state_key, {})
            if isinstance(callback, ModelCheckpoint) and (Path(str(callback.dirpath)) / "best.ckpt").exists():
                here = {old: str(Path(str(callback.dirpath)) / Path(old).name) for old in _paths(state)}
                for key in PATHS:
                    state[key] = here.get(state.get(key), "")
                state["best_k_models"] = {here[old]: score for old, score in state["best_k_models"].items()}
                state["dirpath"] = callback.dirpath

    # Lightning counts a step for its loggers after the validation that follows it, and restores that count wrongly in
    # three of four cases (2.6.6): a resumed curve would have a step twice, or leave one out.

    def on_train_batch_start(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        batch: Any,  # noqa: ANN401 - Lightning's signature
        batch_idx: int,
    ) -> None:
        """Log a step under its own number."""
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write; the sanity check and the verb `validate` are no part of a fit."""
        if not trainer.sanity_checking and verb_of(trainer) == "fit":
            trainer.fit_loop.epoch_loop._batches_that_stepped = max(trainer.global_step - 1, 0)
            self.save(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write, with the scores."""
        if not trainer.sanity_checking and verb_of(trainer) == "fit":
            self.save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write what no validation has seen."""
        if self._saved_at != trainer.global_step:
            self.save(trainer)

    def save(self, trainer: L.Trainer) -> None:
        """Write the state of this optimizer step; every process must call it."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        for logger in trainer.loggers:
            logger.save()  # what was measured up to this step is not measured again
        trainer.save_checkpoint(self._path(run_folder(trainer)), weights_only=False)
        self._saved_at = trainer.global_step

    @staticmethod
    def _path(folder: Path) -> Path:
        return folder / "checkpoints" / "last.ckpt"
