"""SpecialtyPredictor: a fine-tuned adapter that files notes from Python, by the road that `medlit predict` takes.

Prompt, truncation, batches, decoders, temperature and number format are the command's own code; only the trainer and
the table are left out. For the same notes, settings and device the two give the same answers.

    from medlit import SpecialtyPredictor  # imports Unsloth, before transformers
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from torch import nn

from medlit.base_model import load_tokenizer
from medlit.data.collate import Collator, unnamed_rows
from medlit.data.labels import LabelSet
from medlit.data.prompt import INSTRUCTION, AlpacaPrompt
from medlit.data.samplers import LengthSortedSampler
from medlit.errors import UserError
from medlit.model import loading
from medlit.model.adapter import adapter_folder, load_adapter
from medlit.model.adapter_metadata import (
    METADATA_FILE,
    AdapterMetadata,
    InferenceSettings,
    check_metadata,
    decoding_key,
)
from medlit.model.decoding import apply_temperature, make_decoder
from medlit.model.language_model import inference_mode
from medlit.model.language_model import at_default_precision
from medlit.model.settings import Decoding, LanguageModel, Lora
from medlit.predictions.asked import Mode, check_settings, device_of, texts_of
from medlit.predictions.columns import rows
from medlit.predictions.prediction import Prediction


class SpecialtyPredictor:
    """Files notes under their specialty; `load` makes one from an adapter.

    >>> from medlit import SpecialtyPredictor
    >>> predictor = SpecialtyPredictor.load("logs/quickstart/version_0")
    >>> found = predictor.predict(["Patient 30 years old, since Monday: the heart races.", "A heart murmur."])
    >>> [one.specialty for one in found]
    ['Cardiovascular / Pulmonary', 'Cardiovascular / Pulmonary']
    >>> all(0 < one.margin <= one.probability <= 1 for one in found)
    True

    Args:
        model: the language model with its adapter, on its device.
        prompt: builds the prompts.
        label_set: the K labels.
        decoding: how the model answers.
        temperature: what log-probabilities are divided by; None leaves them.
        batch_size: most notes of a batch.
        token_budget: most padded tokens of a batch; a single note may pass it.
        device: where the model computes.

    Attributes:
        specialties: the K labels, in alphabetical order.
    """

    def __init__(
        self,
        model: nn.Module,
        prompt: AlpacaPrompt,
        label_set: LabelSet,
        decoding: Decoding,
        *,
        temperature: float | None,
        batch_size: int,
        token_budget: int,
        device: torch.device,
    ) -> None:
        self.specialties = label_set.names
        self._prompt = prompt
        self._label_set = label_set
        self._decoding = decoding
        self._temperature = temperature
        self._batch_size = batch_size
        self._token_budget = token_budget
        self._device = device
        self._collator = Collator(prompt.response, int(prompt.tokenizer.pad_token_id))
        inference_mode(model)
        self._decoder = make_decoder(decoding, model, prompt, label_set)

    @classmethod
    def load(
        cls,
        adapter: str | Path,
        *,
        mode: Mode = "likelihood",
        abstain_below: float | None = None,
        max_new_tokens: int = 32,
        stop_early: bool = True,
        max_length: int | None = None,
        batch_size: int = 32,
        token_budget: int | None = None,
        device: str | torch.device | None = None,
    ) -> SpecialtyPredictor:
        """Load a base model and its adapter.

        What the adapter folder keeps is taken from there: base model and revision, labels, prompt, instruction, limits,
        4-bit weights and number format, and the temperature that a validation found for this way of answering.

        Args:
            adapter: an adapter folder that medlit wrote, a run folder (its best adapter), or a Hub id.
            mode: 'generate' is free greedy generation, which may leave the list of specialties and gives no
                probability; 'constrained' and 'likelihood' stay on it and give one. This and the next five are the
                settings `model.decoding.*` of `medlit predict`.
            abstain_below: withhold the specialty where the answer's probability is below this (0 to 1).
            max_new_tokens: 'generate': most tokens of an answer.
            stop_early: 'generate': end an answer as soon as its label is settled.
            max_length: most tokens of prompt and answer together; None: as in training.
            batch_size: most notes of a batch.
            token_budget: most padded tokens of a batch; None: 8 x max_length.
            device: 'cpu', 'cuda', 'cuda:1'; None: the GPU if there is one.

        Raises:
            UserError: a setting is none, there is no such adapter, or its base model is not to be had.
        """
        decoding = Decoding(mode, max_new_tokens, stop_early, abstain_below)
        check_settings(decoding, max_length, batch_size, token_budget)
        where = device_of(device)
        file = _best_adapter(adapter) / METADATA_FILE
        if not file.is_file():
            raise UserError(
                f"adapter: {file.parent} holds no {METADATA_FILE}, which names the labels; give an adapter that medlit"
                " wrote."
            )
        theirs = AdapterMetadata.read(file)
        inference = theirs.inference or _unkept(file)
        language_model = LanguageModel(
            theirs.base_model,
            theirs.revision,
            max_length or inference.max_length,
            inference.load_in_4bit,
            inference.dtype,
        )
        try:
            lora = Lora(**theirs.lora)
        except TypeError as error:
            raise UserError(f"adapter: {file} is damaged; copy the adapter's folder again.") from error
        instruction = theirs.instruction or INSTRUCTION
        label_set = LabelSet(tuple(theirs.labels))
        # Of what its own file says an adapter can differ in the prompt alone, which is this medlit's.
        ours = AdapterMetadata.of(language_model, lora, label_set, instruction)
        check_metadata(ours, theirs, f"the adapter {file.parent}")
        tokenizer = load_tokenizer(language_model.base_model, language_model.revision)
        prompt = AlpacaPrompt(tokenizer, instruction, language_model.max_length, inference.max_response_tokens)
        model = loading.load_model(language_model, lora, where)
        load_adapter(model, file.parent)  # type: ignore[arg-type]
        return cls(
            model,
            prompt,
            label_set,
            decoding,
            temperature=theirs.temperatures.get(decoding_key(decoding)),
            batch_size=batch_size,
            token_budget=token_budget or 8 * language_model.max_length,
            device=where,
        )

    def predict(self, notes: Iterable[str], *, progress: bool = False) -> list[Prediction]:
        """File notes.

        Notes of like length are answered together, the longest first; what comes back is in the order of `notes`. All
        of them are in memory: for a table of millions there is `medlit predict`.

        Args:
            notes: transcriptions. What does not fit is cut as in training, and counted in `cut_tokens`.
            progress: show a progress bar on standard error.

        Returns:
            One prediction a note; an empty list for none.

        Raises:
            UserError: a note is empty or no text; the others are not answered either.
        """
        prompts = self._prompt.prompts(texts_of(notes))
        asked = unnamed_rows(prompts)
        batches = LengthSortedSampler([len(p.input_ids) for p in prompts], self._batch_size, self._token_budget)
        found: dict[int, Prediction] = {}
        with (
            Tqdm(desc="Predicting", total=len(asked), unit=" notes", disable=not progress) as bar,
            torch.no_grad(),
            at_default_precision(self._device),
        ):
            for batch in batches:
                made = self._collator.prompts([asked[place] for place in batch]).on(self._device)
                answers = apply_temperature(self._decoder(made), self._temperature)
                for row in rows(made, answers, self._label_set, self._decoding.abstain_below):
                    found[row["row"]] = Prediction(**{name: row[name] for name in Prediction.__slots__})
                bar.update(len(batch))
        return [found[place] for place in range(len(asked))]


def _best_adapter(adapter: str | Path) -> Path:
    """The folder of an adapter: as `model.adapter` takes it, or in a run folder."""
    in_run = Path(adapter).expanduser() / "adapter"
    return in_run if (in_run / METADATA_FILE).is_file() else adapter_folder(str(adapter))


def _unkept(file: Path) -> InferenceSettings:
    base = LanguageModel()
    assumed = InferenceSettings(base.max_length, 32, base.load_in_4bit, base.dtype)
    warnings.warn(
        f"{file} does not hold max_length, load_in_4bit and dtype; assuming {assumed.max_length} tokens,"
        f" {'4-bit weights' if assumed.load_in_4bit else 'weights as stored'} and {assumed.dtype!r}; if the adapter was"
        " trained with another limit, give max_length.",
        stacklevel=3,
    )
    return assumed
