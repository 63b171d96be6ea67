"""Untrusted files are read as data: no code runs, no bomb is unpacked, each is refused with one sentence."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from fakes import SPECIALTIES

from medlit.errors import UserError
from medlit.model.checkpoints import read_checkpoint

if TYPE_CHECKING:
    from conftest import Medlit

Checkpoint = dict[str, Any]


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[Path]]:
        return Path.touch, (self.path,)


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """The file that appears when code was run."""
    return tmp_path / "sprung"


@pytest.fixture
def refused(run_medlit: Medlit, tiny_config: Path, trap: Path) -> Callable[..., str]:
    """Run a command that must refuse; returns its message."""

    def run(verb: str, *arguments: object) -> str:
        outcome = run_medlit(verb, "--config", tiny_config, *arguments)
        assert outcome.code == 2, outcome.err
        assert "Traceback" not in outcome.err
        assert not trap.exists(), "code was run"
        lines = [line for line in outcome.err.splitlines() if line.startswith("medlit: ")]
        said = [line for line in lines if not line.startswith("medlit: weights: ")]
        assert len(said) == 1, outcome.err
        return said[0]

    return run


def add_code(checkpoint: Checkpoint, trap: Path) -> None:
    checkpoint["extra"] = Touch(trap)


def break_a_weight(checkpoint: Checkpoint, trap: Path) -> None:
    next(iter(checkpoint["state_dict"].values())).view(-1)[3] = float("nan")


def blow_up_a_weight(checkpoint: Checkpoint, trap: Path) -> None:
    next(iter(checkpoint["state_dict"].values())).view(-1)[3] = float("inf")


def rename_the_weights(checkpoint: Checkpoint, trap: Path) -> None:
    checkpoint["state_dict"] = {f"other.{name}": value for name, value in checkpoint["state_dict"].items()}


def hold_the_whole_model(checkpoint: Checkpoint, trap: Path) -> None:
    checkpoint["state_dict"]["model.lm_head.weight"] = torch.zeros(2, 2)


def learn_other_labels(checkpoint: Checkpoint, trap: Path) -> None:
    checkpoint["medlit"]["labels"] = ["Radiology", *SPECIALTIES[1:]]


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (add_code, "holds code, which medlit does not run"),
        (break_a_weight, "1 weights in .*, such as model.* are not finite numbers"),
        (blow_up_a_weight, "1 weights in .* are not finite numbers"),
        (rename_the_weights, "the checkpoint's .* weights are not this model's"),
        (hold_the_whole_model, "the checkpoint's .* weights are not this model's"),
        (learn_other_labels, "data.columns.label: the data has the label 'Cardiovascular / Pulmonary'"),
        (lambda checkpoint, trap: checkpoint.pop("medlit"), "was not written by this version of medlit"),
        (lambda checkpoint, trap: checkpoint.pop("state_dict"), "truncated, damaged or not a checkpoint"),
    ],
)
def test_a_spoilt_checkpoint_is_refused(
    refused: Callable[..., str], run: Path, trap: Path, spoil: Callable[[Checkpoint, Path], object], says: str
) -> None:
    path = run / "checkpoints" / "best.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    spoil(checkpoint, trap)
    torch.save(checkpoint, path)
    said = refused("validate", "--ckpt_path", "best")
    assert re.search(says, said), said


def forget_the_place(checkpoint: Checkpoint) -> None:
    del checkpoint["loops"]


def say_it_in_words(checkpoint: Checkpoint) -> None:
    checkpoint["loops"]["fit_loop"]["epoch_progress"]["total"]["ready"] = "three"


def count_below_nothing(checkpoint: Checkpoint) -> None:
    checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["completed"] = -1


def leave_one_out(checkpoint: Checkpoint) -> None:
    del checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]


def bring_one_more(checkpoint: Checkpoint) -> None:
    checkpoint["loops"]["fit_loop"]["epoch_loop.state_dict"]["trainer"] = 1


def have_half_a_step(checkpoint: Checkpoint) -> None:
    checkpoint["global_step"] = 4.5


def forget_the_optimizer(checkpoint: Checkpoint) -> None:
    del checkpoint["optimizer_states"]


def keep_no_rate(checkpoint: Checkpoint) -> None:
    checkpoint["lr_schedulers"][0]["base_lrs"] = []


@pytest.mark.parametrize(
    "spoil",
    [
        forget_the_place,
        say_it_in_words,
        count_below_nothing,
        leave_one_out,
        bring_one_more,
        have_half_a_step,
        forget_the_optimizer,
        keep_no_rate,
    ],
)
def test_a_fit_does_not_resume_from_impossible_progress(
    refused: Callable[..., str], run: Path, spoil: Callable[[Checkpoint], object]
) -> None:
    path = run / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    spoil(checkpoint)
    torch.save(checkpoint, path)
    said = refused("fit", "--trainer.max_steps", 20, "--ckpt_path", "last")
    assert "last.ckpt lacks the progress of its fit, which medlit's own checkpoints hold" in said


def test_a_bare_pickle_with_code_is_refused(tmp_path: Path, trap: Path) -> None:
    path = tmp_path / "old.ckpt"
    path.write_bytes(pickle.dumps({"state_dict": Touch(trap)}))
    with pytest.raises(UserError, match="not a checkpoint"):
        read_checkpoint(path)
    assert not trap.exists()


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gigabyte of zeros in a megabyte: no entry is read at all."""
    path = tmp_path / "bomb.ckpt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("archive/data.pkl", "w", force_zip64=True) as entry:
            for _ in range(256):
                entry.write(bytes(2**20))
    assert path.stat().st_size < 2**20
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(UserError, match="holds compressed entries"):
        read_checkpoint(path)


