"""A user's mistake is one sentence naming the key, file or row and the remedy; exit code 2, nothing half-written."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import pytest
import yaml
from fakes import BONE, HEART, notes, write_csv, write_llama, write_notes

from medlit.cli import check_configs
from medlit.errors import UserError
from medlit.run_folder import sole_fit

if TYPE_CHECKING:
    from conftest import Medlit

Row = dict[str, str]
Refused = Callable[..., str]


@pytest.fixture
def refused(run_medlit: Medlit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Refused:
    """Run a verb that must fail as a user's mistake does; give the sentence."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> str:
        before = {(path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*") if path.is_file()}
        folders = {path for path in tmp_path.rglob("*") if path.is_dir()}
        outcome = run_medlit(*arguments)
        assert outcome.code == 2, outcome.err
        assert outcome.out == ""
        assert "Traceback" not in outcome.err
        said = [line for line in outcome.err.splitlines() if re.match("medlit: (?!checking that|weights)", line)]
        assert len(said) == 1, outcome.err
        assert outcome.err.rstrip().endswith(said[0])
        assert {(path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*") if path.is_file()} == before
        assert {path for path in tmp_path.rglob("*") if path.is_dir()} == folders
        return said[0]

    return run


@pytest.fixture
def fit(refused: Refused, tiny_config: Path) -> Refused:
    """Fit the tiny model with flags that cannot work."""
    return lambda *flags: refused("fit", "--config", tiny_config, *flags)


def table(path: Path, change: Callable[[list[Row]], object] = lambda rows: None) -> Path:
    """The training notes as one CSV table, after a change to its rows."""
    rows = [row for row in notes()["train"] if row["id"] != "train-04"]
    changed = change(rows)
    return write_csv(path, changed if isinstance(changed, list) else rows)


# --- notes ------------------------------------------------------------------------------------------------------------


def test_a_missing_file(fit: Refused, tmp_path: Path) -> None:
    said = fit("--data.source", tmp_path / "notes.csv")
    assert f"data.source: there is no file or folder {tmp_path / 'notes.csv'}" in said


def test_a_dataset_that_is_not_on_this_machine(fit: Refused) -> None:
    said = fit("--data.source", "nobody/nothing")
    assert "data.source: nobody/nothing" in said
    assert "medlit audit --data.source nobody/nothing" in said


@pytest.mark.parametrize("key", ["text", "label", "id"])
def test_an_unknown_column(fit: Refused, tmp_path: Path, key: str) -> None:
    source = table(tmp_path / "notes.csv")
    said = fit("--data.source", source, f"--data.columns.{key}", "remarks")
    assert f"data.columns.{key}: {source} has no column 'remarks'" in said
    assert f"with --data.columns.{key}" in said
    assert "id, transcription, medical_specialty" in said


def test_a_missing_config_names_a_similar_one(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "quickstart.yaml").write_text("{}")
    said = refused("fit", "--config", "configs/quikstart.yaml")
    assert said == "medlit: config: there is no file configs/quikstart.yaml; did you mean configs/quickstart.yaml?"
    assert refused("fit", "--config", "own.yaml").endswith("there is no file own.yaml; give the path of a YAML file.")


@pytest.mark.parametrize("weights", [[], ["--ckpt_path", "best"]])
@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_a_missing_run_folder(refused: Refused, tiny_config: Path, command: str, weights: list[str]) -> None:
    said = refused(command, "--config", tiny_config, "--run_dir", "logs/nope", *weights)
    assert "run_dir: there is no folder logs/nope; give the run folder of a fit" in said


@pytest.mark.parametrize(("text", "what"), [("", "is empty"), ("transcription,medical_specialty\n", "no rows")])
def test_an_empty_table(fit: Refused, tmp_path: Path, text: str, what: str) -> None:
    source = tmp_path / "notes.csv"
    source.write_text(text)
    said = fit("--data.source", source)
    assert str(source) in said
    assert what in said
    assert "at least one note" in said


def test_a_label_column_with_one_class(fit: Refused, tmp_path: Path) -> None:
    source = table(tmp_path / "notes.csv", lambda rows: [row | {"medical_specialty": HEART} for row in rows])
    said = fit("--data.source", source)
    assert "data.columns.label: a classifier needs at least two labels and the table has only" in said
    assert HEART in said


def test_an_empty_note(fit: Refused, tmp_path: Path) -> None:
    source = table(tmp_path / "notes.csv", lambda rows: rows[6].update(transcription=" \n"))
    said = fit("--data.source", source)
    assert f"{source}, row 7 (id {notes()['train'][7]['id']}): the note is empty" in said
    assert "delete such rows or fill them in" in said


def test_a_label_that_training_never_had(fit: Refused, tmp_path: Path) -> None:
    source = write_notes(tmp_path / "notes")
    rows = notes()["test"]
    rows[3]["medical_specialty"] = "Radiology"
    write_csv(source / "test.csv", rows)
    said = fit("--data.source", source)
    assert "the test split has the label 'Radiology' (first in note 'test-03')" in said
    assert "data.labels.aliases" in said


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ([], "there is no label"),
        ([HEART, 3], "column 'medical_specialty' holds a list where a list of texts belongs"),
        (HEART, "column 'medical_specialty' holds a text where a list of texts belongs"),
        ([HEART, "7"], "it is a number among names"),
    ],
)
def test_a_list_of_labels_that_cannot_be_used(fit: Refused, tmp_path: Path, cell: object, expected: str) -> None:
    rows: list[dict[str, object]] = [
        row | {"medical_specialty": [row["medical_specialty"]]} for row in notes()["train"]
    ]
    rows[6]["medical_specialty"] = cell
    source = tmp_path / "notes.json"
    source.write_text(json.dumps(rows))
    said = fit("--data.source", source)
    assert f"{source}, row 7" in said
    assert expected in said


@pytest.mark.parametrize("other", ["heart ", "HEART\u200b"])
def test_aliases_that_contradict_each_other(fit: Refused, other: str) -> None:
    aliases = json.dumps({"Heart": "Cardiology", other: "Surgery"})
    assert "data.labels.aliases: the label 'Heart' is given twice, for 'Cardiology' and for 'Surgery'; keep one" in fit(
        "--data.labels.aliases", aliases
    )


@pytest.mark.parametrize("verb", ["fit", "test", "predict"])
def test_notes_are_no_ids(refused: Refused, tiny_config: Path, tmp_path: Path, verb: str) -> None:
    """Ids are written into tables, reports and messages."""
    source = table(tmp_path / "notes.csv", lambda rows: rows)
    flags = ["--data.predict.source", source] if verb == "predict" else ["--data.source", source]
    said = refused(verb, "--config", tiny_config, *flags, "--data.columns.id", "transcription")
    assert f"data.columns.id: column 'transcription' of {source} is that of data.columns.text" in said


def test_no_message_repeats_a_note(fit: Refused, tmp_path: Path) -> None:
    secret = "Jane Roe of Elm Street"
    source = table(tmp_path / "notes.csv", lambda rows: [row | {"transcription": secret} for row in rows[:3]])
    source.write_text(source.read_text() + f"x,{secret},Neurology,one field too many\n")
    assert "Jane" not in fit("--data.source", source)


@pytest.mark.parametrize("verb", ["fit", "test"])
def test_a_table_too_small_to_be_divided(refused: Refused, tiny_config: Path, tmp_path: Path, verb: str) -> None:
    """A remedy that is already in force would send its reader in circles."""
    source = table(tmp_path / "three.csv", lambda rows: rows[:3])
    said = refused(verb, "--config", tiny_config, "--data.source", source)
    split = "validation" if verb == "fit" else "test"
    assert f"data.source: none of the 3 texts of {source} is in the {split} split; add notes, or change" in said


def test_lists_written_as_texts(fit: Refused, tmp_path: Path) -> None:
    """As pandas writes a column of lists to a CSV file."""
    given = table(tmp_path / "lists.csv", lambda rows: [row | {"medical_specialty": "['Neurology']"} for row in rows])
    said = fit("--data.source", given)
    assert "lists.csv has lists written as text; store lists in JSON Lines or Parquet, or write 'A; B'" in said


def test_a_split_that_the_source_lacks(refused: Refused, tiny_config: Path, tmp_path: Path) -> None:
    source = write_notes(tmp_path / "notes")
    (source / "test.csv").unlink()
    said = refused("test", "--config", tiny_config, "--data.source", source, "--data.split.kind", "official")
    assert f"data.source: {source} has no test split" in said
    assert "grouped" in said


def test_fewer_notes_than_a_step_needs(fit: Refused) -> None:
    assert "data.batching.global_batch_size: the training split has 24 notes" in fit(
        "--data.batching.global_batch_size", "25"
    )


def test_a_limit_without_room_for_a_note(fit: Refused) -> None:
    said = fit("--model.language_model.max_length", "50")
    assert "model.language_model.max_length: 50 tokens leave no room for a note" in said


def test_an_instruction_that_lists_more_labels_than_fit(fit: Refused) -> None:
    said = fit("--data.instruction", "Choose one of: " + ", ".join(f"specialty {i}" for i in range(500)))
    assert "model.language_model.max_length: 112 tokens leave no room for a note beside the prompt's" in said
    assert "specialty 7" not in said
    assert "set it to at least" in said


CHAT = ("--data.prompt_format", "chat")


def test_a_chat_with_a_base_model_that_has_no_template(fit: Refused) -> None:
    said = fit(*CHAT)
    assert "data.prompt_format: 'chat' needs a chat template and the base model has none" in said
    assert "set it to 'alpaca'" in said


def test_a_chat_with_an_adapter_of_another_format(refused: Refused, tiny_config: Path, run: Path) -> None:
    said = refused("test", "--config", tiny_config, "--model.adapter", run / "adapter", *CHAT)
    assert f"data.prompt_format: the adapter {run / 'adapter'} was trained with 'alpaca'" in said


def test_an_unknown_format_of_the_prompt(fit: Refused) -> None:
    assert "data.prompt_format: must be" in fit("--data.prompt_format", "chatml")


@pytest.mark.parametrize("text", ["", " \n"])
def test_no_note_at_all(refused: Refused, tiny_config: Path, text: str) -> None:
    assert "data.predict.text: the note is empty" in refused(
        "predict", "--config", tiny_config, "--data.predict.text", text
    )


def test_the_name_of_a_file_instead_of_a_note(refused: Refused, tiny_config: Path) -> None:
    said = refused("predict", "--config", tiny_config, "--data.predict.text", "notes.csv")
    assert "data.predict.text: this is the name of a file and not a note" in said
    assert "data.predict.source" in said


def test_ids_that_no_answer_can_be_joined_by(refused: Refused, tiny_config: Path, tmp_path: Path) -> None:
    source = table(tmp_path / "notes.csv", lambda rows: [row | {"id": "p1"} for row in rows])
    said = refused("predict", "--config", tiny_config, "--data.predict.source", source)
    assert f"data.columns.id: {source}, row 2 has the id 'p1'" in said
    assert "set 'none'" in said


def test_predictions_to_a_file_of_unknown_format(refused: Refused, tiny_config: Path) -> None:
    said = refused("predict", "--config", tiny_config, "--output", "filed.xlsx")
    assert "output: filed.xlsx ends in none of .csv, .jsonl, .parquet" in said


@pytest.mark.parametrize(
    ("mode", "threshold", "reason"),
    [("likelihood", "1.5", "must be a number from 0 to 1"), ("generate", "0.5", "gives no probabilities")],
)
def test_a_threshold_that_cannot_work(
    refused: Refused, tiny_config: Path, mode: str, threshold: str, reason: str
) -> None:
    arguments = ["--model.decoding.mode", mode, "--model.decoding.abstain_below", threshold]
    said = refused("predict", "--config", tiny_config, *arguments)
    assert "model.decoding.abstain_below: " in said
    assert reason in said


@pytest.mark.parametrize("verb", ["fit", "validate", "predict"])
@pytest.mark.parametrize(
    ("mode", "name", "value", "reason"),
    [
        *(("likelihood", "coverage", value, "must be over 0.5 and under 1") for value in ("0.5", "1", "95", "-1")),
        *(("likelihood", "coverage", value, f"must be a number or null, not {value}") for value in ("most", "nan")),
        ("generate", "coverage", "0.9", "'generate' gives no probabilities"),
        ("generate", "answer", "set", "'generate' gives no probabilities"),
        ("likelihood", "answer", "sets", "one"),
    ],
)
def test_sets_that_cannot_be_made(
    refused: Refused, tiny_config: Path, verb: str, mode: str, name: str, value: str, reason: str
) -> None:
    said = refused(verb, "--config", tiny_config, "--model.decoding.mode", mode, f"--model.decoding.{name}", value)
    assert f"model.decoding.{name}: " in said
    assert reason in said


def test_a_fit_whose_prior_would_have_no_effect(fit: Refused) -> None:
    said = fit("--model.decoding.prior", "tfidf", "--model.decoding.mode", "generate")
    assert "model.decoding.prior: 'generate' gives no probabilities; set model.decoding.mode to 'likelihood'" in said


@pytest.mark.parametrize("verb", ["test", "predict"])
@pytest.mark.parametrize("setting", [("coverage", "0.9"), ("answer", "set")])
def test_sets_without_weights(refused: Refused, tiny_config: Path, verb: str, setting: tuple[str, str]) -> None:
    name, value = setting
    flags = ["--model.lora", "null", "--model.decoding.mode", "likelihood", f"--model.decoding.{name}", value]
    said = refused(verb, "--config", tiny_config, *flags)
    assert f"model.decoding.{name}: there are no weights to have a threshold" in said
    assert f"give ckpt_path or model.adapter, or leave {name} out." in said
    assert "medlit validate" not in said


def test_resuming_a_single_note(refused: Refused, tiny_config: Path) -> None:
    said = refused("predict", "--config", tiny_config, "--data.predict.text", "A knee.", "--resume")
    assert "resume: a single note cannot be resumed" in said


def test_one_note_into_a_table(refused: Refused, tiny_config: Path, tmp_path: Path) -> None:
    said = refused(
        "predict", "--config", tiny_config, "--data.predict.text", "A knee.", "--output", tmp_path / "filed.csv"
    )
    assert "output: the answer to one note is printed" in said


def test_a_table_to_file_that_is_missing(refused: Refused, tiny_config: Path) -> None:
    said = refused("predict", "--config", tiny_config, "--data.predict.source", "incoming.csv")
    assert "data.predict.source" in said
    assert "incoming.csv" in said


# --- models and machines ----------------------------------------------------------------------------------------------


def test_a_model_folder_that_is_not_there(fit: Refused, tmp_path: Path) -> None:
    said = fit("--model.language_model.base_model", tmp_path / "llama")
    assert f"model.language_model.base_model: {tmp_path / 'llama'} is not a folder with a model" in said


def test_a_folder_that_holds_no_model(fit: Refused, tmp_path: Path) -> None:
    (tmp_path / "llama").mkdir()
    assert "holds no config.json" in fit("--model.language_model.base_model", tmp_path / "llama")


def test_a_model_that_is_neither_cached_nor_within_reach(fit: Refused) -> None:
    said = fit("--model.language_model.base_model", "nobody/no-llama")
    assert (
        "model.language_model.base_model: nobody/no-llama is neither in the local cache nor available from the Hub"
        in said
    )
    assert "hf download nobody/no-llama" in said


def test_a_model_folder_without_its_weights(fit: Refused, llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "llama")
    (folder / "model.safetensors").unlink()
    assert f"model.language_model.base_model: {folder}" in fit("--model.language_model.base_model", folder)


def test_a_model_whose_weights_are_cut_short(fit: Refused, llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama, tmp_path / "llama")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    said = fit("--model.language_model.base_model", folder)
    assert f"model.language_model.base_model: the weights of {folder} are truncated" in said


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"model_type": "t5"}, "'t5' models are not decoders that generate text; choose a causal language model."),
        ({"model_type": "vit"}, "'vit' models are not decoders that generate text"),
        ({"model_type": "no_such_family"}, "has model type `no_such_family` but Transformers does not recognize"),
        ({"model_type": "a", "auto_map": {"AutoConfig": "a.B"}}, "needs code from its repository, which medlit never"),
        ({"num_attention_heads": "four"}, "cannot be loaded (StrictDataclassFieldValidationError: "),
        ({"vocab_size": 2048}, "medlit does not reproduce the numbers of"),
        ({"num_hidden_layers": 3}, "lacks weights of its own architecture"),
        ({"model_type": "bert"}, "lacks weights of its own architecture"),
    ],
    ids=str,
)
def test_a_base_model_that_cannot_be_trained(
    fit: Refused, llama: Path, tmp_path: Path, changes: dict[str, object], what: str
) -> None:
    folder = shutil.copytree(llama, tmp_path / "base")
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    said = fit("--model.language_model.base_model", folder)
    assert said.startswith("medlit: model.language_model.base_model: ")
    assert what in said


