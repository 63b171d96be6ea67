"""TranscriptionDataModule: from `data.source` to batches of token ids."""

from __future__ import annotations

import sys
from functools import cached_property
from typing import TYPE_CHECKING, Any

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader

from medlit.base_model import BUILTIN, load_tokenizer, packs
from medlit.data.balance_ranks import micro_batches_per_step
from medlit.data.batch_dataset import BatchDataset, identity
from medlit.data.class_balance import Balance
from medlit.data.collate import Batch, Collator, EvalBatch, LossOn, Prompts, supervised_tokens
from medlit.data.data_fingerprint import DataFingerprint
from medlit.data.labels import LabelSet
from medlit.data.notes import clean_note, load_source
from medlit.data.settings import Columns, Labels
from medlit.data.prompt import INSTRUCTION, AlpacaPrompt, Keep
from medlit.data.samplers import LengthSortedSampler, StepSampler
from medlit.data.sources import commit_of
from medlit.data.splits import Partition, partition
from medlit.data.stratified_split import Conflicts, Split, SplitSettings
from medlit.data.tokenise import tokenise
from medlit.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

PREDICT_SPLITS = ("train", "validation", "test")


class TranscriptionDataModule(L.LightningDataModule):
    """Reads notes, splits them, asks about each in an Alpaca prompt and batches the token ids.

    Args:
        source: where the notes are: 'builtin' (invented notes), a CSV, TSV, JSON, JSONL or Parquet file, a folder with
            one file a split, a glob, or a Hub dataset id.
        revision: commit, tag or branch of a Hub dataset.
        text_column: the column with the transcription.
        label_column: the column with the specialty.
        id_column: the column that names a note; by default 'id' where there is one, else the text's hash.
        labels: spelling of labels: aliases, labels to drop, fewest rows of a label.
        split: 'auto' (the source's own splits, or 'grouped' for a single table), 'official', 'official_clean'
            (official, less training rows whose text stands in validation or test), 'grouped' (made here, no text in two
            splits, stratified by label), 'kfold' (folds made in the same way: one is the test split, the next one
            validation, the others train).
        split_shares: shares of train, validation and test for 'grouped'.
        split_seed: seed of 'grouped' and 'kfold'.
        folds: number of folds for 'kfold'.
        fold: the fold that is the test split, 0 .. folds - 1.
        conflicts: what to do with identical texts that carry several labels: 'keep', 'drop', or 'majority' (the
            commonest label).
        near_threshold: texts of at least this Jaccard similarity (words, 0 to 1) count as one text when splitting;
            null: identical texts only.
        instruction: what the model is told to do.
        keep: what stays of a transcription that is too long for max_length: 'head', its beginning, or 'head_tail', half
            of the room for its beginning and half for its end, where a note often says what it comes to.
        loss_on: 'response' teaches the answer alone, 'whole' the prompt and the note as well.
        balance: 'none' trains on every note once an epoch; 'sqrt' and 'inverse' draw notes of rare specialties more
            often and of frequent ones less: in proportion to the square root of a specialty's notes, or every
            specialty alike. An epoch stays as long.
        global_batch_size: notes of one optimizer step, over all devices.
        batch_size: mean notes of a micro-batch on one device; as many micro-batches are accumulated as make up
            global_batch_size.
        packing: lay the notes of a training micro-batch end to end, as many tokens in each, instead of padding notes of
            like length; null: where attention can be told where a note begins, which is a Llama's on a GPU from Ampere
            on.
        eval_batch_size: most notes of an evaluation batch on one device.
        token_budget: most padded tokens of a batch on one device; by default batch_size x max_length.
        max_response_tokens: tokens of model.language_model.max_length that are kept for the answer.
        num_workers: worker processes that make batches ahead; 0: this process makes them itself.
        seed: seed of the training shuffle.
        text: predict: one note to file; '-' reads it from standard input.
        predict_source: predict: a split ('train', 'validation', 'test'), or any source as for 'source'; labels are not
            needed.
        base_model: set from model.language_model.base_model.
        base_revision: set from model.language_model.revision.
        max_length: set from model.language_model.max_length.
    """

    def __init__(
        self,
        source: str = "builtin",
        revision: str | None = None,
        text_column: str = "transcription",
        label_column: str = "medical_specialty",
        id_column: str | None = None,
        labels: Labels = Labels(),  # noqa: B008 - a default that the command line can show
        split: Split = "auto",
        split_shares: tuple[float, float, float] = (0.8, 0.1, 0.1),
        split_seed: int = 3407,
        folds: int = 5,
        fold: int = 0,
        conflicts: Conflicts = "keep",
        near_threshold: float | None = None,
        instruction: str = INSTRUCTION,
        keep: Keep = "head",
        loss_on: LossOn = "response",
        balance: Balance = "none",
        global_batch_size: int = 32,
        batch_size: int = 8,
        packing: bool | None = None,
        eval_batch_size: int = 32,
        token_budget: int | None = None,
        max_response_tokens: int = 32,
        num_workers: int = 0,
        seed: int = 3407,
        text: str | None = None,
        predict_source: str = "test",
        base_model: str = BUILTIN,
        base_revision: str | None = None,
        max_length: int = 2048,
    ) -> None:
        super().__init__()
        self.source = source
        self.revision = revision
        self.columns = Columns(text_column, label_column, id_column)
        self.labels = labels
        self.split_settings = SplitSettings(split, split_shares, split_seed, folds, fold, conflicts, near_threshold)
        self.instruction = instruction
        self.keep: Keep = keep
        self.loss_on = loss_on
        self.balance: Balance = balance
        self.global_batch_size = global_batch_size
        self.batch_size = batch_size
        self.packing = packing
        self.eval_batch_size = eval_batch_size
        self.token_budget = token_budget or batch_size * max_length
        self.max_response_tokens = max_response_tokens
        self.num_workers = num_workers
        self.seed = seed
        self.text = text
        self.predict_source = predict_source
        self.base_model = base_model
        self.base_revision = base_revision
        self.max_length = max_length
        self.label_set: LabelSet | None = None
        self.partition: Partition | None = None
        self.data_fingerprint: DataFingerprint | None = None
        self._splits: dict[str, Dataset] = {}
        self._predict: Dataset | None = None
        self._left_out: np.ndarray | None = None
        self._trained_steps = 0

    # --- reading ------------------------------------------------------------------------------------------------------

    @cached_property
    def prompt(self) -> AlpacaPrompt:
        """The prompt, with the base model's tokenizer; the first use loads that."""
        tokenizer = load_tokenizer(self.base_model, self.base_revision)
        return AlpacaPrompt(tokenizer, self.instruction, self.max_length, self.max_response_tokens, self.keep)

    @cached_property
    def collator(self) -> Collator:
        """Pads or packs, and supervises."""
        pad_id = int(self.prompt.tokenizer.pad_token_id)
        return Collator(self.prompt.response, pad_id, self.loss_on, most_notes=self.global_batch_size)

    def prepare_data(self) -> None:
        """Fill the caches, on one process of each machine."""
        self.setup(self.trainer.state.fn if self.trainer else None)

    def setup(self, stage: str | None) -> None:
        """Read, split and tokenise what the stage needs.

        Raises:
            UserError: the source, its columns or its labels cannot be used.
        """
        if stage == "predict" and (self.text is not None or self.predict_source not in PREDICT_SPLITS):
            if self._predict is None:
                self._predict = tokenise(self._read_predict(), self.prompt, cached=self.text is None)
            return
        if not self._splits:
            notes = self.split().notes
            self._splits = {name: tokenise(rows, self.prompt) for name, rows in notes.items()}

    def split(self) -> Partition:
        """Read the source and share its notes out, once; nothing is tokenised.

        Raises:
            UserError: the source, its columns or its labels cannot be used.
        """
        if self.partition is None:
            tables = load_source(
                self.source, revision=self.revision, columns=self.columns, labels=self.labels, require_labels=True
            )
            found = partition(tables, self.split_settings)
            self.label_set = _label_set(found, self.source)
            revision = commit_of(tables.values()) or self.revision
            self.data_fingerprint = DataFingerprint(self.source, revision, found.hashes)
            self.partition = found
        return self.partition

    def _read_predict(self) -> Dataset:
        import datasets

        if self.text is not None:
            text = clean_note(_read_stdin() if self.text == "-" else self.text)
            if not text:
                raise UserError(
                    "data.predict.text: the note is empty; give its text, or '-' and the text on standard input."
                )
            return datasets.Dataset.from_dict({"id": ["text"], "transcription": [text], "specialty": [None]})
        try:
            tables = load_source(self.predict_source, columns=self.columns, labels=self.labels, require_labels=False)
        except UserError as error:
            raise UserError(str(error).replace("data.source", "data.predict.source", 1)) from error
        return datasets.concatenate_datasets(list(tables.values()))

    def rows(self, split: str) -> Dataset:
        """Tokenised notes of one split.

        Raises:
            UserError: the source has no such split.
        """
        if split not in self._splits:
            raise UserError(
                f"data.source: {self.source} has no {split} split; add one, or set data.split to 'grouped' to make"
                " the splits here."
            )
        return self._splits[split]

    # --- batches ------------------------------------------------------------------------------------------------------

    def micro_batches_per_step(self, world_size: int) -> int:
        """Micro-batches that each process accumulates in one optimizer step."""
        return micro_batches_per_step(self.global_batch_size, self.batch_size, world_size)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch, the same on any number of processes; at least 1."""
        return max(1, len(self.rows("train")) // self.global_batch_size)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Micro-batches, an optimizer step's after another's."""
        rows = self.rows("train")
        specialties = rows["specialty"][:]
        places = {name: place for place, name in enumerate(sorted(set(specialties)))}
        labels = np.array([places[name] for name in specialties])
        answer = np.array([len(self.prompt.response(name)) for name in places])[labels]
        length = np.array(rows["length"][:]) + answer
        packed = self._packs
        sampler = StepSampler(
            length.tolist(),
            supervised_tokens(length, answer, self.loss_on).tolist(),
            global_batch_size=self.global_batch_size,
            batch_size=self.batch_size,
            token_budget=self.token_budget,
            packed=packed,
            seed=self.seed,
            labels=labels.tolist(),
            balance=self.balance,
            rank=self._rank,
            world_size=self._world_size,
        )
        # Worker processes ask for batches before Lightning names the epoch.
        epoch, sampler.first_step = divmod(self._trained_steps, self.steps_per_epoch)
        sampler.set_epoch(epoch)
        self._trained_steps = 0
        return self._loader(BatchDataset(rows, self.collator.packed if packed else self.collator.train), sampler)

    def val_dataloader(self) -> DataLoader[EvalBatch]:
        """The validation split, each note once.

        Raises:
            UserError: there is none, or it has fewer notes than there are processes.
        """
        return self._eval_loader("validation")

    def test_dataloader(self) -> DataLoader[EvalBatch]:
        """The test split, each note once.

        Raises:
            UserError: as for validation.
        """
        return self._eval_loader("test")

    @property
    def predict_rows(self) -> Dataset:
        """The notes to file, tokenised."""
        return self._predict if self._predict is not None else self.rows(self.predict_source)

    def leave_out(self, answered: np.ndarray) -> None:
        """Do not ask again about notes that are answered.

        Args:
            answered: whether each of `predict_rows` is, (N,) bool.
        """
        self._left_out = answered

    def predict_dataloader(self) -> DataLoader[Prompts]:
        """The notes to file, each once.

        Where fewer are left than there are processes, some are asked about by two, or again: Lightning ends where a
        process has none.
        """
        rows = self.predict_rows
        left = np.arange(len(rows)) if self._left_out is None else np.flatnonzero(~self._left_out)
        if len(left) < self._world_size:
            left = np.resize(left if len(left) else np.arange(1), self._world_size)
        return self._loader(BatchDataset(rows, self.collator.prompts), self._by_length(rows, left))

    def _eval_loader(self, split: str) -> DataLoader[EvalBatch]:
        rows = self.rows(split)
        if len(rows) < self._world_size:  # Lightning ends where a process has no note
            raise UserError(
                f"trainer.devices: the {split} split has {len(rows)} notes, too few to share among"
                f" {self._world_size} processes; use at most {len(rows)}, or a larger split."
            )
        return self._loader(BatchDataset(rows, self.collator.evaluate), self._by_length(rows))

    def _by_length(self, rows: Dataset, wanted: np.ndarray | None = None) -> LengthSortedSampler:
        return LengthSortedSampler(
            rows["length"][:], self.eval_batch_size, self.token_budget, self._rank, self._world_size, wanted
        )

    def _loader(self, rows: BatchDataset, sampler: StepSampler | LengthSortedSampler) -> DataLoader[Any]:
        # The sampler names whole batches, so automatic batching is off (batch_size=None) and Lightning leaves it alone.
        return DataLoader(
            rows,
            batch_size=None,
            sampler=sampler,
            collate_fn=identity,
            num_workers=self.num_workers,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
            persistent_workers=self.num_workers > 0,
        )

    @property
    def _packs(self) -> bool:
        if self.packing is not None:
            return self.packing
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        new = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        return new and packs(self.base_model, self.base_revision)

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer else 0

    @property
    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    # --- resuming -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Optimizer steps trained so far (what was fetched ahead and not trained on does not count); which notes."""
        notes = None if self.data_fingerprint is None else self.data_fingerprint.to_dict()
        return {"optimizer_steps": self.trainer.global_step if self.trainer else 0, "notes": notes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after the last step that was trained, in the middle of an epoch too; every verb that loads comes by."""
        self._trained_steps = int(state_dict["optimizer_steps"])
        self.compare_notes(DataFingerprint.from_dict(state_dict.get("notes")), "the checkpoint")

    def compare_notes(self, theirs: DataFingerprint | None, where: str) -> None:
        """Say so, once, when the splits are not those that some weights come from; notes of no split have none.

        Args:
            theirs: the notes that the weights come from; None where nobody knows.
            where: the weights, as a sentence names them.
        """
        if theirs is not None and self.data_fingerprint is not None and self._rank == 0:
            difference = self.data_fingerprint.difference(theirs, where)
            if difference is not None:
                print(f"medlit: {difference}", file=sys.stderr)


def _read_stdin() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UserError(
            f"data.predict.text: the standard input is not {error.encoding.upper()}; convert it, for example with"
            f" iconv."
        ) from None


def _label_set(partition: Partition, source: str) -> LabelSet:
    """The training split's labels.

    Raises:
        UserError: there is no training split, it has fewer than two labels, or another split has one that it has not.
    """
    notes = partition.notes
    if "train" not in notes:
        raise UserError(
            f"data.source: {source} has no train split, which says what labels there are; add one, or set data.split to"
            " 'grouped' to make the splits here."
        )
    label_set = LabelSet.from_labels(name for name in partition.labels["train"] if name)
    for split, rows in notes.items():
        foreign = sorted(name for name in partition.labels[split] if name and label_set.index(name) is None)
        if foreign:
            first = next(i for i, name in zip(rows["id"][:], rows["specialty"][:], strict=True) if name == foreign[0])
            raise UserError(
                f"data.columns.label: the {split} split has the label {foreign[0]!r} (first in note {first!r}), which"
                " the training split never had; map it with data.labels.aliases, leave it out with data.labels.drop, or"
                " set data.split to 'grouped'."
            )
    return label_set
