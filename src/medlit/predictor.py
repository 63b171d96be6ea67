"""SpecialtyPredictor: classify notes from Python, as `medlit predict` does.

Prompt, truncation, batches, decoders, temperature and number format are the command's own code; only the trainer and
the table are left out. For the same notes, settings and device the two give the same answers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import torch
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from torch import nn

from medlit.base_model import load_tokenizer
from medlit.data.collate import Collator, unnamed_rows
from medlit.data.labels import LabelSet
from medlit.data.notes import clean_note
from medlit.data.prompt import INSTRUCTION, PROMPTS, NotePrompt
from medlit.data.samplers import length_sorted_batches
from medlit.errors import UserError
from medlit.model.adapter import adapter_folder, load_adapter
from medlit.model.adapter_metadata import METADATA_FILE, AdapterMetadata, check_metadata, read_fitted
from medlit.model.decoding import apply_temperature, make_decoder
from medlit.model.language_model import at_default_precision, inference_mode
from medlit.model.loading import load_model
from medlit.model.prior import PRIOR_FILE, TokenPrior
from medlit.model.settings import Decoding, LanguageModel, Lora, Mode, check_decoding
from medlit.predictions.table import Prediction, make_predictions


@dataclass(repr=False, eq=False)
class SpecialtyPredictor:
    """Classifies notes by specialty; `load` makes one from an adapter.

    >>> from medlit import SpecialtyPredictor
    >>> predictor = SpecialtyPredictor.load("logs/quickstart/version_0")
    >>> predictions = predictor.predict(["Patient 30 years old, since Monday: the heart races.", "A heart murmur."])
    >>> [prediction.specialty for prediction in predictions]
    ['Cardiovascular / Pulmonary', 'Cardiovascular / Pulmonary']
    >>> all(0 < prediction.margin <= prediction.probability <= 1 for prediction in predictions)
    True

    Attributes:
        specialties: the K labels, in alphabetical order.
        decoder: answers a batch of prompts.
    """

    _model: nn.Module
    _prompt: NotePrompt
    _label_set: LabelSet
    _decoding: Decoding
    _fitted: tuple[float | None, float | None, TokenPrior | None]  # temperature, threshold of sets, prior
    _batch_size: int
    _token_budget: int
    _device: torch.device

    def __post_init__(self) -> None:
        self.specialties = self._label_set.names
        self._collator = Collator(self._prompt.response, int(self._prompt.tokenizer.pad_token_id))
        inference_mode(self._model)
        self.decoder = make_decoder(self._decoding, self._model, self._prompt, self._label_set, self._fitted[2])

    @classmethod
    def load(
        cls,
        adapter: str | Path,
        *,
        mode: Mode = "likelihood",
        abstain_below: float | None = None,
        coverage: float | None = None,
        answer: Literal["one", "set"] = "one",
        max_new_tokens: int = 32,
        stop_early: bool = True,
        max_length: int | None = None,
        batch_size: int = 32,
        token_budget: int | None = None,
        device: str | torch.device | None = None,
    ) -> Self:
        """Load a base model and its adapter.

        The adapter's metadata has base model and revision, labels, prompt, instruction, length limits, 4-bit weights
        and number format, and the temperature that `medlit validate` fitted for this way of decoding. If the adapter
        has a prior, it is used.

        Args:
            adapter: an adapter folder that medlit wrote, a run folder (its best adapter), or a Hub id.
            mode: 'generate' is free greedy generation, which may answer something that is no specialty and gives no
                probability; 'constrained' and 'likelihood' answer with a specialty and give one. This and the next
                five are the settings `model.decoding.*` of `medlit predict`.
            abstain_below: withhold the specialty where the answer's probability is below this (0 to 1).
            coverage: make sets with this coverage, and return `SetPrediction`s.
            answer: 'set' makes sets too; without a coverage, with the threshold of the highest micro F1 in validation.
            max_new_tokens: 'generate': maximum number of tokens in an answer.
            stop_early: 'generate': stop as soon as no continuation can change the label.
            max_length: maximum number of tokens in prompt and answer together; None: as in training.
            batch_size: maximum number of notes in a batch.
            token_budget: maximum number of padded tokens in a batch; None: 8 x max_length.
            device: 'cpu', 'cuda', 'cuda:1'; None: the GPU if there is one.

        Raises:
            UserError: a setting is invalid, there is no such adapter, or its base model is not available.
        """
        decoding = Decoding(mode, max_new_tokens, stop_early, abstain_below, coverage, answer)
        _check_settings(decoding, max_length, batch_size, token_budget)
        target = _find_device(device)
        file = Path(adapter).expanduser() / "adapter" / METADATA_FILE
        if not file.is_file():
            file = adapter_folder(str(adapter)) / METADATA_FILE
        if not file.is_file():
            raise UserError(f"adapter: {file.parent} has no {METADATA_FILE}; give an adapter that medlit wrote.")
        metadata = AdapterMetadata.read(file)
        if (inference := metadata.inference) is None:
            raise UserError(f"adapter: {file} lacks max_length and other limits; use `medlit predict` with its config.")
        length, bits = max_length or inference.max_length, (inference.load_in_4bit, inference.load_in_fp8)
        language_model = LanguageModel(metadata.base_model, metadata.revision, length, *bits, inference.dtype)
        language_model.prompt_format = metadata.prompt_format
        try:
            lora = Lora(**metadata.lora)
        except TypeError as error:
            raise UserError(f"adapter: {file} is damaged; copy the adapter's folder again.") from error
        instruction = metadata.instruction or INSTRUCTION
        label_set = LabelSet(tuple(metadata.labels))
        # All but the prompt's version comes from the metadata itself.
        ours = AdapterMetadata.of(language_model, lora, label_set, instruction)
        check_metadata(ours, metadata, f"the adapter {file.parent}")
        tokenizer = load_tokenizer(language_model.base_model, language_model.revision)
        prompt = PROMPTS[metadata.prompt_format](tokenizer, instruction, length, inference.max_response_tokens)
        prompt.prompt("")  # refuses a limit without room for a note before the weights are read
        decoding.prior = "tfidf" if file.with_name(PRIOR_FILE).is_file() else None
        temperature, thresholds, prior = read_fitted(None, file.parent, decoding, complete=True)
        model = load_model(language_model, lora, target)
        load_adapter(model, file.parent)  # type: ignore[arg-type]
        budget, fitted = token_budget or 8 * length, (temperature, thresholds.get(decoding.sets), prior)
        return cls(model, prompt, label_set, decoding, fitted, batch_size, budget, target)

    def predict(
        self, notes: "Sequence[str] | npt.NDArray[Any] | pd.Series[Any]", *, progress: bool = False
    ) -> list[Prediction]:
        """Classify notes.

        Notes of similar length are batched together, the longest first; predictions are in the order of `notes`. All of
        them are in memory: for a table of millions use `medlit predict`.

        Args:
            notes: transcriptions: a list or tuple, or a column of pandas, NumPy, `datasets` or pyarrow. A note that is
                too long is cut as in training, and counted in `cut_tokens`.
            progress: show a progress bar on standard error.

        Returns:
            One prediction per note.

        Raises:
            UserError: `notes` is something else, or a note is empty or no text; then none is classified.
        """
        rows = unnamed_rows(self._prompt.prompts(_clean_notes(notes)))
        batches = length_sorted_batches([len(row["input_ids"]) for row in rows], self._batch_size, self._token_budget)
        predictions: dict[int, Prediction] = {}
        temperature, threshold, _ = self._fitted
        with (
            Tqdm(desc="Predicting", total=len(rows), unit=" notes", disable=not progress) as bar,
            torch.no_grad(),
            at_default_precision(self._model),
        ):
            for batch in batches:
                prompts = self._collator.prompts([rows[i] for i in batch]).on(self._device)
                answers = apply_temperature(self.decoder(prompts), temperature)
                made = make_predictions(prompts, answers, self._label_set, self._decoding.abstain_below, threshold)
                predictions.update(zip(batch, made, strict=True))
                bar.update(len(batch))
        return [predictions[i] for i in range(len(rows))]


def _clean_notes(notes: Any) -> list[str]:  # noqa: ANN401 - what a user passes
    """The notes as they would be read from a table."""
    if isinstance(notes, pa.Array | pa.ChunkedArray):
        notes = notes.to_pylist()
    is_column = isinstance(notes, pd.Series) or (isinstance(notes, np.ndarray) and notes.ndim == 1)
    # Iterating over a table yields the names of its columns, over a file its lines.
    if not is_column and (not isinstance(notes, Sequence) or isinstance(notes, str | bytes | bytearray)):
        raise UserError(
            f"notes: give a list of texts or a column, such as list(table['transcription']), not"
            f" {type(notes).__name__}; for a single note [text]."
        )
    for i, note in enumerate(notes):
        if not isinstance(note, str):
            given = type(note).__name__
            raise UserError(f"notes[{i}]: must be a text, not {given}; give the note's text or leave it out.")
        if not clean_note(note):
            raise UserError(f"notes[{i}]: the note is empty; leave it out or fill it in.")
    return [clean_note(note) for note in notes]


def _check_settings(decoding: Decoding, max_length: int | None, batch_size: int, token_budget: int | None) -> None:
    """Check what the types and `cli/validation.py` check for the command."""
    for name, given, allowed in (("mode", decoding.mode, get_args(Mode)), ("answer", decoding.answer, ("one", "set"))):
        if given not in allowed:
            raise UserError(f"{name}: must be one of {', '.join(allowed)}, not {given!r}.")
    check_decoding(decoding)
    counts = {"max_new_tokens": decoding.max_new_tokens, "max_length": max_length, "batch_size": batch_size}
    for name, count in (counts | {"token_budget": token_budget}).items():
        if count is not None and count < 1:
            raise UserError(f"{name}: must be at least 1, not {count}.")


def _find_device(device: str | torch.device | None) -> torch.device:
    """The device to compute on; None is the GPU if there is one."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    name = str(device or ("cuda" if count else "cpu"))
    name = "cuda:0" if name == "cuda" else name
    if name not in ("cpu", *(f"cuda:{index}" for index in range(count))):
        raise UserError(f"device: {device} is neither 'cpu' nor one of PyTorch's {count} GPUs; correct it or omit it.")
    return torch.device(name)
