"""A full GPU ends a run with advice on which settings to change."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from compare import last_checkpoint
from torch._inductor.exc import InductorError

from medlit.callbacks.memory import memory_advice as advice
from medlit.data.datamodule import TranscriptionDataModule
from medlit.data.settings import Batching
from medlit.model.memory import GIB, Footprint, MeasuredMemory
from medlit.model.module import SpecialtyClassifier
from medlit.model.settings import LanguageModel

if TYPE_CHECKING:
    from conftest import Medlit


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (
            "training_step",
            "data.batching.micro_batch_size: the GPU's memory is too small for training; set"
            " data.batching.micro_batch_size to 2",
        ),
        ("validation_step", "data.batching.eval_batch_size: the GPU's memory is too small for answering; set"),
        ("configure_model", "model.language_model.base_model: "),
    ],
)
def test_a_full_gpu_gives_advice_in_one_sentence(
    run_medlit: Medlit, tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, expected: str
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(SpecialtyClassifier, method, full)
    outcome = run_medlit("fit", "--config", tiny_config, "--run_dir", tmp_path / "version_0")
    assert outcome.code == 2
    message = outcome.err.splitlines()[-1]
    assert message.startswith(f"medlit: {expected}"), outcome.err
    assert "Traceback" not in outcome.err


def test_layers_that_do_not_compile_are_reported_in_one_sentence(
    run_medlit: Medlit, tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise InductorError(AssertionError(), None)

    monkeypatch.setattr(SpecialtyClassifier, "training_step", fails)
    outcome = run_medlit("fit", "--config", tiny_config, "--run_dir", tmp_path / "version_0")
    assert outcome.code == 2
    assert "does not compile the layers of" in outcome.err.splitlines()[-1]
    assert "set TORCHDYNAMO_DISABLE=1" in outcome.err


def test_a_full_gpu_in_the_middle_of_a_fit_names_the_last_checkpoint(
    run_medlit: Medlit, tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = SpecialtyClassifier.training_step

    def full(self: SpecialtyClassifier, *rest: Any) -> torch.Tensor:  # noqa: ANN401
        if self.global_step == 6:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return step(self, *rest)

    monkeypatch.setattr(SpecialtyClassifier, "training_step", full)
    run = tmp_path / "version_0"
    outcome = run_medlit("fit", "--config", tiny_config, "--run_dir", run)
    assert outcome.code == 2
    assert outcome.err.endswith(f" The last good checkpoint is {run / 'checkpoints' / 'last.ckpt'}.\n")
    assert last_checkpoint(run)["global_step"] == 4


def test_the_advice_names_the_settings_to_change() -> None:
    data = TranscriptionDataModule(batching=Batching(micro_batch_size=8, eval_batch_size=1))
    kept = advice("training", LanguageModel(gradient_checkpointing="none"), data, MeasuredMemory(peak=78, total=80))
    assert "78.0 of 80.0 GiB" in kept
    loading = advice("loading", LanguageModel(), data, MeasuredMemory(78, 80))
    assert "load_in_4bit to true, model.language_model.offload to 'auto'" in loading
    fp8 = LanguageModel(load_in_4bit=False, load_in_fp8=True)
    assert "load_in_4bit to true and load_in_fp8 to false," in advice("loading", fp8, data, MeasuredMemory(78, 80))
    assert "data.batching.micro_batch_size to 4" in kept
    assert "model.language_model.max_length to 1024" in kept
    assert "model.language_model.gradient_checkpointing to 'unsloth'" in kept
    takes = Footprint(layers=32, fixed=6 * GIB, kept=108 * 1024, entry=8192, work=114_688)  # an 8B Llama's
    auto = advice("training", LanguageModel(), data, MeasuredMemory(78, 80), takes)
    assert "set model.language_model.memory_budget_gib to 70.2, or data.batching.micro_batch_size to 4" in auto
    crowded = advice("training", LanguageModel(), data, MeasuredMemory(12, 80), takes)
    assert "memory_budget_gib" not in crowded, "one layer alone takes more"
    assert "memory_budget_gib" not in advice("answering", LanguageModel(), data, MeasuredMemory(78, 80), takes)
    least = LanguageModel(gradient_checkpointing="unsloth")
    assert "gradient_checkpointing" not in advice("training", least, data, MeasuredMemory(78, 80))
    single = advice("answering", LanguageModel(), data, MeasuredMemory(78, 80))
    assert "data.batching.eval_batch_size to" not in single
    assert "set model.language_model.max_length to 1024" in single


@pytest.mark.parametrize(
    ("size", "setting"), [("4", "data.batching.micro_batch_size"), ("1", "model.language_model.max_length")]
)
def test_a_micro_batch_that_no_cpu_memory_holds_is_refused(
    run_medlit: Medlit, tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: str, setting: str
) -> None:
    """Linux would end the fit with SIGKILL, and no word."""
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=1000, available=2**40))
    monkeypatch.setattr("psutil.swap_memory", lambda: SimpleNamespace(total=1000))
    flags = ["--run_dir", tmp_path / "run", "--data.batching.micro_batch_size", size]
    outcome = run_medlit("fit", "--config", tiny_config, *flags)
    assert outcome.code == 2
    said = outcome.err.splitlines()[-1]
    assert said.startswith(f"medlit: {setting}: to train on a micro-batch of ")
    assert said.endswith("of memory, and this machine has 0.0; set it lower.")
