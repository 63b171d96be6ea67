"""What is exported answers as what was measured, or is not there; nothing of a note or of this machine goes along."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import SPECIALTIES, notes

from medlit.errors import UserError
from medlit.tools.export import exporter, parser, reload_worker, tolerances
from medlit.tools.export import run as export
from medlit.tools.export.hub import Repository
from medlit.tools.export.merged import Updates, original_shards, trained_shards, write_merged

TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}
TOLD = {"README.md", "confusion.png", "medlit.json", "verification.json"}
MODEL = TOKENIZER | TOLD | {"config.json", "generation_config.json", "model.safetensors"}


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reload in this process what is reloaded in a fresh one, which takes ten seconds to start."""
    from medlit.tools.export import verify

    def own_process(script: str, request: dict[str, Any]) -> str:
        assert script == "reload.py"
        return json.dumps(reload_worker._transformers(json.loads(json.dumps(request | {"bar": 2}))))

    monkeypatch.setattr(verify, "own_process", own_process)


@pytest.fixture
def tested(run: Path, medlit: Any) -> Path:  # noqa: ANN401 - a callable of conftest's
    """A run that was tested too."""
    config = ["--config", run / "config_fit.yaml", "--run_dir", run]
    assert medlit("test", *config, "--ckpt_path", "best").code == 0
    return run


def exported(run: Path, to: str, *flags: str) -> Path:
    output = run.parents[2] / "export"
    assert export(["--run_dir", str(run), "--to", to, "--output", str(output), "--notes", "6", *flags]) == 0
    return output


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "verification.json").read_text())


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def left(run: Path) -> set[str]:
    """What lies beside the logs."""
    return {path.name for path in run.parents[2].iterdir()} - {"logs"}


# --- merging ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fresh")
def test_a_merged_model_answers_as_the_one_that_was_measured(run: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = exported(run, "merged")
    assert files(folder) == MODEL - {"chat_template.jinja"}
    (row,) = report(folder)["exports"]
    assert row["against_medlit"]["changed"] == 0
    assert 0 < row["against_medlit"]["drift_max"] < 0.2
    assert report(folder)["notes"]["ids"][0] == "test-00"
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert not hasattr(model.config, "quantization_config")


@pytest.mark.usefixtures("fresh")
def test_beside_other_weights_an_adapter_is_compared_with_itself_there(run: Path) -> None:
    folder = exported(run, "merged", "--onto", "original", "--max_changed", "1", "--max_drift", "0.3")
    (row,) = report(folder)["exports"]
    there, own = row["against_adapter_on_these_weights"], row["against_medlit"]
    assert there["changed"] == 0
    assert there["all_median"] < own["all_median"], "rounding moves less than other weights do"


@pytest.mark.parametrize("rslora", [False, True])
def test_the_sum_is_peft_s_own(llama: Path, tmp_path: Path, rslora: bool) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    targets = ["q_proj", "o_proj", "down_proj"]
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=24, target_modules=targets, use_rslora=rslora))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "merged").mkdir()
    write_merged(original_shards(llama), llama, tmp_path / "adapter", tmp_path / "merged")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    theirs = model.merge_and_unload().to(torch.bfloat16).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_several_shards_are_one_model(llama: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    from medlit.tools.export import merged

    whole = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    for name, size in (("one", 10**9), ("several", 50_000)):
        monkeypatch.setattr(merged, "_SHARD", size)
        (tmp_path / name).mkdir()
        write_merged(trained_shards(whole), llama, run / "adapter", tmp_path / name)
    assert len(list((tmp_path / "several").glob("*.safetensors"))) > 2
    one, several = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("one", "several"))
    assert all(torch.equal(one[name], several[name]) for name in one)