def test_a_base_model_that_its_loader_changes(
    fit: Refused, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A slow machine remembers the check of the same model by another test.
    monkeypatch.setenv("MEDLIT_CACHE", str(tmp_path_factory.mktemp("cache")))
    unturned = lambda queries, keys, *_, **__: (queries, keys)  # noqa: E731
    monkeypatch.setattr("transformers.models.llama.modeling_llama.apply_rotary_pos_emb", unturned)
    assert "medlit does not reproduce the numbers of" in fit()


def test_a_model_larger_than_memory_is_refused_before_it_is_read(
    fit: Refused, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The 405B's shape; the weights are still the tiny model's. Embedding and head are in float32, on a CPU."""
    folder = shutil.copytree(llama, tmp_path / "llama")
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126}
    config |= {"num_attention_heads": 128, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256}
    config["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("medlit.model.memory.free_on", lambda device: 24 * 2**30)
    said = fit("--model.language_model.base_model", folder)
    assert f"the weights of {folder} take about 209 GiB in 4 bit, and this machine has 24.0 GiB free" in said
    assert "choose a smaller base model or a device with more memory" in said


def test_layers_in_host_memory_without_a_gpu(fit: Refused) -> None:
    assert "model.language_model.offload: not without a GPU; set it to 'auto'." in fit(
        "--model.language_model.offload", 2
    )


def test_layers_that_the_model_does_not_have(fit: Refused) -> None:
    said = fit("--model.lora.target_modules", "[qkv_proj,o_proj]")
    assert "model.lora.target_modules" in said
    assert "qkv_proj" in said


def test_a_gpu_config_on_a_machine_without_one(fit: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    said = fit("--config", Path(__file__).parents[2] / "configs" / "hardware" / "gpu_80gb.yaml")
    assert "trainer.accelerator: the config needs a GPU and PyTorch sees none; run 'medlit doctor'" in said


def test_more_gpus_than_there_are(fit: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    said = fit("--trainer.accelerator", "gpu", "--trainer.devices", "8")
    assert "trainer.devices: the config needs 8 GPUs and PyTorch sees 1" in said


def test_processes_that_do_not_divide_a_step(fit: Refused) -> None:
    said = fit("--trainer.devices", "3")
    assert "data.batching.global_batch_size: 8 notes per optimizer step cannot be shared evenly by 3 processes" in said


# --- checkpoints and adapters -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict"])
def test_a_checkpoint_of_another_base_model(
    refused: Refused, run: Path, tiny_config: Path, llama: Path, tmp_path: Path, verb: str
) -> None:
    other = write_llama(tmp_path / "other")
    arguments = ["--config", tiny_config, "--ckpt_path", "best", "--model.language_model.base_model", other]
    said = refused(verb, *arguments)
    assert f"model.language_model.base_model: the checkpoint {run.relative_to(tmp_path)}/checkpoints/best.ckpt" in said
    assert f"set it to '{llama}'" in said


def test_a_checkpoint_of_another_adapter(refused: Refused, run: Path, tiny_config: Path) -> None:
    said = refused("test", "--config", tiny_config, "--ckpt_path", "best", "--model.lora.r", "8")
    assert "model.lora.r: the checkpoint" in said
    assert "was trained with 16 and the config says 8" in said


@pytest.mark.parametrize("size", [0, 100, 20_000, -1])
def test_a_truncated_checkpoint(refused: Refused, run: Path, tiny_config: Path, size: int) -> None:
    path = run / "checkpoints" / "best.ckpt"
    path.write_bytes(path.read_bytes()[:size])
    said = refused("validate", "--config", tiny_config, "--ckpt_path", "best")
    assert "best.ckpt is truncated, damaged or not a checkpoint" in said


def test_a_checkpoint_of_another_program(refused: Refused, tiny_config: Path, tmp_path: Path) -> None:
    import torch

    torch.save({"state_dict": {}, "global_step": 3}, tmp_path / "other.ckpt")
    said = refused("validate", "--config", tiny_config, "--ckpt_path", "other.ckpt")
    assert "ckpt_path" in said
    assert "not written by this version of medlit" in said


def test_a_checkpoint_that_is_missing(refused: Refused, run: Path, tiny_config: Path) -> None:
    (run / "checkpoints" / "best.ckpt").unlink()
    said = refused("validate", "--config", tiny_config, "--ckpt_path", "best")
    assert "there is no best checkpoint in any run in /" in said
    assert "logs/tiny; run 'medlit fit', or give the --run_dir of a fit" in said
    said = refused("validate", "--config", tiny_config, "--ckpt_path", "elsewhere.ckpt")
    assert "ckpt_path: there is no file elsewhere.ckpt" in said


def test_labels_that_a_checkpoint_never_learned(refused: Refused, run: Path, tiny_config: Path, tmp_path: Path) -> None:
    source = write_notes(tmp_path / "notes")
    for split, rows in notes().items():
        renamed = {BONE: "Radiology"}
        changed = [row | {"medical_specialty": renamed.get(row["medical_specialty"], HEART)} for row in rows]
        write_csv(source / f"{split}.csv", changed)
    said = refused("test", "--config", tiny_config, "--ckpt_path", "best", "--data.source", source)
    assert "data.columns.label: the data has the label 'Radiology', which" in said


def test_a_folder_without_an_adapter(fit: Refused, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "model.adapter: empty holds no adapter_config.json" in fit("--model.adapter", "empty")


def test_an_adapter_that_is_neither_here_nor_within_reach(fit: Refused) -> None:
    assert "model.adapter: nobody/no-adapter is neither a folder nor" in fit("--model.adapter", "nobody/no-adapter")


def test_an_adapter_whose_weights_are_cut_short(refused: Refused, run: Path, tiny_config: Path) -> None:
    weights = run / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    said = refused("test", "--config", tiny_config, "--model.adapter", run / "adapter")
    assert "adapter_model.safetensors is missing or broken" in said


def test_an_adapter_of_another_base_model(refused: Refused, run: Path, tiny_config: Path, tmp_path: Path) -> None:
    other = write_llama(tmp_path / "other")
    arguments = [
        "--config",
        tiny_config,
        "--model.adapter",
        run / "adapter",
        "--model.language_model.base_model",
        other,
    ]
    assert "model.language_model.base_model: the adapter" in refused("test", *arguments)


def test_an_adapter_whose_metadata_is_damaged(refused: Refused, run: Path, tiny_config: Path) -> None:
    (run / "adapter" / "medlit.json").write_text('{"base_model": ')
    said = refused("test", "--config", tiny_config, "--model.adapter", run / "adapter")
    assert "medlit.json" in said


# An `adapter_config.json` -> the error about it.
PEFT = {"peft_type": "LORA", "r": 4, "lora_alpha": 64, "target_modules": ["q_proj"]}
MERGE = "merge the adapter into its base model with PEFT (merge_and_unload)"


@pytest.mark.parametrize(
    ("values", "flags", "what"),
    [
        ({}, ["--model.lora.alpha", "16"], "model.lora.alpha: the adapter theirs was trained with 64 and the config"),
        ({}, ["--model.lora.r=8"], "trained with 4 and the config says 8; leave out what the adapter sets, or"),
        ({"use_rslora": True}, ["--model.lora.rslora", "false"], "model.lora.rslora: the adapter theirs was trained"),
        ({"use_dora": True}, ["--model.lora.dora", "false"], "model.lora.dora: the adapter theirs was trained"),
        ({}, ["--model.lora", "{alpha: 32}"], "model.lora.alpha: the adapter theirs was trained with 64"),
        ({"modules_to_save": ["lm_head"]}, [], MERGE),
        ({"trainable_token_indices": [1]}, [], "trainable_token_indices is [1], which medlit does not run"),
        ({"init_lora_weights": "pissa"}, [], "init_lora_weights is 'pissa', which medlit does not run"),
        ({"exclude_modules": ["lm_head"]}, [], "exclude_modules is"),
        ({"layers_pattern": "blocks"}, [], "layers_pattern is 'blocks'"),
        ({"layer_replication": [[0, 1]]}, [], "layer_replication is"),
        ({"lora_bias": True}, [], "lora_bias is True"),
        ({"a_later_setting": 3}, [], "a_later_setting is 3"),
        ({"peft_type": "LOHA"}, [], "peft_type is 'LOHA'"),
        ({"lora_alpha": 22.5}, [], "lora_alpha is 22.5"),
        ({"r": "many"}, [], "r is 'many'"),
        ({"rank_pattern": {"q_proj": 0}}, [], "rank_pattern is"),
        ({"target_modules": None}, [], "target_modules is missing"),
        ({"base_model_name_or_path": "owner/other"}, [], "theirs belongs to 'owner/other' and the config says"),
        (None, [], "adapter_config.json is missing or broken"),
    ],
    ids=str,
)
def test_an_adapter_that_cannot_be_run_as_it_was_trained(
    refused: Refused,
    tiny_config: Path,
    tmp_path: Path,
    values: dict[str, object] | None,
    flags: list[str],
    what: str,
) -> None:
    (tmp_path / "theirs").mkdir()
    text = "[" if values is None else json.dumps(PEFT | values)
    (tmp_path / "theirs" / "adapter_config.json").write_text(text)
    assert what in refused("test", "--config", tiny_config, "--model.adapter", "theirs", *flags)


def test_a_variable_that_differs_from_the_adapter(
    refused: Refused, tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(PEFT))
    monkeypatch.setenv("MEDLIT_TEST__MODEL__LORA__ALPHA", "16")
    said = refused("test", "--config", tiny_config, "--model.adapter", tmp_path)
    assert "was trained with 64 and the config says 16" in said


@pytest.mark.parametrize(
    ("flag", "value", "what"),
    [
        ("target_modules", "[self_attn]", "no linear layer called 'self_attn'"),
        ("target_modules", "[lm_head]", "no linear layer called 'lm_head'"),
        ("target_modules", "q_proj", "no linear layer called 'q_proj'"),
        ("target_modules", "[q_proj,c_attn]", "it has down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj."),
        ("rank_pattern", "{q_projj: 4}", "'q_projj'"),
        ("alpha_pattern", "{'(': 4}", "'('"),
        ("layers_to_transform", "[2]", "the base model has 2 layers, from 0 to 1"),
    ],
)
def test_a_setting_of_lora_that_fits_no_layer(fit: Refused, flag: str, value: str, what: str) -> None:
    said = fit(f"--model.lora.{flag}", value)
    assert f"model.lora.{flag}: " in said
    assert what in said


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "value", "what"),
    [
        ("--val_every_steps", "0", "val_every_steps: must be an integer of at least 1 or null, not 0"),
        ("--model.lora.r", "0", "model.lora.r"),
        (
            "--model.language_model.offload",
            "some",
            "model.language_model.offload: must be 'auto' or 'none' or an integer of at least 0, not some",
        ),
        (
            "--model.language_model.memory_budget_gib",
            "0",
            "model.language_model.memory_budget_gib: must be a number over 0 or null, not 0",
        ),
        ("--data.batching.micro_batch_size", "0", "data.batching.micro_batch_size"),
        ("--data.batching.global_batch_size", "0", "data.batching.global_batch_size"),
        ("--data.batching.eval_batch_size", "0", "data.batching.eval_batch_size"),
        ("--model.decoding.max_new_tokens", "0", "model.decoding.max_new_tokens"),
        ("--trainer.overfit_batches", "2", "trainer.overfit_batches"),
        ("--trainer.limit_train_batches", "3", "trainer.limit_train_batches: it would cut optimizer steps in two"),
        ("--trainer.val_check_interval", "10", "trainer.val_check_interval: a fit validates by optimizer steps"),
        ("--trainer.check_val_every_n_epoch", "2", "leave it out and set val_every_steps"),
        ("--checkpoint.save_top_k", "3", "checkpoint.save_top_k: 'best' is a single checkpoint"),
        (
            "--checkpoint.save_weights_only",
            "true",
            "checkpoint.save_weights_only: a checkpoint already holds only the trained weights",
        ),
        ("--trainer.enable_checkpointing", "false", "trainer.enable_checkpointing"),
        ("--model.optimizer.learning_rate", "0", "model.optimizer.learning_rate: must be a number over 0, not 0"),
        ("--model.optimizer.warmup_steps", "-1", "model.optimizer.warmup_steps: must be an integer of at least 0"),
        ("--model.lora.dropout", "1", "model.lora.dropout: must be a number from 0 to under 1, not 1"),
        ("--model.lora.r", "2.5", "model.lora.r: must be an integer of at least 1, not 2.5"),
        ("--model.lora", "null", "model.lora: null is the bare base model, and a fit trains an adapter"),
        ("--trainer.max_steps", "0", "trainer.max_steps: must be at least 1, or -1"),
        ("--trainer.max_steps", "-1", "trainer.max_steps: -1 needs another limit; set trainer.max_epochs or"),
        ("--trainer.max_time", "00:00:00:00", "trainer.max_time: must be over 0, or null, not 00:00:00:00"),
        ("--trainer.max_time", "soon", "trainer: `Timer(duration='soon')` is not a valid duration"),
        ("--trainer.log_every_n_steps", "0", "trainer.log_every_n_steps: must be at least 1, not 0"),
        ("--trainer.log_every_n_steps", "-1", "trainer.log_every_n_steps: must be at least 1, not -1"),
        ("--trainer.num_sanity_val_steps", "-2", "trainer.num_sanity_val_steps: must be at least 0, or -1 for all"),
        ("--trainer.use_distributed_sampler", "true", "trainer.use_distributed_sampler: medlit's samplers"),
        ("--trainer.barebones", "true", "trainer.barebones: it would turn off validations and checkpoints"),
        ("--trainer.accelerator", "tpu", "trainer.accelerator: must be 'auto', 'gpu' or 'cpu', not 'tpu'"),
        ("--trainer.profiler", "xla", "trainer.profiler: must be 'simple', 'advanced', 'pytorch' or null, not 'xla'"),
        ("--trainer.precision", "transformer-engine", "trainer: Requirement 'transformer_engine"),
        ("--seed_everything", "-1", "seed_everything: must be an integer from 0 to 4294967295, true or false, not -1"),
        ("--seed_everything", "4294967296", "seed_everything: must be an integer from 0 to 4294967295"),
        ("--early_stopping.patience", "-1", "early_stopping.patience: must be at least 0, not -1"),
        ("--early_stopping.check_on_train_epoch_end", "true", "early_stopping.check_on_train_epoch_end: a fit stops"),
        ("--checkpoint.save_on_train_epoch_end", "true", "checkpoint.save_on_train_epoch_end: the best checkpoint is"),
        ("--checkpoint.save_last", "true", "checkpoint.save_last: the last weights are always kept"),
        *(
            ("--trainer.strategy", name, f"trainer.strategy: must be 'auto' or 'ddp', not {name!r}")
            for name in ("ddp_spawn", "ddp_fork", "ddp_notebook", "deepspeed", "fsdp", "xla", "dp", "DDPStrategy")
        ),
        ("--trainer.strategy.class_path", "lightning.pytorch.strategies.FSDPStrategy", "FSDPStrategy would divide"),
        *(
            ("--trainer.logger", name, f"trainer: {name}: Requirement '{package}")
            for name, package in (("WandbLogger", "wandb"), ("MLFlowLogger", "mlflow"), ("CometLogger", "comet"))
            if importlib.util.find_spec(package) is None
        ),
        ("--trainer.logger", "NoLogger", "trainer.logger: there is no class NoLogger"),
        ("--trainer.logger", "CSVLogger", "trainer.logger: CSVLogger: the following arguments are required: save_dir"),
        ("--trainer.plugins+", "TorchCheckpointIO", "trainer.plugins: TorchCheckpointIO would be replaced"),
        *(
            ("--trainer.callbacks+", name, f"trainer.callbacks: {name} {reason}")
            for name, reason in (
                ("Timer", "cannot be built from a config; leave it out and set trainer.max_time"),
                ("BatchSizeFinder", "needs a setting that medlit does not have"),
                ("LearningRateFinder", "needs a setting that medlit does not have"),
                ("WeightAveraging", "would average quantised weights"),
                ("EMAWeightAveraging", "would average quantised weights"),
                ("BackboneFinetuning", "would train weights other than the adapter's"),
            )
        ),
        ("--trainer.callbacks+", "NoCallback", "trainer.callbacks: there is no class NoCallback"),
        ("--model", "{lora: {r: 8}, lora: {alpha: 8}}", "lora: given in line 1 of the given text and"),
        ("--data.split.shares", "[0.5, 0.2, 0.2]", "data.split.shares"),
    ],
)
def test_a_value_that_makes_no_sense(fit: Refused, flag: str, value: str, what: str) -> None:
    assert what in fit(flag, value)


@pytest.mark.parametrize(
    ("name", "settings", "what"),
    [
        ("EarlyStopping", {"monitor": "val_loss"}, "EarlyStopping cannot monitor 'val_loss'; choose"),
        ("ModelCheckpoint", {"monitor": "val_loss"}, "ModelCheckpoint cannot monitor 'val_loss'; choose"),
        ("EarlyStopping", {"monitor": "val/loss", "mode": "least"}, "EarlyStopping: `mode` can be min, max"),
        ("ModelCheckpoint", {"monitor": "val/loss", "mode": "least"}, "ModelCheckpoint: `mode` can be min, max"),
        ("StochasticWeightAveraging", {"swa_lrs": 1e-2}, "StochasticWeightAveraging would average"),
        ("GradientAccumulationScheduler", {"scheduling": {0: 2}}, "would cut optimizer steps in two"),
        ("ModelPruning", {"pruning_fn": "l1_unstructured"}, "ModelPruning would prune quantised weights"),
    ],
)
def test_a_callback_that_cannot_work(
    fit: Refused, tmp_path: Path, name: str, settings: dict[str, object], what: str
) -> None:
    callback = {"class_path": f"lightning.pytorch.callbacks.{name}", "init_args": settings}
    (tmp_path / "callback.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [callback], "logger": False}}))
    assert what in fit("--config", "callback.yaml")


def test_ddp_in_processes_that_are_spawned(fit: Refused, tmp_path: Path) -> None:
    strategy = {"class_path": "lightning.pytorch.strategies.DDPStrategy", "init_args": {"start_method": "spawn"}}
    (tmp_path / "ddp.yaml").write_text(yaml.safe_dump({"trainer": {"strategy": strategy}}))
    assert "DDPStrategy start_method must be 'popen', not 'spawn'" in fit("--config", "ddp.yaml")


@pytest.mark.parametrize(
    "name",
    [
        "seed_everything",
        "checkpoint",
        "early_stopping.patience",
        "early_stopping.min_delta",
        "trainer.default_root_dir",
        "trainer.devices",
        "overwrite",
    ],
)
def test_a_null_where_a_value_is_needed(fit: Refused, name: str) -> None:
    assert fit("--config", f"{name}: null").startswith(f"medlit: {name}: must ")


def test_a_share_of_the_batches_that_is_none(fit: Refused) -> None:
    assert "trainer: You requested to check 0.001" in fit("--trainer.limit_val_batches", "0.001")


def test_predictions_to_a_folder(refused: Refused, tiny_config: Path, tmp_path: Path) -> None:
    (tmp_path / "made.csv").mkdir()
    said = refused("predict", "--config", tiny_config, "--output", "made.csv")
    assert "output: made.csv is not a file; name a file for the table" in said


@pytest.mark.parametrize(
    ("flag", "key"), [("--trainer.default_root_dir", "trainer.default_root_dir"), ("--run_dir", "run_dir")]
)
def test_a_run_folder_that_cannot_be_made(fit: Refused, tmp_path: Path, flag: str, key: str) -> None:
    (tmp_path / "runs").write_text("a file")
    said = fit(flag, "runs/here")
    assert f"{key}: runs/here" in said
    assert f"{tmp_path / 'runs'} is a file" in said


@pytest.mark.parametrize("url", ["s3://bucket/runs", "gs://bucket/runs"])
@pytest.mark.parametrize("flag", ["trainer.default_root_dir", "run_dir", "trainer.logger.save_dir"])
def test_a_run_folder_that_is_a_url(fit: Refused, flag: str, url: str) -> None:
    logger = ["--trainer.logger", "CSVLogger"] if "logger" in flag else []
    said = fit(*logger, f"--{flag}", url)
    assert said.startswith(f"medlit: {flag.replace('logger.', 'logger.init_args.')}: {url} is a URL")


def test_predictions_to_a_folder_of_the_home(
    refused: Refused, tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "made.csv").touch()
    said = refused("predict", "--config", tiny_config, "--output=~/made.csv")
    assert said.startswith(f"medlit: output: {tmp_path / 'made.csv'} exists")


def test_predictions_to_a_url(refused: Refused, tiny_config: Path) -> None:
    said = refused("predict", "--config", tiny_config, "--output", "s3://bucket/answers.csv")
    assert said.startswith("medlit: output: s3://bucket/answers.csv is a URL")


@pytest.mark.parametrize("name", ["best", "last"])
def test_a_fit_over_another_one(fit: Refused, tmp_path: Path, name: str) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / f"{name}.ckpt").touch()
    assert "run_dir: run holds the checkpoints of another fit" in fit("--run_dir", "run")


def test_a_fit_beside_another_one(fit: Refused, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with sole_fit(tmp_path / "run", None):
        assert "run_dir: another fit is writing to run; wait for its end" in fit("--run_dir", "run")


def test_predictions_to_a_place_that_cannot_be_written(refused: Refused, tiny_config: Path, tmp_path: Path) -> None:
    (tmp_path / "filed").write_text("a file")
    said = refused("predict", "--config", tiny_config, "--output", "filed/out.csv")
    assert "output: filed/out.csv cannot be written" in said


@pytest.mark.parametrize("spelling", ["mine.csv", "x/../mine.csv", "link.csv", "hard.csv"])
@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
def test_predictions_over_the_notes(
    refused: Refused, tiny_config: Path, tmp_path: Path, spelling: str, overwrite: tuple[str, ...]
) -> None:
    source = table(tmp_path / "mine.csv")
    (tmp_path / "x").mkdir()
    (tmp_path / "link.csv").symlink_to("mine.csv")
    (tmp_path / "hard.csv").hardlink_to(source)
    flags = ["--data.predict.source", source, "--output", spelling, *overwrite]
    assert f"output: {spelling} is among the notes of {source}" in refused("predict", "--config", tiny_config, *flags)


@pytest.mark.parametrize("name", ["test.csv", "new.csv"])
def test_predictions_into_the_folder_of_the_notes(
    refused: Refused, tiny_config: Path, tmp_path: Path, name: str
) -> None:
    source = write_notes(tmp_path / "notes")
    flags = ["--data.source", source, "--output", f"notes/{name}", "--overwrite"]
    assert f"is among the notes of {source}" in refused("predict", "--config", tiny_config, *flags)


def test_predictions_over_another_file_or_a_folder(refused: Refused, tiny_config: Path, tmp_path: Path) -> None:
    (tmp_path / "filed.csv").write_text("by hand")
    (tmp_path / "folder.csv").mkdir()
    said = refused("predict", "--config", tiny_config, "--output", "filed.csv")
    assert "output: filed.csv exists; name another file, or add --overwrite to replace it" in said
    said = refused("predict", "--config", tiny_config, "--output", "folder.csv", "--overwrite")
    assert "output: folder.csv" in said


@pytest.mark.parametrize(
    ("verb", "name"), [("fit", "config_fit.yaml"), ("validate", "validate_metrics.json"), ("test", "report.md")]
)
def test_a_run_folder_with_a_file_of_one_s_own(
    refused: Refused, tiny_config: Path, tmp_path: Path, verb: str, name: str
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text("by hand")
    said = refused(verb, "--config", tiny_config, "--run_dir", "mine")
    assert f"run_dir: 'medlit {verb}' would replace mine/{name}, which it did not write" in said


def test_a_fit_over_the_adapter_that_it_starts_from(refused: Refused, run: Path, tiny_config: Path) -> None:
    said = refused("fit", "--config", tiny_config, "--model.adapter", run / "adapter", "--run_dir", run)
    assert "run_dir: the fit would replace its own model.adapter" in said


@pytest.mark.parametrize("text", ["model: {lora: [", "just a sentence", "- a\n- list"])
def test_a_config_that_is_no_mapping(run_medlit: Medlit, tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    outcome = run_medlit("fit", "--config", path)
    assert outcome.code == 2
    assert "Traceback" not in outcome.err
    assert "config" in outcome.err


def test_a_config_that_is_missing(run_medlit: Medlit) -> None:
    outcome = run_medlit("fit", "--config", "nowhere.yaml")
    assert outcome.code == 2
    assert "nowhere.yaml" in outcome.err


def test_the_messages_are_for_users_and_a_bug_keeps_its_traceback(
    run_medlit: Medlit, tiny_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("medlit.cli.cli.MedlitCLI.after_instantiate_classes", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        run_medlit("fit", "--config", tiny_config)


# --- settings that the parser does not understand ---------------------------------------------------------------------


def test_an_unknown_setting_is_one_sentence_and_not_pages_of_usage(fit: Refused) -> None:
    said = fit("--data.txt_column", "note")
    assert said.startswith("medlit: data.txt_column: there is no such setting; did you mean data.columns?")
    assert "usage" not in said
    assert "data.source" in fit("--data.source")
    assert "model.lora.r" in fit("--model.lora.r", "lots")


def test_the_beginning_of_a_name_is_no_name(fit: Refused) -> None:
    assert fit("--trainer.max_step", 3).startswith(
        "medlit: trainer.max_step: there is no such setting; did you mean trainer.max_steps?"
    )
    assert fit("--model.lora.rank", 8).startswith("medlit: model.lora.rank: there is no such setting")


@pytest.mark.parametrize(
    ("setting", "meant"),
    [
        ("trainer: {max_step: 5}", "trainer.max_steps"),
        ("model: {lora: {rank: 5}}", "model.lora.r"),
        ("dat: 5", "data"),
        ("trainer: {max-steps: 5}", "trainer.max_steps"),
    ],
)
def test_a_setting_of_a_config_that_there_is_not(fit: Refused, tmp_path: Path, setting: str, meant: str) -> None:
    (config := tmp_path / "own.yaml").write_text(setting)
    said = fit("--config", config)
    assert f": there is no such setting; did you mean {meant}?" in said
    assert "does not accept" not in said


def test_a_config_without_its_flag(fit: Refused) -> None:
    assert fit("configs/models/phi4.yaml").startswith(
        "medlit: configs/models/phi4.yaml: put --config before each config;"
    )
    assert fit("--data.foo.yaml", 3).startswith("medlit: data.foo.yaml: there is no such setting;")


@pytest.mark.parametrize("verb", ["fit", "test", "predict"])
def test_notes_in_place_of_settings_are_not_printed(refused: Refused, tmp_path: Path, verb: str) -> None:
    (tmp_path / "notes.csv").write_text('note,department\n"Lady of 38 years, irregular pulse",Cardiology\n')
    message = refused(verb, "--config", "notes.csv")
    assert message.startswith("medlit: config: notes.csv holds no settings (name: value); a table of notes belongs in")
    for flag in ("--data", "--data.columns", "--model", "--trainer", "--trainer.callbacks", "--trainer.logger"):
        message += refused(verb, flag, "notes.csv")
    (tmp_path / "notes.yaml").write_text("Lady of 38 years: irregular pulse, Cardiology\n")
    for flag in ("--config", "--data", "--model"):
        message += (said := refused(verb, flag, "notes.yaml"))
        assert said.startswith("medlit: config: a setting's name has no spaces;")
    assert "Lady" not in message
    assert "Cardiology" not in message
    for text in ("", "# nothing\n", "- data\n"):
        (tmp_path / "none.yaml").write_text(text)
        assert refused(verb, "--config", "none.yaml").startswith("medlit: config: none.yaml holds no settings")


@pytest.mark.parametrize("verb", ["fit", "predict"])
def test_all_settings_that_may_be_files_are_known(verb: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The parser reads a file given for a group, or for a class, and quotes it in its errors."""
    from medlit.cli.cli import MedlitCLI

    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.csv").write_text("note\n")
    found: list[str] = []

    def parse(cli: MedlitCLI, *_: object) -> NoReturn:
        parser = cli._subcommand_parsers[verb]
        classes = (each.dest for each in parser._actions if "lightning." in str(getattr(each, "_typehint", "")))
        found.extend({*parser.groups} - {verb} | {name for name in classes if not name.endswith(".help")})
        raise UserError("parsed")

    monkeypatch.setattr(MedlitCLI, "parse_arguments", parse)
    with pytest.raises(UserError, match="parsed"):
        MedlitCLI([verb])
    assert "trainer.callbacks" in found
    for name in ("config", *found):
        for flags in ((f"--{name}", "notes.csv"), (f"--{name}=notes.csv",)):
            with pytest.raises(UserError, match=f"{name}: notes.csv is not named as a YAML file; a table of notes be"):
                check_configs([verb, *flags])
    with pytest.raises(UserError, match=r"config: notes\.csv is not named as a YAML file"):
        check_configs([verb, "-c", "notes.csv"])
    check_configs([verb, "--data.source", "notes.csv", "--output", "notes.csv", "--data.predict.text", "notes.csv"])


def test_a_config_that_is_missing_or_no_yaml(refused: Refused, tmp_path: Path) -> None:
    assert "nowhere.yaml" in refused("fit", "--config", "nowhere.yaml")
    (tmp_path / "broken.yaml").write_text("data: [\n")
    assert refused("fit", "--config", "broken.yaml").startswith("medlit: config: broken.yaml, line 2: no valid YAML (")
    (tmp_path / "broken.yaml").write_text("data:\n\tsource: notes\n")
    assert "config: broken.yaml, line 2: no valid YAML (found character" in refused("fit", "--config", "broken.yaml")
    (tmp_path / "broken.yaml").write_text("trainer:\n  max_steps: 3\nmodel\ndata:\n  source: notes\n")
    assert "line 3: no valid YAML (could not find expected ':')" in refused("fit", "--config", "broken.yaml")
    (tmp_path / "broken.yaml").write_text("2024-13-45: no day\n")
    assert "config: broken.yaml: no valid YAML (month must be in 1..12)" in refused("fit", "--config", "broken.yaml")


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "utf-16-le"])
def test_a_config_in_another_encoding(refused: Refused, tmp_path: Path, encoding: str) -> None:
    (tmp_path / "own.yaml").write_text("data: {labels: {aliases: {Pädiatrie: Pediatrics}}}\n", encoding=encoding)
    said = refused("fit", "--config", "own.yaml")
    assert said == "medlit: config: own.yaml is not text in UTF-8; save it as such."


