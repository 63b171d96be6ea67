"""The model card shows the run's numbers, and nothing of notes or of this machine."""

from __future__ import annotations

import json
import re
import shlex
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
    assert metadata["license"] == "unknown"
    assert "is unknown to medlit" in card.text
    (command,) = re.findall(r"^vllm serve (?:.*\\\n)*.*$", card.text, re.MULTILINE)
    assert shlex.split(command.replace("\\\n", " "))[2:] == [
        *("llama0", "--quantization", "bitsandbytes", "--enable-lora", "--max-lora-rank", "16"),
        *("--lora-modules", "specialties=FOLDER", "--max-model-len", "112"),
    ]
    (request,) = re.findall(r"-d '(.*?)'$", card.text, re.MULTILINE | re.DOTALL)
    assert json.loads(request)["max_tokens"] == 8
    scores = json.loads((tested / "test_metrics.json").read_text())
    assert [round(scores["accuracy"], 4), round(scores["f1_macro"], 4)] == [
        result.metric_value for result in card.data.eval_results
    ]
    assert all(result.dataset_split == "test" for result in card.data.eval_results)
    for expected in ("Not a medical device", "| this model |", "![Confusion matrix](confusion.png)", "hash of test"):
        assert expected in card.text
    assert "\nhf upload OWNER/NAME FOLDER --private --exclude verification.json\n" in card.text
    assert all(name in card.text for name in SPECIALTIES)
    texts = "".join((folder / name).read_text() for name in files(folder) - {"confusion.png"} if "safe" not in name)
    assert not [row["id"] for rows in notes().values() for row in rows if row["transcription"] in texts]
    adapter = json.loads((folder / "medlit.json").read_text())
    assert adapter["data"]["source"] == Path(adapter["data"]["source"]).name
    for name in ("README.md", "verification.json"):
        text = (folder / name).read_text()
        assert not [path for path in (tested.parents[2], Path(adapter["base_model"])) if str(path) in text]


@pytest.mark.usefixtures("in_process")
def test_a_card_warns_of_a_test_on_other_splits(tested: Path) -> None:
    file, warning = tested / "test_facts.json", "the test split is not what the checkpoint was trained with"
    facts = json.loads(file.read_text())
    facts["data"] = {key: fact for key, fact in facts["data"].items() if "test_texts_in" not in key}
    file.write_text(json.dumps(facts | {"data": facts["data"] | {"mismatch": warning}}))
    card = (exported(tested, "adapter") / "README.md").read_text()
    assert f"| warning | {warning} |" in card
    assert "whose text is in train" not in card


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("found", [{"license": "mit", "title": "MIT License"}, {"license_link": "its/LICENSE"}])
def test_a_card_names_a_license_with_and_without_a_link(
    tested: Path, monkeypatch: pytest.MonkeyPatch, found: dict[str, str]
) -> None:
    found = {"license": "other", "title": "Its License"} | found
    monkeypatch.setattr("medlit.tools.export.card.license_of", lambda *_: found)
    card = (exported(tested, "adapter") / "README.md").read_text()
    link = f" ({found['license_link']})" if "license_link" in found else ""
    assert f"The base model is under the {found['title']}{link}, which also applies" in card


@pytest.mark.usefixtures("in_process")
def test_the_card_of_an_adapter_of_the_bundled_model_serves_it_by_its_hub_id(
    tested: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medlit.base_model import hub_id
    from medlit.tools.export.card import TEMPLATES

    bundled = hub_id("builtin:smollm2-135m")
    monkeypatch.setitem(TEMPLATES.globals, "hub_id", lambda _: bundled)
    card = (exported(tested, "adapter") / "README.md").read_text()
    assert f"\nvllm serve {bundled} " in card


@pytest.mark.parametrize("content", ["{", "7", "[1]", ""])
@pytest.mark.parametrize("name", ["test_metrics.json", "config_fit.yaml"])
def test_a_damaged_file_of_the_run_is_named(tmp_path: Path, name: str, content: str) -> None:
    from medlit.report.systems import read_run_file

    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=rf"run_dir: .*{name} is damaged"):
        read_run_file(tmp_path / name)