@pytest.mark.parametrize("shards", [1, 3])
def test_of_the_original_weights_those_are_read_that_transformers_loads(
    llama: Path, tmp_path: Path, shards: int
) -> None:
    """Mistral's repositories hold all weights a second time, in a file of other names."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(llama)
    model.save_pretrained(tmp_path, max_shard_size="100KB" if shards > 1 else "1GB")
    assert len(list(tmp_path.glob("*.safetensors"))) >= shards
    shutil.copy(llama / "model.safetensors", tmp_path / "consolidated.safetensors")
    names = [name for shard in original_shards(tmp_path) for name, _ in shard]
    assert len(names) == len(set(names)) == len(model.state_dict())


def test_of_a_whole_file_and_shards_the_whole_one_is_read_as_transformers_does(llama: Path, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(llama)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    with torch.no_grad():
        model.lm_head.weight.fill_(7)
    model.save_pretrained(tmp_path / "whole")
    shutil.move(tmp_path / "whole" / "model.safetensors", tmp_path)
    assert (tmp_path / "model.safetensors.index.json").is_file()
    ours = {name: value for shard in original_shards(tmp_path) for name, value in shard}
    theirs = LlamaForCausalLM.from_pretrained(tmp_path).lm_head.weight
    assert torch.equal(ours["lm_head.weight"], theirs)
    assert float(theirs.mean()) == 7


def test_a_shard_that_is_missing_is_told(llama: Path, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    LlamaForCausalLM.from_pretrained(llama).save_pretrained(tmp_path, max_shard_size="100KB")
    gone = min(tmp_path.glob("*.safetensors"))
    gone.unlink()
    with pytest.raises(UserError, match=rf"base: 1 of the \d+ files .*{gone.name}; download or copy"):
        list(original_shards(tmp_path))


def test_an_adapter_of_another_model_is_refused(llama: Path, run: Path, tmp_path: Path) -> None:
    shards = [[(name.replace("layers.1.", "layers.7."), value) for name, value in next(original_shards(llama))]]
    with pytest.raises(UserError, match=r"adapter's weights, such as model\.layers\.1\..*no place"):
        write_merged(shards, llama, run / "adapter", tmp_path)


# --- what does not answer alike ---------------------------------------------------------------------------------------


def spoilt(change: Callable[[str, torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    sound = Updates.applied
    return lambda self, key, weight: change(key, sound(self, key, weight))


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda key, w: w + 0.5 * torch.randn_like(w) if key.endswith("1.mlp.up_proj.weight") else w, "max_"),
        (lambda key, w: w * 0.9 if key == "lm_head.weight" else w, "max_"),
        (lambda key, w: w * float("nan") if key.endswith("norm.weight") else w, "finite"),
    ],
    ids=["a layer", "the head", "no numbers"],
)
def test_a_damaged_export_is_refused_and_leaves_nothing(
    run: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[..., torch.Tensor], says: str
) -> None:
    monkeypatch.setattr(Updates, "applied", spoilt(change))
    with pytest.raises(UserError, match=says):
        exported(run, "merged")
    assert left(run) == set()


def test_an_export_that_is_ended_by_its_job_manager_leaves_nothing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    before = signal.getsignal(signal.SIGTERM)
    half: list[set[str]] = []

    def ended(*_: object) -> None:
        half.append(left(run))
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(exporter, "write_merged", ended)
    with pytest.raises(SystemExit) as stop:
        exported(run, "merged")
    assert stop.value.code == 143
    assert len(half[0]) == 2, "it was in the middle of writing"
    assert left(run) == set()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.usefixtures("fresh")
def test_a_tokenizer_that_cuts_otherwise_is_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    sound = reload_worker._transformers

    def other(request: dict[str, Any]) -> dict[str, Any]:
        told = sound(request)
        return told | {"tokens": [tokens[:-1] for tokens in told["tokens"]]}

    monkeypatch.setattr(reload_worker, "_transformers", other)
    with pytest.raises(UserError, match="cuts text into other tokens"):
        exported(run, "adapter")
    assert left(run) == set()


@pytest.mark.usefixtures("fresh")
def test_a_log_file_gets_the_steps_and_no_progress_bars(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    exported(run, "merged")
    said = capfd.readouterr().err
    assert "medlit: " in said
    assert "weighing the specialties" in said
    assert "notes/s" not in said


def test_labels_and_drift_are_told_apart() -> None:
    from medlit.tools.export.verify import compare

    ours = np.array([[-1.0, -2.0], [-3.0, -1.0]])
    found = compare(ours, ours - 5.0, ["a", "b"], near=0.5)
    assert (found.changed, found.drift_max, found.all_median) == (0, 5.0, 5.0)
    found = compare(ours, np.array([[-1.0, -0.5], [-3.0, -1.0]]), ["a", "b"], near=0.5)
    assert (found.changed, found.changed_ids, found.drift_max, found.all_max) == (1, ["a"], 0.0, 1.5)
    assert found.undecided == 0, "medlit's model held them 1 nat apart"


@pytest.mark.parametrize(
    ("quantisation", "limit", "moved", "passes"),
    [
        (None, None, 0.6, False),
        ("q8_0", None, 0.6, False),
        ("q4_k_m", None, 0.6, True),
        ("q4_k_m", None, 5.0, False),
        ("q4_k_m", 0.5, 0.6, False),
        ("f16", 1.0, 0.6, True),
    ],
)
def test_how_far_answers_may_move_goes_by_the_number_format_unless_it_is_said(
    monkeypatch: pytest.MonkeyPatch, quantisation: str | None, limit: float | None, moved: float, passes: bool
) -> None:
    from medlit.tools.export import verify
    from medlit.tools.export.source import Questions

    nats = np.array([[-1.0, -9.0], [-9.0, -1.0]])
    told = {"nats": (nats - moved).tolist(), "tokens": None, "reader": "a test"}
    monkeypatch.setattr(verify, "answer", lambda *_: told)
    verification = verify.Verification(Questions("test", ["a", "b"], [], [[1], [2]], [], [], nats), 0.0, limit)
    request = verify.Request("llama.cpp", Path("model.gguf"))
    refused = nullcontext() if passes else pytest.raises(UserError, match="max_drift: the file moves")
    with refused:
        verification.check("the file", request, torch.device("cpu"), quantisation=quantisation)
    assert verification.rows[0]["against_medlit"]["changed"] == 0


def test_notes_clearly_told_apart_count_whatever_drift_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    from medlit.tools.export import verify
    from medlit.tools.export.source import Questions

    nats = np.array([[-1.0, -2.0]])
    told = {"nats": nats[:, ::-1].tolist(), "tokens": None, "reader": "a test"}
    monkeypatch.setattr(verify, "answer", lambda *_: told)
    verification = verify.Verification(Questions("test", ["a"], [], [[1], [2]], [], [], nats), 0.02, 9.0)
    with pytest.raises(UserError, match="1 of 1 notes clearly another"):
        verification.check("the file", verify.Request("llama.cpp", Path("m.gguf")), torch.device("cpu"))


def test_a_note_between_two_specialties_may_fall_either_way_and_is_told() -> None:
    from medlit.tools.export.verify import compare

    ours = np.array([[-1.0, -1.3], [-1.0, -1.6]])
    found = compare(ours, ours[:, ::-1], ["a", "b"], near=0.5)
    assert (found.changed, found.undecided, found.changed_ids) == (2, 1, ["a", "b"])


# --- adapter and card -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fresh")
def test_an_adapter_comes_with_its_card_and_with_nothing_of_notes_or_machine(tested: Path) -> None:
    from huggingface_hub import ModelCard

    folder = exported(tested, "adapter")
    assert files(folder) == TOKENIZER | TOLD | {"adapter_config.json", "adapter_model.safetensors"}
    card = ModelCard.load(folder / "README.md")
    metadata = card.data.to_dict()
    assert metadata["base_model"] == "llama0"
    assert metadata["library_name"] == "peft"
    scores = json.loads((tested / "test_metrics.json").read_text())
    assert [round(scores["accuracy"], 4), round(scores["f1_macro"], 4)] == [
        result.metric_value for result in card.data.eval_results
    ]
    assert all(result.dataset_split == "test" for result in card.data.eval_results)
    for wanted in ("Not a medical device", "| this model |", "![Confusion matrix](confusion.png)", "hash of test"):
        assert wanted in card.text
    assert all(name in card.text for name in SPECIALTIES)
    told = "".join((folder / name).read_text() for name in files(folder) - {"confusion.png"} if "safe" not in name)
    assert not [row["id"] for rows in notes().values() for row in rows if row["transcription"] in told]
    beside = json.loads((folder / "medlit.json").read_text())
    assert beside["data"]["source"] == Path(beside["data"]["source"]).name
    for name in ("README.md", "verification.json"):
        assert not [
            path for path in (tested.parents[2], Path(beside["base_model"])) if str(path) in (folder / name).read_text()
        ]


@pytest.mark.usefixtures("fresh")
def test_the_weights_are_the_checkpoint_s_and_medlit_takes_them_back(run: Path, tiny_config: Path, medlit: Any) -> None:  # noqa: ANN401
    from safetensors.torch import load_file

    folder = exported(run, "adapter", "--ckpt_path", "best")
    ours, best = (load_file(place / "adapter_model.safetensors") for place in (folder, run / "adapter"))
    assert all(torch.equal(ours[name], best[name]) for name in best)
    again = medlit("test", "--config", tiny_config, "--model.adapter", folder)
    assert again.code == 0, again.err


@pytest.mark.usefixtures("fresh")
def test_an_adapter_folder_is_exported_with_the_settings_of_its_run(run: Path) -> None:
    output = run.parents[2] / "export"
    flags = ["--model.adapter", str(run / "adapter"), "--to", "adapter", "--output", str(output), "--notes", "3"]
    assert export(flags) == 0
    assert report(output)["exports"][0]["against_medlit"]["changed"] == 0


# --- GGUF -------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fresh")
def test_gguf_files_answer_alike_read_by_transformers(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    monkeypatch.setattr(exporter, "has_llama_cpp", lambda: False)
    folder = exported(run, "gguf", "--max_drift", "2", "--max_changed", "0.2")
    assert files(folder) == TOLD | {"model-f16.gguf", "model-q8_0.gguf"}
    full, eight = report(folder)["exports"]
    assert full["against_medlit"]["changed"] == 0
    assert full["against_medlit"]["all_median"] < eight["against_medlit"]["all_median"]
    assert "dequantised" in full["reader"]


def test_llama_3_s_rotary_factors_are_transformers_own() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from medlit.tools.export.gguf import _rope_factors

    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 8192, "rope_theta": 500000.0}
    config = LlamaConfig(hidden_size=4096, num_attention_heads=32, head_dim=128, rope_parameters=rope)
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 500000.0 ** -(np.arange(0, 128, 2) / 128)
    factors = _rope_factors(config.to_dict())
    assert factors is not None
    np.testing.assert_allclose(plain / factors, theirs.numpy(), rtol=1e-5)


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        ("config.json", {"model_type": "gemma2"}, "this is 'gemma2'"),
        ("tokenizer.json", {"pre_tokenizer": {"type": "Metaspace"}}, "this is another"),
    ],
)
def test_what_gguf_is_not_written_of_is_told(llama: Path, tmp_path: Path, file: str, change: Any, says: str) -> None:  # noqa: ANN401
    from medlit.tools.export.gguf import check_convertible

    folder = shutil.copytree(llama, tmp_path / "llama")
    values = json.loads((folder / file).read_text()) | change
    (folder / file).write_text(json.dumps(values))
    with pytest.raises(UserError, match=says):
        check_convertible(folder, ["f16"])


def test_a_quantiser_that_is_missing_is_told(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from medlit.tools.export import gguf

    found = importlib.util.find_spec
    for absent in ("llama_cpp", "diskcache"):  # the second one is all that the first asks for and medlit does not
        monkeypatch.setattr(
            gguf.importlib.util,
            "find_spec",
            lambda name, absent=absent: None if name == absent else found("json" if name == "llama_cpp" else name),
        )
        with pytest.raises(UserError, match=r"llama\.cpp, which is not installed; run 'pip install --no-deps "):
            gguf.check_convertible(llama, ["q4_k_m"])
        gguf.check_convertible(llama, ["f16", "q8_0"])


def test_what_is_to_be_installed_is_what_the_extra_asks_for() -> None:
    from medlit.tools.export.gguf import INSTALL

    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    wanted = " ".join(f'"{one}"' for one in project["project"]["optional-dependencies"]["gguf"])
    assert f"'pip install --no-deps {wanted}'" in INSTALL


LLAMA_CPP = """
import ctypes, os, pathlib, time
LLAMA_FTYPE_MOSTLY_Q4_K_M = 15
class How(ctypes.AdapterMetadata):
    _fields_ = [("ftype", ctypes.c_int)]