def test_labels_that_yaml_does_not_read_as_text(refused: Refused, tmp_path: Path) -> None:
    for rules, fault in {
        "aliases: {17: Cardiology}": "data.labels.aliases: 17 is not text in YAML; put what the table has in quotes.",
        "aliases: {Yes: Cardiology}": "data.labels.aliases: True is not text in YAML",
        "aliases: {Heart: 17}": "data.labels.aliases: must be a mapping of texts; quote numbers, not 17",
        "drop: [17]": "data.labels.drop: must be a list of texts; quote numbers, not 17",
    }.items():
        (tmp_path / "own.yaml").write_text(f"data: {{labels: {{{rules}}}}}\n")
        assert fault in refused("fit", "--config", "own.yaml")


@pytest.mark.parametrize("note", ["-chest pain", "-chest: pain", "-heart pain"])
def test_a_note_that_begins_like_a_flag_is_not_repeated(refused: Refused, note: str) -> None:
    said = refused("predict", "--data.predict.text", note)
    assert "argument --data.predict.text: expected one argument; write one that begins with a dash as" in said
    assert "pain" not in said


def test_a_note_without_quotes_is_not_repeated(refused: Refused) -> None:
    said = refused("predict", "--data.predict.text", "Patient", "John", "Smith")
    assert said.startswith("medlit: data.predict.text: a note of several words needs quotes, and this flag before it; ")
    assert "John" not in said


