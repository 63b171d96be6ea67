"""The adapter of a run: the best one as a folder, its temperature, and the labels and notes that it belongs to."""

import errno
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors import SafetensorError

from medlit.atomic_io import atomic_dir
from medlit.callbacks.run_files import run_folder
from medlit.data.datamodule import TranscriptionDataModule
from medlit.data.splits import DataFingerprint
from medlit.errors import UserError, tell
from medlit.evaluation.results import FloatArray
from medlit.evaluation.sets import calibrate
from medlit.model.adapter import adapter_folder, save_adapter
from medlit.model.adapter_metadata import METADATA_FILE, AdapterMetadata, metadata_of_weights, write_fitted
from medlit.model.module import SpecialtyClassifier
from medlit.model.prior import PRIOR_FILE, TokenPrior


class BestCheckpoint(ModelCheckpoint):
    """Writes `adapter/`, and then `best.ckpt`, whenever a validation of a fit is better than all before it."""

    # The prior and its log-probabilities of the validation notes; None before it is fitted, False where none can be.
    _prior: tuple[TokenPrior, FloatArray] | Literal[False] | None = None

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        folder, module = run_folder(trainer), trainer.lightning_module
        if trainer.is_global_zero and isinstance(module, SpecialtyClassifier):
            data: TranscriptionDataModule = trainer.datamodule  # type: ignore[attr-defined]
            results, prior = module.results, None
            if results is not None and (fitted_prior := self._fit_prior(module, data)) is not None:
                prior, results = fitted_prior[0].with_power(results, fitted_prior[1])
            write_adapter(module, folder / "adapter", data.fingerprint, prior)
            notes, fits = len(data.rows("validation")), module.decoding.sets or prior is not None
            if fits and results is not None and results.probabilities is not None and len(results) == notes:
                fitted = calibrate(results, module.decoding.coverage, prior.power if prior else 1.0)
                write_fitted(folder / "adapter" / METADATA_FILE, module.decoding, *fitted)
        super()._save_checkpoint(trainer, filepath)

    def _fit_prior(
        self, module: SpecialtyClassifier, data: TranscriptionDataModule
    ) -> tuple[TokenPrior, FloatArray] | None:
        """The prior that the settings ask for, fitted once; None where the answers or the notes allow none."""
        if module.decoding.uses_prior and self._prior is None:
            prior = TokenPrior.fit(data.rows("train"), module.label_set)
            self._prior = prior is not None and (prior, prior.of_rows(data.rows("validation")))
            if prior is None:
                tell("model.decoding.prior: none is fitted, as the training notes have one label or share no token")
        return self._prior or None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Find the best checkpoint again in a run folder that was moved or is spelled differently."""
        best, score = Path(str(self.dirpath)) / "best.ckpt", state_dict["best_model_score"]
        if best.exists() and score is not None:  # Lightning drops the score if a letter of the folder's name differs
            here = dict.fromkeys(("best_model_path", "kth_best_model_path"), str(best))
            state_dict = state_dict | here | {"dirpath": self.dirpath, "best_k_models": {str(best): score}}
        super().load_state_dict(state_dict)


class AdapterTemperature(L.Callback):
    """Adds what `medlit validate` fitted to the adapter, if all of the adapter's validation notes were answered.

    Comes after `RunReport`, so a read-only adapter does not cost the validation's metrics.
    """

    def on_validation_end(self, trainer: L.Trainer, pl_module: SpecialtyClassifier) -> None:  # type: ignore[override]
        """Write it, on the first process, or report why not."""
        is_trial = trainer.fast_dev_run  # type: ignore[attr-defined]
        if is_trial or trainer.state.fn != "validate" or not trainer.is_global_zero:
            return
        file = metadata_of_weights(trainer.ckpt_path, pl_module.adapter)
        if pl_module.temperature is None or file is None:
            return
        try:
            data, trained_with = trainer.datamodule, AdapterMetadata.read(file).data  # type: ignore[attr-defined]
            if data.fingerprint is None or trained_with is None:
                raise UserError(f"{file} does not say which notes the adapter was trained with.")
            if data.fingerprint.hashes.get("validation") != trained_with.hashes.get("validation"):
                raise UserError(f"{file} comes from other validation notes.")
            if pl_module.results is None or len(pl_module.results) < len(data.rows("validation")):
                raise UserError("only a part of the validation split was answered.")
            write_fitted(file, pl_module.decoding, pl_module.temperature, pl_module.thresholds)
            value, n = pl_module.temperature, len(pl_module.results)
            doubt = f" to {n} notes" * (n < 30) + ", no answer being wrong," * bool(pl_module.results.correct.all())
            what = f"temperature {value:.2f} fitted{doubt} for '{pl_module.decoding.mode}'"
            tell(f"{what} and stored in {file}; later answers use it")
        except UserError as error:
            tell(f"the temperature of this validation is not kept with the adapter: {error}")


def write_adapter(
    module: SpecialtyClassifier, folder: Path, data: DataFingerprint | None, prior: TokenPrior | None = None
) -> None:
    """Write an adapter folder, each of whose files appears whole; raises as `atomic_dir` does."""
    with atomic_dir(folder) as partial:
        try:
            save_adapter(module.model, module.tokenizer, replace(module.metadata, data=data), partial)  # type: ignore[arg-type]
            if prior is not None:
                prior.save(partial / PRIOR_FILE)
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))
            raise OSError(int(number[1]) if number else errno.EIO, str(error)) from error


class DataLink(L.Callback):
    """Gives the module the labels of the data; warns of notes that are cut, and where the adapter has other notes.

    Lightning sets up the datamodule, then the callbacks, then the module.
    """

    def setup(self, trainer: L.Trainer, pl_module: SpecialtyClassifier, stage: str) -> None:  # type: ignore[override]
        """Link the two; a source without labels leaves them to the weights."""
        data: TranscriptionDataModule = trainer.datamodule  # type: ignore[attr-defined]
        if data.label_set is not None:
            pl_module.label_set = data.label_set
        tables = [data.predict_rows] if stage == "predict" else [data.rows(name) for name in data.read_splits().notes]
        cut = [tokens > 0 for rows in tables for tokens in rows["cut_tokens"][:]]
        if sum(cut) * 10 > len(cut):
            what = f"{sum(cut) / len(cut):.0%} of the notes are cut to {data.prompt.room} tokens"
            tell(f"{what}; a larger model.language_model.max_length keeps more of them")
        if pl_module.adapter is not None and stage != "fit" and data.fingerprint is not None:
            file = adapter_folder(pl_module.adapter) / METADATA_FILE
            if file.is_file():
                theirs = AdapterMetadata.read(file).data
                data.mismatch = data.fingerprint.warn_if_different(theirs, f"the adapter {file.parent}")