llama_model_quantize_default_params = How
def llama_model_quantize(full, path, how):
    pathlib.Path(os.fsdecode(path)).write_bytes(b"half")
    {ends}
"""


@pytest.fixture
def quantiser(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Install a llama.cpp that ends in the middle of a file, in a folder where other processes find it too."""
    from medlit.tools.export import gguf

    def install(ends: str) -> Path:
        site = tmp_path_factory.mktemp("site")
        (site / "llama_cpp.py").write_text(LLAMA_CPP.format(ends=ends))
        monkeypatch.setenv("PYTHONPATH", str(site))
        for module in (gguf, exporter):
            monkeypatch.setattr(module, "has_llama_cpp", lambda: True)
        return site

    return install


@pytest.mark.parametrize(
    ("ends", "says"),
    [
        (
            "os.write(2, b'tensor 7\\nGGML_ASSERT(n == 256) failed\\n'); os.abort()",
            r"\(GGML_ASSERT\(n == 256\) failed\)",
        ),
        ("os.write(2, b'tensor 7\\ndata is corrupted\\n'); return 1", r"\(data is corrupted\)"),
        ("os.abort()", r"\(it ended with -6\)"),
    ],
    ids=["an assertion", "an error", "in silence"],
)
def test_a_quantiser_that_fails_is_told_and_leaves_nothing(
    run: Path, quantiser: Callable[[str], Path], ends: str, says: str
) -> None:
    quantiser(ends)
    with pytest.raises(UserError, match=f"gguf_types: llama.cpp could not quantise this model to q4_k_m {says}"):
        exported(run, "gguf", "--gguf_types", "q4_k_m")
    assert left(run) == set()


