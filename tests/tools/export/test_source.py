"""Weights are exported with the settings of their run, and under names that others may see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from exports import exported, verification

from medlit.tools.export import run as export


@pytest.mark.usefixtures("in_process")
def test_the_weights_are_the_checkpoints_and_medlit_reads_them(run: Path, tiny_config: Path, run_medlit: Any) -> None:  # noqa: ANN401
    from safetensors.torch import load_file

    folder = exported(run, "adapter", "--ckpt_path", "best")
    ours, best = (load_file(place / "adapter_model.safetensors") for place in (folder, run / "adapter"))
    assert all(torch.equal(ours[name], best[name]) for name in best)
    outcome = run_medlit("test", "--config", tiny_config, "--model.adapter", folder)
    assert outcome.code == 0, outcome.err


@pytest.mark.usefixtures("in_process")
def test_an_adapter_folder_is_exported_with_the_settings_of_its_run(run: Path) -> None:
    output = run.parents[2] / "export"
    flags = ["--model.adapter", str(run / "adapter"), "--to", "adapter", "--output", str(output), "--notes", "3"]
    assert export(flags) == 0
    assert verification(output)["exports"][0]["against_medlit"]["changed"] == 0


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit", "unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit"),
        ("unsloth/mistral-7b-v0.3-bnb-4bit", "unsloth/mistral-7b-v0.3-bnb-4bit"),
        ("hpe-ai/medical-cases", "hpe-ai/medical-cases"),
        ("builtin:smollm2-135m", "builtin:smollm2-135m"),
        ("wards/notes.csv", "notes.csv"),
        ("wards/notes.jsonl.gz", "notes.jsonl.gz"),
        ("wards/notes.xlsx", "notes.xlsx"),
        ("clinic/notes:may", "clinic/notes:may"),
        ("./llama", "llama"),
        ("~/models/llama-3.1", "llama-3.1"),
        ("/srv/wards/notes", "notes"),
        ("a/b/*.parquet", "*.parquet"),
    ],
)
def test_a_path_is_shown_by_its_name_and_a_hub_id_whole(llama: Path, source: str, name: str) -> None:
    from medlit.data.sources import public_name

    assert public_name(source) == name