def test_one_value_for_all_settings_of_the_model(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("model: 3\n")
    assert refused("fit", "--config", "a.yaml").startswith("medlit: model: must be a group of settings, not 3; ")
    (tmp_path / "a.yaml").write_text("model.decoding: 3\n")
    assert "model.decoding: must be a group of settings, not 3; " in refused("fit", "--config", "a.yaml")
    for name, kind in (("model.lora", "a group of settings or null"), ("data.columns", "a group of settings")):
        assert refused("fit", f"--{name}", "none").startswith(f"medlit: {name}: must be {kind}, not 'none'; ")


@pytest.mark.parametrize("verb", ["fit", "predict", "doctor", "audit", "baseline", "export"])
@pytest.mark.parametrize("flags", [["--config", "own.yaml"], ["-c", "own.yaml"], ["--config=own.yaml"]])
def test_a_missing_config_is_reported_before_anything_is_imported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verb: str, flags: list[str]
) -> None:
    from medlit.__main__ import main

    monkeypatch.setattr("importlib.import_module", lambda name: pytest.fail(f"{name} was imported"))
    with pytest.raises(SystemExit) as stop:
        main([verb, *flags])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "medlit: config: there is no file own.yaml; give the path of a YAML file.\n"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["export"], "the following arguments are required: --to, --output; see 'medlit export --help'."),
        (["serve"], "the following arguments are required: --run_dir; see 'medlit serve --help'."),
        (["audit", "--output"], "argument --output: expected one argument; see 'medlit audit --help'."),
        (["serve", "--run_dir", "r", "--port", "x"], "argument --port: invalid int value: 'x'; see 'medlit serve"),
    ],
)
def test_a_missing_or_malformed_flag_of_a_tool(capsys: pytest.CaptureFixture[str], args: list[str], says: str) -> None:
    from medlit.__main__ import main

    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"medlit: {says}")
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "token", "says"),
    [
        (["--host", "0.0.0.0"], "", "host: 0.0.0.0 is open to other machines; set MEDLIT_SERVE_TOKEN"),
        (["--host", "::"], "", "host: :: is open to other machines; set MEDLIT_SERVE_TOKEN"),
        (["--host", "0.0.0.0"], "short", "MEDLIT_SERVE_TOKEN: must be at least 16 ASCII letters"),
        (["--port", "80"], "", "port: must be from 1024 to 65535, not 80"),
        (["--port", "70000"], "", "port: must be from 1024 to 65535, not 70000"),
        ([], "", "run_dir: there is no folder nowhere"),
    ],
)
def test_a_service_that_cannot_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: list[str], token: str, says: str
) -> None:
    from medlit.__main__ import main

    monkeypatch.setenv("MEDLIT_SERVE_TOKEN", token)
    with pytest.raises(SystemExit) as stop:
        main(["serve", "--run_dir", "nowhere", "--port", "48652", *flags])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"medlit: {says}")
    assert said.count("\n") == 1


