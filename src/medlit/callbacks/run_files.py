"""The run folder, and the files that describe a run: settings, split and logs."""

from collections.abc import Mapping
from pathlib import Path

import lightning as L
import pyarrow.parquet as pq
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger

from medlit.atomic_io import atomic_write


class SaveRunFiles(SaveConfigCallback):
    """Writes `config_<subcommand>.yaml` and `split.parquet`, which has ids and hashes of texts but no text.

    They are written once notes are read and weights are loaded: a run that fails before leaves earlier files as they
    are. The split is that of the last fit; another subcommand writes it only where there is none.
    """

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Do nothing yet, unlike Lightning's callback."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write them, but not in the validations of a fit; a table or a single note has no split."""
        verb = trainer.state.fn.value  # type: ignore[union-attr]
        if verb == "fit" and not trainer.training:
            return
        folder = run_folder(trainer)
        if not trainer.is_global_zero:
            return
        with atomic_write(folder / f"config_{verb}.yaml") as path:
            path.write_text(self.parser.dump(self.config, skip_none=False), encoding="utf-8")
        splits = trainer.datamodule.splits  # type: ignore[attr-defined]
        if splits is not None and (verb == "fit" or not (folder / "split.parquet").exists()):
            with atomic_write(folder / "split.parquet") as path:
                pq.write_table(splits.record, path)

    on_validation_start = on_test_start = on_predict_start = on_train_start


class RunLogger(TensorBoardLogger):
    """TensorBoard's logger, whose files lie in the run folder itself."""

    def __init__(self, folder: Path, in_fit: bool) -> None:
        super().__init__(folder.parent.parent, folder.parent.name, folder.name, default_hp_metric=False)
        self._in_fit = in_fit

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log scalars; an evaluation omits the epoch, which would extend the fit's curve of epochs."""
        super().log_metrics({name: value for name, value in metrics.items() if self._in_fit or name != "epoch"}, step)


def run_folder(trainer: L.Trainer) -> Path:
    """The run folder, made if it is missing; every process must call this, since the first one chooses it.

    Only its owner can read it, and it does not depend on the loggers. A trial run (`fast_dev_run`) gets a path alone.
    """
    folder = Path(trainer.strategy.broadcast(trainer.default_root_dir))
    if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder
