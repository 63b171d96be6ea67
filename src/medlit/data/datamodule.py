"""TranscriptionDataModule: from `data.source` to batches of token ids."""

from dataclasses import asdict
from functools import cached_property
from typing import Any

import lightning as L
import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from medlit.base_model import PACKING_FAMILIES, load_tokenizer, read_config
from medlit.data.collate import Batch, BatchDataset, Collate, Collator, EvalBatch, Prompts
from medlit.data.labels import LabelSet
from medlit.data.notes import load_source, read_predict_notes
from medlit.data.prompt import INSTRUCTION, PROMPTS, NotePrompt, PromptFormat
from medlit.data.samplers import StepSampler, length_sorted_batches
from medlit.data.settings import Batching, Columns, LabelConflicts, Labels, Predict, Split, Tokenizer
from medlit.data.sources import SPLITS, commit_of
from medlit.data.splits import DataFingerprint, NoteSplits, split_notes
from medlit.data.tokenise import tokenise
from medlit.errors import UserError
from medlit.number_types import PositiveInt

_LOADERS = {"fit": ("val", "train"), "validate": ("val",), "test": ("test",)}  # of a stage; few notes lack "val"


class TranscriptionDataModule(L.LightningDataModule):
    """Reads notes, splits them, puts each into a prompt and batches the token ids.

    Args:
        source: where the notes are: 'builtin' (invented notes), a CSV, TSV, JSON, JSONL (also compressed), Parquet or
            Excel file, a folder with one file per split, a glob, or the id of a Hub dataset, with ':' and a
            configuration if it has several.
        revision: commit, tag or branch of a Hub dataset.
        columns: names of the columns.
        labels: how labels are spelled and which are used.
        label_conflicts: what to do with a text whose rows have different labels: 'keep' or 'drop' the rows, give them
            the 'majority' label, or 'merge' them into one note with all labels.
        split: how notes are divided into train, validation and test.
        instruction: the instruction of the prompt.
        prompt_format: 'alpaca', or 'chat': the base model's own chat template, without thinking.
        mask_prompt: compute the loss on the answer alone; false: on prompt and note too.
        max_response_tokens: tokens of model.language_model.max_length that are reserved for the answer.
        batching: how notes are put into batches.
        predict: what `medlit predict` classifies.

    Attributes:
        tokenizer: that of the base model; set it before the first use of the prompt.
        answered: whether an interrupted run has answered each of the notes to classify, (N,); these are left out.
    """

    def __init__(
        self,
        source: str = "builtin",
        revision: str | None = None,
        columns: Columns = Columns(),  # noqa: B008 - defaults that the command line can show
        labels: Labels = Labels(),  # noqa: B008
        label_conflicts: LabelConflicts = "keep",
        split: Split = Split(),  # noqa: B008
        instruction: str = INSTRUCTION,
        prompt_format: PromptFormat = "alpaca",
        mask_prompt: bool = True,
        max_response_tokens: PositiveInt = 32,
        batching: Batching = Batching(),  # noqa: B008
        predict: Predict = Predict(),  # noqa: B008
    ) -> None:
        super().__init__()
        self.source = source
        self.revision = revision
        self.columns = columns
        self.labels = labels
        self.label_conflicts: LabelConflicts = label_conflicts
        self.split = split
        self.instruction = instruction
        self.prompt_format: PromptFormat = prompt_format
        self.mask_prompt = mask_prompt
        self.max_response_tokens = max_response_tokens
        self.batching = batching
        self.predict = predict
        self.tokenizer = Tokenizer()
        self.label_set: LabelSet | None = None  # of the training split; these three once the source is read
        self.splits: NoteSplits | None = None
        self.fingerprint: DataFingerprint | None = None
        self.mismatch: str | None = None  # how these splits differ from those that the weights were trained with
        self._tokenised: dict[str, Dataset] = {}
        self._predict_rows: Dataset | None = None
        self.answered: np.ndarray | None = None
        self._trained_steps = 0

    @cached_property
    def prompt(self) -> NotePrompt:
        """The prompt; its tokenizer is loaded on first use."""
        of = self.tokenizer
        tokenizer = load_tokenizer(of.base_model, of.revision)
        return PROMPTS[self.prompt_format](tokenizer, self.instruction, of.max_length, self.max_response_tokens)

    @cached_property
    def collator(self) -> Collator:
        """Turns notes into batches."""
        names = () if self.label_set is None else self.label_set.names
        pad_id = int(self.prompt.tokenizer.pad_token_id)
        return Collator(self.prompt.response, pad_id, self.mask_prompt, names, self.batching.global_batch_size)

    @property
    def token_budget(self) -> int:
        """Maximum number of tokens in a batch on one device, padding included."""
        return self.batching.token_budget or self.batching.micro_batch_size * self.tokenizer.max_length

    def prepare_data(self) -> None:
        """Fill the caches, once per machine."""
        self.setup(self.trainer.state.fn if self.trainer else None)

    def setup(self, stage: str | None) -> None:
        """Read, split and tokenise what the stage needs; a UserError if source, columns or labels cannot be used."""
        if stage == "predict" and (self.predict.text is not None or self.predict.source not in SPLITS):
            if self._predict_rows is None:
                rows = read_predict_notes(self.predict, self.columns, self.labels)
                self._predict_rows = tokenise(rows, self.prompt, cached=self.predict.text is None)
        elif not self._tokenised:
            self._tokenised = {name: tokenise(rows, self.prompt) for name, rows in self.read_splits().notes.items()}
            if self.trainer and stage in _LOADERS:  # what its loaders and answers refuse, before weights are read
                for name in _LOADERS[stage]:
                    getattr(self, f"{name}_dataloader")()
                list(map(self.prompt.response, self.label_set or ()))

    def read_splits(self) -> NoteSplits:
        """Read and split the source, once; nothing is tokenised. Raises as `setup` does."""
        if self.splits is None:
            tables = load_source(self.source, revision=self.revision, columns=self.columns, labels=self.labels)
            splits = split_notes(tables, self.split, self.label_conflicts)
            self.label_set = splits.label_set(self.source)
            vars(self).pop("collator", None)  # one without labels, of a predict
            if self.label_conflicts == "keep":
                splits.warn_if_ambiguous()
            self.fingerprint = DataFingerprint(self.source, commit_of(tables.values()) or self.revision, splits.hashes)
            self.splits = splits
        return self.splits

    def rows(self, split: str) -> Dataset:
        """Tokenised notes of one split; a UserError if the source has no such split."""
        self.read_splits().require(split, self.source)
        return self._tokenised[split]

    @property
    def predict_rows(self) -> Dataset:
        """The notes to classify, tokenised."""
        return self._predict_rows if self._predict_rows is not None else self.rows(self.predict.source)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch, the same for any number of processes; at least 1."""
        return max(1, len(self.rows("train")) // self.batching.global_batch_size)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Micro-batches, those of one optimizer step after those of another."""
        rows, packed = self.rows("train"), self._packs
        sampler = StepSampler(*self.collator.measure(rows), self.batching, self.token_budget, packed, *self._place)
        # Worker processes ask for batches before Lightning names the epoch.
        epoch, sampler.first_step = divmod(self._trained_steps, self.steps_per_epoch)
        sampler.set_epoch(epoch)
        self._trained_steps = 0
        return self._loader(BatchDataset(rows, self.collator.packed if packed else self.collator.train), sampler)

    def val_dataloader(self) -> DataLoader[EvalBatch]:
        """The validation split, each note once."""
        return self._eval_loader("validation")

    def test_dataloader(self) -> DataLoader[EvalBatch]:
        """The test split, each note once."""
        return self._eval_loader("test")

    def predict_dataloader(self) -> DataLoader[Prompts]:
        """The notes to classify, each once.

        Lightning stops where a process has no batch, so notes are repeated if fewer are left than processes.
        """
        rows, world_size = self.predict_rows, self._place[1]
        left = np.arange(len(rows)) if self.answered is None else np.flatnonzero(~self.answered)
        if len(left) < world_size:
            left = np.resize(left if len(left) else np.arange(1), world_size)
        return self._eval_batches(rows, self.collator.prompts, left)

    def _eval_loader(self, split: str) -> DataLoader[EvalBatch]:
        rows, world_size = self.rows(split), self._place[1]
        if len(rows) < world_size:
            raise UserError(
                f"trainer.devices: the {split} split has {len(rows)} notes, too few for {world_size} processes; use at"
                f" most {len(rows)}, or a larger split."
            )
        return self._eval_batches(rows, self.collator.evaluate)

    def _eval_batches(self, rows: Dataset, collate: Collate, indices: np.ndarray | None = None) -> DataLoader[Any]:
        most = self.batching.token_budget or self.batching.eval_batch_size * self.tokenizer.max_length // 4
        batches = length_sorted_batches(rows["length"][:], self.batching.eval_batch_size, most, *self._place, indices)
        return self._loader(BatchDataset(rows, collate), batches)

    def _loader(self, dataset: BatchDataset, sampler: StepSampler | list[list[int]]) -> DataLoader[Any]:
        # The sampler yields whole batches: batch_size=None turns automatic batching off.
        return DataLoader(
            dataset,
            batch_size=None,
            sampler=sampler,
            collate_fn=torch.nn.Identity(),  # the dataset collates
            num_workers=self.batching.num_workers,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
            persistent_workers=self.batching.num_workers > 0,
        )

    @property
    def _packs(self) -> bool:
        if self.batching.packing is not None:
            return self.batching.packing
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
            return False
        return read_config(self.tokenizer.base_model, self.tokenizer.revision).model_type in PACKING_FAMILIES

    @property
    def _place(self) -> tuple[int, int]:
        """This process's rank and the number of processes."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def state_dict(self) -> dict[str, Any]:
        """Optimizer steps trained so far (prefetched batches do not count), and which notes these are."""
        notes = None if self.fingerprint is None else asdict(self.fingerprint)
        return {"optimizer_steps": self.trainer.global_step if self.trainer else 0, "notes": notes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after the last trained step; every command that loads a checkpoint calls this."""
        self._trained_steps = int(state_dict["optimizer_steps"])
        theirs = DataFingerprint.from_dict(state_dict.get("notes"))
        own = self.fingerprint
        self.mismatch = None if own is None else own.warn_if_different(theirs, "the checkpoint")
