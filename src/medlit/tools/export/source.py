"""The weights that are exported, and what medlit's own model answers for the notes that verify the export."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from torch.utils.data import BatchSampler

from medlit.data.collate import BatchDataset
from medlit.data.datamodule import TranscriptionDataModule
from medlit.data.labels import LabelSet
from medlit.data.splits import DataFingerprint
from medlit.data.tokenise import tokenise
from medlit.errors import UserError
from medlit.model.adapter import adapter_folder, load_adapter
from medlit.model.adapter_metadata import METADATA_FILE, AdapterMetadata, check_metadata, metadata_of_weights
from medlit.model.checkpoints import read_checkpoint
from medlit.model.decoding import make_decoder
from medlit.model.families import causal_lm
from medlit.model.language_model import at_default_precision, inference_mode, trainable_names
from medlit.model.loading import load_model
from medlit.model.prior import PRIOR_FILE
from medlit.model.settings import Decoding, LanguageModel, Lora
from medlit.run_folder import resolve_checkpoint, run_name, run_of
from medlit.tools.export.verify import Reference

_BATCH = 8  # notes that medlit's model answers together
FIT_CONFIG = "config_fit.yaml"


@dataclass(frozen=True)
class Weights:
    """Trained weights on disk, read and checked; no model is loaded yet."""

    language_model: LanguageModel
    lora: Lora
    metadata: AdapterMetadata  # with this config's inference settings
    path: Path  # a checkpoint or an adapter folder
    state: dict[str, torch.Tensor] | None  # of a checkpoint: parameter -> value
    run: Path | None  # the run folder that they are in
    prior: Path | None  # the file of the TF-IDF prior that belongs to them

    @property
    def merged_into(self) -> str:
        """What a merge adds the adapter to, in words."""
        bits = "16-bit, rounded to FP8" if self.language_model.load_in_fp8 else "16-bit"
        bits = "4-bit, dequantised to 16 bits" if self.language_model.load_in_4bit else bits
        return f"the weights that it was trained on ({bits})"

    def load(self, device: torch.device) -> PeftModel:
        """Load the model in inference mode, as medlit's commands do."""
        model: Any = load_model(replace(self.language_model, offload="none"), self.lora, device)  # to be merged
        if self.state is None:
            load_adapter(model, self.path)
        elif self.state.keys() == trainable_names(model):
            model.load_state_dict(self.state, strict=False)
        else:
            raise UserError(f"ckpt_path: this config trains other weights than {self.path}; give that of the fit.")
        inference_mode(model)
        return model  # type: ignore[no-any-return]


def run_of_adapter(adapter: str | None) -> Path | None:
    """The run folder that an adapter folder is in, or None."""
    return Path(adapter).parent if adapter and (Path(adapter).parent / FIT_CONFIG).is_file() else None


def find_weights(config: Any, ckpt_path: str | None, run: Path | None) -> Weights:  # noqa: ANN401 - jsonargparse's
    """Read the weights to export: the config's adapter or the checkpoint (best, last or a path), of `run` if given."""
    language_model = LanguageModel(**config.model.language_model.as_dict())
    lora = None if config.model.lora is None else Lora(**config.model.lora.as_dict())
    data = config.data
    ours = AdapterMetadata.of(language_model, lora, LabelSet(()), data.instruction, data.max_response_tokens)
    if ckpt_path is None and config.model.adapter is not None:
        path = adapter_folder(config.model.adapter)
        if (adapter_file := metadata_of_weights(None, str(path))) is None:
            raise UserError(f"model.adapter: {path} holds no {METADATA_FILE}; give an adapter that medlit trained.")
        theirs, source, state = AdapterMetadata.read(adapter_file), f"the adapter {path}", None
        run = run or run_of_adapter(str(path))
    else:
        root, name = Path(config.trainer.default_root_dir), run_name([str(path) for path in config.config or []])
        path = resolve_checkpoint(ckpt_path or "best", root, name, run)
        checkpoint, source = read_checkpoint(path), f"the checkpoint {path}"
        notes = checkpoint.get(TranscriptionDataModule.__qualname__, {}).get("notes")
        theirs = replace(AdapterMetadata.from_dict(checkpoint.get("medlit")), data=DataFingerprint.from_dict(notes))
        if (adapter_file := metadata_of_weights(path, None)) is not None:
            fitted = AdapterMetadata.read(adapter_file)
            theirs = replace(theirs, temperatures=fitted.temperatures, thresholds=fitted.thresholds)
        state = {key.removeprefix("model."): value for key, value in checkpoint["state_dict"].items()}
        run = run or run_of(path)
    check_metadata(ours, theirs, source)
    assert lora is not None  # check_metadata refuses the bare base model
    prior = None if adapter_file is None else adapter_file.with_name(PRIOR_FILE)
    prior = prior if prior is not None and prior.is_file() else None
    return Weights(language_model, lora, replace(theirs, inference=ours.inference), path, state, run, prior)


def reference_notes(data: TranscriptionDataModule, count: int) -> tuple[str, Dataset]:
    """Tokenise `count` notes spread over the test split (else validation); returns the split's name and the notes."""
    notes = data.read_splits().notes
    split = next((name for name in ("test", "validation") if name in notes), None)
    if split is None:
        raise UserError(
            f"data.source: {data.source} has neither test nor validation notes to verify the export with; name other"
            " notes, such as 'builtin', or set data.split.kind to 'grouped'."
        )
    chosen = np.unique(np.linspace(0, len(notes[split]) - 1, min(count, len(notes[split]))).astype(int))
    return split, tokenise(notes[split].select(chosen), data.prompt, cached=False)


def reference_answers(model: nn.Module, data: TranscriptionDataModule, labels: list[str], rows: Dataset) -> Reference:
    """Score the labels with medlit's own model, for tokenised notes."""
    notes, device = BatchDataset(rows, data.collator.prompts), causal_lm(model).device
    decoder = make_decoder(Decoding(mode="likelihood"), model, data.prompt, LabelSet(tuple(labels)))
    batches = BatchSampler(range(len(rows)), _BATCH, drop_last=False)
    with torch.no_grad(), at_default_precision(model):
        nats: Any = [decoder(notes[batch].on(device)).label_nats for batch in batches]
    answers, texts = [data.prompt.response(name) for name in labels], [*labels, data.instruction]
    tokens = [data.prompt.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    return Reference(rows["id"][:], rows["input_ids"][:], answers, texts, tokens, torch.cat(nats).double().numpy())