def test_a_cache_that_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from medlit.__main__ import main

    (tmp_path / "taken").write_text("")
    monkeypatch.setenv("MEDLIT_CACHE", str(tmp_path / "taken" / "cache"))
    monkeypatch.delenv("UNSLOTH_COMPILE_LOCATION", raising=False)
    with pytest.raises(SystemExit) as stop:
        main(["fit"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("medlit: MEDLIT_CACHE: the cache folder")


@pytest.mark.parametrize(
    ("verb", "missing", "flags", "says"),
    [
        ("fit", "train", [], "has no train split"),
        ("fit", "validation", [], "has no validation split"),
        ("validate", "validation", [], "has no validation split"),
        ("test", "test", [], "has no test split"),
        ("predict", "test", [], "has no test split"),
        ("predict", None, ["--data.predict.source", "incoming.csv"], "there is no file or folder incoming.csv"),
        ("fit", None, ["--data.batching.global_batch_size", "25"], "the training split has 24 notes"),
        ("fit", None, ["--data.max_response_tokens", "2"], "data.max_response_tokens: the label "),
        ("validate", None, ["--data.max_response_tokens", "2"], "data.max_response_tokens: the label "),
        ("test", None, ["--data.max_response_tokens", "2"], "data.max_response_tokens: the label "),
        ("predict", None, ["--model.language_model.max_length", "50"], "50 tokens leave no room for a note"),
    ],
)
def test_notes_are_refused_before_weights_are_read(
    refused: Refused,
    tiny_config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    verb: str,
    missing: str | None,
    flags: list[str],
    says: str,
) -> None:
    monkeypatch.setattr("medlit.model.module.load_model", lambda *_: pytest.fail("weights were read"))
    source = write_notes(tmp_path / "notes")
    if missing is not None:
        (source / f"{missing}.csv").unlink()
    assert says in refused(
        verb, "--config", tiny_config, "--data.source", source, "--data.split.kind", "official", *flags
    )


def test_an_audit_whose_output_folder_is_a_file_is_refused_before_it_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from medlit.__main__ import main

    (tmp_path / "taken").write_text("")
    with pytest.raises(SystemExit) as stop:
        main(["audit", "--data.source", "builtin", "--output", str(tmp_path / "taken")])
    assert stop.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert f"output: {tmp_path / 'taken' / 'audit.json'} cannot be written" in said.err
