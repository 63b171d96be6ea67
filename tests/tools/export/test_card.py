"""The model card shows the run's numbers, and nothing of notes or of this machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from exports import exported, files
from fakes import SPECIALTIES, notes

from medlit.errors import UserError

ROOT = Path(__file__).parents[3]
ADAPTER = {"README.md", "adapter_config.json", "adapter_model.safetensors", "confusion.png", "medlit.json"}


@pytest.mark.usefixtures("in_process")
def test_an_adapter_has_a_card_without_notes_or_paths(tested: Path) -> None:
    from huggingface_hub import ModelCard

    folder = exported(tested, "adapter")
    assert files(folder) == ADAPTER | {"tokenizer.json", "tokenizer_config.json", "verification.json"}
    card = ModelCard.load(folder / "README.md")
    metadata = card.data.to_dict()
    assert metadata["base_model"] == "llama0"
    assert metadata["library_name"] == "peft"
    scores = json.loads((tested / "test_metrics.json").read_text())
    assert [round(scores["accuracy"], 4), round(scores["f1_macro"], 4)] == [
        result.metric_value for result in card.data.eval_results
    ]
    assert all(result.dataset_split == "test" for result in card.data.eval_results)
    for expected in ("Not a medical device", "| this model |", "![Confusion matrix](confusion.png)", "hash of test"):
        assert expected in card.text
    assert all(name in card.text for name in SPECIALTIES)
    texts = "".join((folder / name).read_text() for name in files(folder) - {"confusion.png"} if "safe" not in name)
    assert not [row["id"] for rows in notes().values() for row in rows if row["transcription"] in texts]
    adapter = json.loads((folder / "medlit.json").read_text())
    assert adapter["data"]["source"] == Path(adapter["data"]["source"]).name
    for name in ("README.md", "verification.json"):
        text = (folder / name).read_text()
        assert not [path for path in (tested.parents[2], Path(adapter["base_model"])) if str(path) in text]


@pytest.mark.parametrize("name", ["test_metrics.json", "config_fit.yaml"])
def test_a_damaged_file_of_the_run_is_named(tmp_path: Path, name: str) -> None:
    from medlit.tools.export.card import read_run_file

    (tmp_path / name).write_text("{")
    with pytest.raises(UserError, match=rf"run_dir: .*{name} is damaged"):
        read_run_file(tmp_path / name)


def test_every_base_model_with_a_config_has_a_license() -> None:
    from medlit.tools.export.card import license_of

    configs = [*(ROOT / "configs" / "models").glob("*.yaml")]
    configs += [ROOT / "configs" / name for name in ("llama31_8b.yaml", "quickstart.yaml")]
    names = [yaml.safe_load(path.read_text())["model"]["language_model"]["base_model"] for path in configs]
    assert len(names) > 10
    assert not [name for name in names if license_of(name) is None]