def test_a_quantiser_ends_with_its_export(run: Path, quantiser: Callable[[str], Path]) -> None:
    told = (
        quantiser("pathlib.Path(__file__).with_name('process').write_text(str(os.getpid())); time.sleep(60)")
        / "process"
    )
    half: list[set[str]] = []

    def end() -> None:
        while not told.is_file() or not told.read_text():
            time.sleep(0.05)
        half.append(left(run))
        os.kill(os.getpid(), signal.SIGTERM)

    ending = threading.Thread(target=end, daemon=True)
    ending.start()
    begun = time.monotonic()
    with pytest.raises(SystemExit) as stop:
        exported(run, "gguf", "--gguf_types", "q4_k_m")
    assert stop.value.code == 143
    assert time.monotonic() - begun < 50, "it did not wait for llama.cpp"
    assert half[0] > left(run) == set()
    with pytest.raises(ProcessLookupError):
        os.kill(int(told.read_text()), 0)


# --- the Hub ----------------------------------------------------------------------------------------------------------


class Client:
    """Stands for `HfApi`; remembers what it was asked."""

    def __init__(self, fails: bool = False) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.fails = fails

    def create_repo(self, name: str, **given: object) -> None:
        self.asked.append(("create", {"name": name, **given}))

    def upload_folder(self, **given: object) -> str:
        if self.fails:
            raise OSError("the connection broke")
        self.asked.append(("upload", given))
        return "https://example.org"


