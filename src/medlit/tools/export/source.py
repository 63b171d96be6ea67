"""What is exported, and what medlit's own model says of the notes that the export is compared on."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from torch import nn

from medlit.atomic_io import write_json
from medlit.base_model import BUILTIN
from medlit.data.collate import BatchDataset
from medlit.data.data_fingerprint import DataFingerprint
from medlit.data.datamodule import TranscriptionDataModule
from medlit.data.labels import LabelSet
from medlit.data.tokenise import tokenise
from medlit.errors import UserError
from medlit.evaluation.results import FloatArray
from medlit.model import adapter as adapters
from medlit.model import language_model as language_model
from medlit.model import loading
from medlit.model.adapter_metadata import LABELS_FILE, AdapterMetadata, check_metadata
from medlit.model.checkpoints import read_checkpoint
from medlit.model.conditions import KEY, Conditions
from medlit.model.decoding import LabelScorer, Likelihood
from medlit.model.decoding.trie import TokenTrie
from medlit.model.language_model import at_default_precision
from medlit.model.settings import LanguageModel, Lora
from medlit.model.temperature import metadata_of_weights
from medlit.run_folder import resolve_checkpoint, run_name, run_of

# A repository of the Hub; what ends like a table is a file, wherever it may lie.
_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+", re.ASCII)
_TABLES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
# Where the bundled weights were published.
_PUBLISHED = {BUILTIN: "HuggingFaceTB/SmolLM2-135M-Instruct"}
_BATCH = 8  # notes that medlit's model answers together
_SECTIONS = ("seed_everything", "data", "model")


@dataclass(frozen=True)
class Weights:
    """Trained weights on the disk, read and checked; no model is loaded yet.

    Attributes:
        language_model: the base model.
        lora: the adapter's shape.
        structure: what the weights say of themselves.
        data_fingerprint: the notes that they were trained with, where they say so.
        run: their run folder, where they lie in one.
        name: as a message names them.
        file: the checkpoint's or the folder's own name.
        state: parameter -> value out of a checkpoint; None where they are an adapter folder.
        conditions: under which they were trained.
        folder: the adapter folder; None where they are a checkpoint.
    """

    language_model: LanguageModel
    lora: Lora
    structure: AdapterMetadata
    data_fingerprint: DataFingerprint | None
    run: Path | None
    name: str
    file: str
    state: dict[str, torch.Tensor] | None
    folder: Path | None
    conditions: Conditions

    def load(self, device: torch.device) -> nn.Module:
        """The model as medlit's verbs have it, ready to answer.

        Raises:
            UserError: there is no such base model, or the weights do not fit it.
        """
        model = loading.load(self.language_model, self.lora, device)
        if self.folder is not None:
            adapters.load_adapter(model, self.folder)  # type: ignore[arg-type]
        if self.state is not None:
            if self.state.keys() != language_model.trainable_names(model):
                raise UserError(f"ckpt_path: the weights in {self.name} are not those that this config trains.")
            model.load_state_dict(self.state, strict=False)
        language_model.answer_mode(model)
        return model

    def describe(self, folder: Path, *, whole: bool = False) -> None:
        """Write what medlit has to know of them; of a file's path the name alone.

        Args:
            folder: of the export.
            whole: whether the base model's weights lie in it too, so that nobody has to find them.
        """
        notes = None if self.data_fingerprint is None else self.data_fingerprint.to_dict()
        if notes is not None:
            notes["source"] = shown(notes["source"])
        content = self.structure.to_dict() | {"data": notes, KEY: self.conditions.to_dict()}
        if whole:
            content["base_model"] = shown(content["base_model"])
        write_json(folder / LABELS_FILE, content)


def shown(source: str) -> str:
    """A data source or model as others may see it: a Hub id, or the last part of a path."""
    path = Path(source).expanduser()
    on_hub = _HUB_ID.fullmatch(source) and not path.exists() and not source.lower().endswith(_TABLES)
    return source if on_hub else path.name


def published(base_model: str) -> str:
    """The name under which others can have a base model."""
    return _PUBLISHED.get(base_model, base_model)


def recorded(run: Path) -> list[str]:
    """The settings of a run's fit, as an argument to lay flags over.

    Raises:
        UserError: the run has none.
    """
    file = run / "config_fit.yaml"
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
        kept = {name: values[name] for name in _SECTIONS if name in values}
        kept["model"].pop("adapter", None)  # what the fit started from
        kept["trainer"] = {"accelerator": values["trainer"]["accelerator"]}
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"run: {file} is missing or damaged; give the settings of the fit with --config.") from error
    return ["--config", json.dumps(kept)]


def find_weights(config: Any, ckpt_path: str | None, run: Path | None) -> Weights:  # noqa: ANN401 - jsonargparse's
    """Read the weights that are to be exported.

    Args:
        config: settings of a verb.
        ckpt_path: 'best', 'last', a path, or None.
        run: where to look for them.

    Raises:
        UserError: there are none, or they are of another model than the config's.
    """
    language_model, lora = LanguageModel(**config.model.language_model.as_dict()), Lora(**config.model.lora.as_dict())
    conditions = Conditions.of(language_model, config.data.max_response_tokens)
    ours = AdapterMetadata.of(
        language_model, lora, LabelSet(()), instruction=config.data.instruction, keep=config.data.keep
    )
    if ckpt_path is None and config.model.adapter not in (None, "none"):
        folder = adapters.adapter_folder(config.model.adapter)
        file = folder / LABELS_FILE
        if not file.is_file():
            raise UserError(f"model.adapter: {folder} holds no {LABELS_FILE}; give an adapter that medlit trained.")
        theirs, name = AdapterMetadata.read(file), f"the adapter {folder}"
        check_metadata(ours, theirs, name)
        beside = folder.parent if (folder.parent / "config_fit.yaml").is_file() else None
        return Weights(
            language_model,
            lora,
            theirs,
            DataFingerprint.read(file),
            run or beside,
            name,
            folder.name,
            None,
            folder,
            conditions,
        )
    root, named = Path(config.trainer.default_root_dir), run_name([str(path) for path in config.config or []])
    path = resolve_checkpoint(ckpt_path or "best", root, named, run)
    checkpoint = read_checkpoint(path)
    theirs, name = AdapterMetadata.from_dict(checkpoint.get("medlit")), f"the checkpoint {path}"
    check_metadata(ours, theirs, name)
    if (kept := metadata_of_weights(path, None)) is not None:
        theirs.temperatures.update(AdapterMetadata.read(kept).temperatures)
    notes = DataFingerprint.from_dict(checkpoint.get(TranscriptionDataModule.__qualname__, {}).get("notes"))
    state = {key.removeprefix("model."): value for key, value in checkpoint["state_dict"].items()}
    return Weights(language_model, lora, theirs, notes, run or run_of(path), name, path.name, state, None, conditions)


@dataclass(frozen=True)
class Questions:
    """N notes to answer, as tokens, and the K specialties.

    Attributes:
        split: the split that they are of.
        ids: the notes' ids, N of them.
        prompts: token ids, N of them.
        answers: token ids of each specialty with their EOS, K of them.
        texts: what an exported tokenizer must cut as the base model's does: the specialties and the instruction.
        tokens: token ids of each text.
        nats: medlit's log-likelihood of each answer, (N, K).
    """

    split: str
    ids: list[str]
    prompts: list[list[int]]
    answers: list[list[int]]
    texts: list[str]
    tokens: list[list[int]]
    nats: FloatArray


def ask(model: nn.Module, data: TranscriptionDataModule, labels: LabelSet, count: int) -> Questions:
    """Let medlit's own model weigh the specialties for notes spread evenly over the test split, or validation.

    Raises:
        UserError: the notes cannot be read, or there are neither test nor validation notes.
    """
    notes = data.split().notes
    split = next((name for name in ("test", "validation") if name in notes), None)
    if split is None:
        raise UserError(
            f"data.source: {data.source} has neither test nor validation notes to compare the export on; name other"
            " notes, such as 'builtin', or set data.split to 'grouped'."
        )
    chosen = np.unique(np.linspace(0, len(notes[split]) - 1, min(count, len(notes[split]))).astype(int))
    rows = tokenise(notes[split].select(chosen), data.prompt, cached=False)
    answers = [data.prompt.response(name) for name in labels]
    decoder = Likelihood(LabelScorer(model, TokenTrie.of(answers)), labels)
    batches = BatchDataset(rows, data.collator.prompts)
    device = language_model.causal_lm(model).device
    nats = []
    with Tqdm(desc="Weighing", total=len(rows), unit=" notes", leave=False, disable=None) as bar:
        for start in range(0, len(rows), _BATCH):
            places = list(range(start, min(start + _BATCH, len(rows))))
            made: Any = batches[places]
            with torch.no_grad(), at_default_precision(device):
                told = decoder(made.on(device)).label_nats
            assert told is not None
            nats.append(told.double().numpy())
            bar.update(len(places))
    texts = [*labels, data.instruction]
    tokenizer = data.prompt.tokenizer
    tokens = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    return Questions(split, rows["id"][:], rows["input_ids"][:], answers, texts, tokens, np.concatenate(nats))