def test_a_tar_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tar.ckpt"
    (tmp_path / "pickle").write_bytes(pickle.dumps({}))
    with tarfile.open(path, "w:gz") as archive:
        archive.add(tmp_path / "pickle", "pickle")
    with pytest.raises(UserError, match="not a checkpoint"):
        read_checkpoint(path)


# --- adapters and base models -----------------------------------------------------------------------------------------


def test_an_adapter_that_is_a_pickle_is_refused(refused: Callable[..., str], run: Path, trap: Path) -> None:
    (run / "adapter" / "adapter_model.safetensors").unlink()
    torch.save({"weight": Touch(trap)}, run / "adapter" / "adapter_model.bin")
    assert "adapter_model.bin may hold code beside weights" in refused("test", "--model.adapter", run / "adapter")


def test_an_adapter_with_nan_is_refused(refused: Callable[..., str], run: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = run / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    next(iter(weights.values())).fill_(float("nan"))
    save_file(weights, file)
    assert "holds weights that are not finite numbers" in refused("test", "--model.adapter", run / "adapter")


def test_an_adapter_with_other_labels_is_refused(refused: Callable[..., str], run: Path) -> None:
    file = run / "adapter" / "medlit.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"labels": ["Radiology", *SPECIALTIES[1:]]}))
    assert "data.columns.label: the data has the label" in refused("test", "--model.adapter", run / "adapter")


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_a_base_model_with_code_is_refused(
    refused: Callable[..., str], llama: Path, tmp_path: Path, trap: Path, file: str
) -> None:
    folder = shutil.copytree(llama, tmp_path / "llama")
    (folder / "theirs.py").write_text(f"open({str(trap)!r}, 'w')\nclass Theirs: pass\n")
    values = json.loads((folder / file).read_text())
    if file == "config.json":
        values |= {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.Theirs", "AutoModel": "theirs.Theirs"}}
    else:
        values |= {"tokenizer_class": "Theirs", "auto_map": {"AutoTokenizer": ["theirs.Theirs", "theirs.Theirs"]}}
    (folder / file).write_text(json.dumps(values))
    said = refused("fit", "--model.language_model.base_model", folder)
    assert f"model.language_model.base_model: {folder}" in said
    assert "needs code from its repository, which medlit never runs" in said


def test_a_base_model_that_is_a_pickle_is_refused(
    refused: Callable[..., str], llama: Path, tmp_path: Path, trap: Path
) -> None:
    folder = shutil.copytree(llama, tmp_path / "llama")
    (folder / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Touch(trap)}, folder / "pytorch_model.bin")
    message = refused("fit", "--model.language_model.base_model", folder)
    assert f"model.language_model.base_model: the weights of {folder} are" in message