def repository(*flags: str) -> Repository:
    given = ["--to", "hub", "--output", "x", "--repo", "somebody/notes", *flags]
    return Repository.of(parser().parse_args(given))


@pytest.fixture
def adapter_files(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name in ("README.md", "adapter_model.safetensors", "medlit.json", "verification.json"):
        (folder / name).write_text(name)
    return folder


def test_a_dry_run_says_what_would_be_sent_and_sends_nothing(
    adapter_files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    client = Client()
    repository().send(adapter_files, client)  # type: ignore[arg-type]
    said = capsys.readouterr().out
    assert client.asked == []
    assert said.splitlines()[1:] == ["  README.md", "  adapter_model.safetensors", "  medlit.json"]
    assert "hf_secret" not in said


@pytest.mark.parametrize(("flags", "private"), [([], True), (["--public"], False)])
def test_a_push_sends_the_adapter_and_its_card(
    adapter_files: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], private: bool
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    client = Client()
    repository("--push", *flags).send(adapter_files, client)  # type: ignore[arg-type]
    (_, made), (_, sent) = client.asked
    assert made == {"name": "somebody/notes", "private": private, "exist_ok": True}
    assert sent["repo_id"] == "somebody/notes"
    assert sent["folder_path"] == str(adapter_files)
    assert sent["allow_patterns"] == ["README.md", "adapter_model.safetensors", "medlit.json"]


def test_a_push_that_fails_is_told(adapter_files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with pytest.raises(UserError, match="the connection broke"):
        repository("--push").send(adapter_files, Client(fails=True))  # type: ignore[arg-type]


def test_a_push_needs_a_token_and_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="set HF_TOKEN"):
        repository("--push")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        repository("--push")


def test_a_base_model_of_this_machine_is_not_for_the_hub(run: Path) -> None:
    with pytest.raises(UserError, match="is a folder of this machine"):
        exported(run, "hub", "--repo", "somebody/notes")
    assert left(run) == set()


@pytest.mark.parametrize(
    ("source", "seen"),
    [
        ("unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit", "unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit"),
        ("unsloth/mistral-7b-v0.3-bnb-4bit", "unsloth/mistral-7b-v0.3-bnb-4bit"),
        ("hpe-ai/medical-cases", "hpe-ai/medical-cases"),
        ("builtin:smollm2-135m", "builtin:smollm2-135m"),
        ("wards/notes.csv", "notes.csv"),
        ("./llama", "llama"),
        ("~/models/llama-3.1", "llama-3.1"),
        ("/srv/wards/notes", "notes"),
        ("a/b/*.parquet", "*.parquet"),
    ],
)
def test_of_a_path_the_name_is_seen_and_of_the_hub_the_whole_id(source: str, seen: str) -> None:
    from medlit.tools.export.source import shown

    assert shown(source) == seen


# --- flags ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--max_changed", "2"], "max_changed: must be a share"),
        (["--max_drift", "0"], "max_drift: must be over 0"),
        (["--notes", "0"], "notes: must be at least 1"),
        (["--gguf_types", "q3"], "gguf_types: q3 is not"),
        (["--base", "x/y"], "base: it is for --onto original"),
        (["--push"], "to: --repo, --push and --public are for --to hub"),
        (["--ckpt_path", "nowhere.ckpt"], "ckpt_path: there is no file"),
        (["--run_dir", "nowhere"], "run: there is no folder"),
        (["--model.lora.r", "8"], r"model\.lora\.r"),
    ],
)
def test_a_mistake_is_told_before_anything_is_loaded(run: Path, flags: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        exported(run, "merged", *flags)
    assert left(run) == set()


def test_an_adapter_is_added_to_nothing(run: Path) -> None:
    with pytest.raises(UserError, match="onto: an adapter is added to nothing"):
        exported(run, "adapter", "--onto", "original")


def test_without_settings_there_is_nothing_to_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="ckpt_path: "):
        export(["--to", "merged", "--output", "x"])


