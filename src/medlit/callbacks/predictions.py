"""Predictions as a table: every process writes its own part, the first one joins them and renames the file in."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import lightning as L

from medlit.data.batches import Prompts
from medlit.labels import LabelSet
from medlit.model.decoding import Answers
from medlit.model.module import SpecialtyClassifier
from medlit.runs import whole_file

FORMATS = (".csv", ".jsonl", ".parquet")
COLUMNS = ("id", "specialty", "answer", "cut_tokens")


class PredictionWriter(L.Callback):
    """Collects answers as they come and writes one table in the order of the source.

    Args:
        path: the table; its suffix chooses CSV, JSONL or Parquet.
        to_stdout: print the raw answers instead and write nothing.
    """

    def __init__(self, path: Path, to_stdout: bool = False) -> None:
        self.path = path
        self.to_stdout = to_stdout

    def _part(self, rank: int) -> Path:
        return self.path.with_name(f".{self.path.name}.part{rank}")

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Open this process's part."""
        if not self.to_stdout:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._file = self._part(trainer.global_rank).open("w", encoding="utf-8")

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,  # noqa: ANN401 - Lightning's signature; Answers here
        batch: Any,  # noqa: ANN401 - Prompts
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write a batch's answers down."""
        if self.to_stdout:
            for text in outputs.texts:
                print(text.strip())
        elif isinstance(pl_module, SpecialtyClassifier):
            for row in rows(batch, outputs, pl_module.label_set):
                self._file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Join the parts, on the first process."""
        if self.to_stdout:
            return
        self._file.close()
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            parts = [self._part(rank) for rank in range(trainer.world_size)]
            write_table(parts, self.path)
            for part in parts:
                part.unlink()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Leave nothing half-written behind."""
        if not self.to_stdout:
            self._part(trainer.global_rank).unlink(missing_ok=True)


def rows(prompts: Prompts, answers: Answers, label_set: LabelSet) -> list[dict[str, Any]]:
    """One row a note; the specialty is null where the answer is not on the list."""
    return [
        {
            "row": row,
            "id": identity,
            "specialty": label_set.names[label] if label < label_set.invalid else None,
            "answer": text,
            "cut_tokens": cut,
        }
        for row, identity, label, text, cut in zip(
            prompts.rows, prompts.ids, answers.label_ids.tolist(), answers.texts, prompts.cut_tokens, strict=True
        )
    ]


def write_table(parts: list[Path], path: Path) -> None:
    """Join JSON-lines parts into one table, in the order of the source."""
    import pandas as pd

    found: list[dict[str, Any]] = []
    for part in parts:
        with part.open(encoding="utf-8") as lines:
            found.extend(map(json.loads, lines))
    table = pd.DataFrame(found, columns=["row", *COLUMNS]).sort_values("row")[list(COLUMNS)]
    with whole_file(path) as beside:
        if path.suffix == ".csv":
            # Quoted throughout: the csv module itself leaves a lone carriage return bare, which ends a row.
            table.to_csv(beside, index=False, quoting=csv.QUOTE_NONNUMERIC)
        elif path.suffix == ".jsonl":
            table.to_json(beside, orient="records", lines=True, force_ascii=False)
        else:
            table.to_parquet(beside, index=False)
