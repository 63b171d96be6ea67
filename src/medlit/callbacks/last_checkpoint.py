"""The newest state of a fit, `checkpoints/last.ckpt`, from which it resumes."""

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from medlit.atomic_io import remove_partial
from medlit.callbacks.run_files import run_folder, subcommand_of

_PATHS = ("best_model_path", "kth_best_model_path", "last_model_path")  # in ModelCheckpoint's state


class LastCheckpoint(Checkpoint):
    """Writes `last.ckpt` before and after every validation of a fit, and at its end.

    Before, since a fit is most likely to fail while it answers hundreds of notes; after, to include the callbacks'
    scores. `ModelCheckpoint(save_last=True)` writes it only together with a new best checkpoint, so a fit that stops
    improving never writes its last state. Comes after the other callbacks, whose state the file holds.
    """

    def __init__(self) -> None:
        self._saved_at = -1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remove partial files of a process that was killed while writing."""
        folder = run_folder(trainer)
        if trainer.is_global_zero:
            for path in (self._path(folder), folder / "checkpoints" / "best.ckpt", folder / "adapter"):
                remove_partial(path)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Find the best checkpoint again in a run folder that was moved or is spelled differently."""
        # Lightning drops the best score unless the folder's name is the same, letter by letter.
        for callback in trainer.checkpoint_callbacks:
            # Its key names the monitor: a checkpoint of a fit with another one has no state for it.
            state = checkpoint["callbacks"].get(callback.state_key)
            if state and isinstance(callback, ModelCheckpoint) and (Path(str(callback.dirpath)) / "best.ckpt").exists():
                paths = {state[key] for key in _PATHS if state.get(key)} | set(state.get("best_k_models", ()))
                here = {old: str(Path(str(callback.dirpath)) / Path(old).name) for old in paths}
                for key in _PATHS:
                    state[key] = here.get(state.get(key), "")
                state["best_k_models"] = {here[old]: score for old, score in state["best_k_models"].items()}
                state["dirpath"] = callback.dirpath

    # Lightning (2.6.6) counts a step for its loggers after the validation that follows it, and restores that count
    # wrongly in three of four cases: a resumed curve would repeat a step or miss one.

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        """Log a step under its own number."""
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write, but not in the sanity check or in `validate`."""
        if not trainer.sanity_checking and subcommand_of(trainer) == "fit":
            trainer.fit_loop.epoch_loop._batches_that_stepped = max(trainer.global_step - 1, 0)
            self.save(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write again, with the scores."""
        if not trainer.sanity_checking and subcommand_of(trainer) == "fit":
            self.save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write, unless the fit ended with a validation."""
        if self._saved_at != trainer.global_step:
            self.save(trainer)

    def save(self, trainer: L.Trainer) -> None:
        """Write the state after this optimizer step; every process must call this."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        for logger in trainer.loggers:
            logger.save()  # a resumed fit does not log these steps again
        trainer.save_checkpoint(self._path(run_folder(trainer)), weights_only=False)
        self._saved_at = trainer.global_step

    @staticmethod
    def _path(folder: Path) -> Path:
        return folder / "checkpoints" / "last.ckpt"