def test_a_run_s_damaged_file_is_named(tmp_path: Path) -> None:
    from medlit.tools.export.card import _json

    (tmp_path / "test_metrics.json").write_text("{")
    with pytest.raises(UserError, match=r"run: .*test_metrics\.json is damaged"):
        _json(tmp_path / "test_metrics.json")


def test_a_folder_that_holds_something_is_left_alone(run: Path) -> None:
    output = run.parents[2] / "export"
    output.mkdir()
    (output / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"output: .* is there already and not empty"):
        exported(run, "merged")
    assert files(output) == {"mine.txt"}


def test_the_manual_needs_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parser().parse_args(["--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert all(
        f"--{name}" in said for name in ("to", "output", "ckpt_path", "onto", "max_changed", "max_drift", "push")
    )


def test_the_manual_names_the_bounds_that_hold(monkeypatch: pytest.MonkeyPatch) -> None:

    for name, value in (("MAX_CHANGED", 0.07), ("PLAIN_DRIFT", 0.75), ("DRIFT", {"q2_k": 9.5})):
        monkeypatch.setattr(tolerances, name, value)
    said = " ".join(parser().format_help().split())
    for wanted in ("(default: 0.07)", "closer than 0.75 nats", "(default: 0.75; for q2_k 9.5)", "were not 4-bit"):
        assert wanted in said


def test_every_base_model_with_a_config_has_a_licence() -> None:
    import yaml

    from medlit.tools.export.licences import licence_of

    configs = Path(__file__).parents[1] / "configs"
    named = [
        yaml.safe_load(path.read_text())["model"]["language_model"]["base_model"]
        for path in configs.glob("models/*.yaml")
    ]
    named += [
        yaml.safe_load((configs / name).read_text())["model"]["language_model"]["base_model"]
        for name in ("llama31_8b.yaml", "quickstart.yaml")
    ]
    assert len(named) > 10
    assert not [name for name in named if licence_of(name) is None]


# --- fresh processes --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("to", ["adapter", "merged", "gguf"])
def test_a_process_of_its_own_loads_what_was_written(run: Path, to: str) -> None:
    """The whole road, as its user takes it."""
    output = run.parents[2] / "export"
    flags = ["--run_dir", str(run), "--to", to, "--output", str(output), "--max_drift", "2", "--max_changed", "0.1"]
    done = subprocess.run(
        [sys.executable, "-m", "medlit", "export", *flags], capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
    assert {row["against_medlit"]["changed"] for row in report(output)["exports"]} == {0}
    assert left(run) == {"export"}