def test_every_base_model_with_a_config_has_a_license() -> None:
    from medlit.tools import license_of

    configs = [*(ROOT / "configs" / "models").glob("*.yaml")]
    configs += [ROOT / "configs" / name for name in ("llama31_8b.yaml", "quickstart.yaml")]
    names = [yaml.safe_load(path.read_text())["model"]["language_model"]["base_model"] for path in configs]
    assert len(names) > 10
    assert not [name for name in names if license_of(name)["license"] == "unknown"]


@pytest.mark.parametrize(
    ("base_model", "license_id"),
    [
        ("unsloth/Llama-3.2-1B-Instruct-bnb-4bit", "llama3.2"),
        ("unsloth/gemma-3-4b-it-bnb-4bit", "gemma"),
        ("unsloth/medgemma-4b-it-bnb-4bit", "other"),
        ("Qwen/Qwen2.5-7B", "apache-2.0"),
        ("Qwen/Qwen2.5-3B", "unknown"),  # of the same family, under another license
        ("mistralai/Mistral-Small-Instruct-2409", "unknown"),
    ],
)
def test_a_license_is_of_the_family_or_unknown(base_model: str, license_id: str) -> None:
    from medlit.tools import license_of

    found = license_of(base_model)
    assert found["license"] == license_id
    assert ("license_name" in found, "title" in found) == (license_id == "other", license_id != "unknown")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("license: cc-by-4.0", {"license": "cc-by-4.0", "title": "license `cc-by-4.0`"}),
        (
            "license: other\nlicense_name: mine\nlicense_link: LICENSE",
            {"license": "other", "license_name": "mine", "license_link": "LICENSE", "title": "license `mine`"},
        ),
        ("license: [mit, gemma]", {"license": "mit", "title": "MIT License"}),  # by the folder's name
        ("license: unknown", {"license": "mit", "title": "MIT License"}),
        ("[", {"license": "mit", "title": "MIT License"}),
        (None, {"license": "mit", "title": "MIT License"}),
    ],
)
def test_a_local_model_has_the_license_of_its_own_card(tmp_path: Path, text: str | None, found: dict[str, str]) -> None:
    from medlit.tools import license_of

    folder = tmp_path / "phi-4-mine"
    folder.mkdir()
    if text is not None:
        (folder / "README.md").write_text(f"---\n{text}\n---\n# A model\n")
    assert license_of(str(folder)) == found


def test_ollamas_prompt_has_the_tokens_of_training(llama: Path) -> None:
    """Whatever the instruction holds, and with one BOS where a chat template writes another."""
    from transformers import AutoTokenizer

    from medlit.data.prompt import AlpacaPrompt, ChatPrompt
    from medlit.tools.export.card import TEMPLATES

    note = "Patient 30 years old, since Monday: the heart races."
    for kind in (AlpacaPrompt, ChatPrompt):
        tokenizer = AutoTokenizer.from_pretrained(llama)
        tokenizer.chat_template = "<s>{% for m in messages %}{{ m.content + '</s>' }}{% endfor %}"
        for instruction in ("File the note.", 'Say {{ .System }} and """.'):
            prompt = kind(tokenizer, instruction, 112, 8)
            shown = TEMPLATES.get_template("Modelfile.j2").render(prompt=prompt, file="model-f16.gguf")
            template = re.search(r'^TEMPLATE """(.*?)"""$', shown, re.MULTILINE | re.DOTALL)
            assert template is not None
            text = template[1].replace("{{ .Prompt }}", note).replace('{{"{{"}}', "{{")
            text = text.replace(r'{{"\"\"\""}}', '"""')
            assert tokenizer(text)["input_ids"] == prompt.prompt(note).input_ids
            lines = [line for line in shown.splitlines() if line.startswith(("FROM", "PARAMETER"))]
            assert lines == [
                "FROM ./model-f16.gguf",
                "PARAMETER temperature 0",
                "PARAMETER num_ctx 112",
                "PARAMETER num_predict 8",
                'PARAMETER stop "</s>"',
            ]
