"""The notebook uses names, settings and files that exist, its kept outputs name no machine, and it runs to its end."""

from __future__ import annotations

import ast
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

import medlit

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples" / "medlit.ipynb"
CELLS: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]
TREE = ast.parse("\n".join(CODE))


def settings() -> dict[str, object]:
    """The notebook's `CONFIG` and `SETTINGS`."""
    assigned = [
        node for node in ast.walk(TREE) if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    ]
    values = {node.targets[0].id: node.value for node in assigned}  # type: ignore[attr-defined]
    return {name: ast.literal_eval(values[name]) for name in ("CONFIG", "SETTINGS")}


def test_it_uses_public_names_of_medlit_alone() -> None:
    used = set()
    for node in ast.walk(TREE):
        if isinstance(node, ast.ImportFrom | ast.Import):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [str(node.module)]
            assert not [name for name in modules if name.startswith("medlit.")], "a reader meets public names only"
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "medlit":
            used.add(node.attr)
    assert used >= {"fit", "datamodule", "SpecialtyPredictor"}
    assert used <= {*medlit.__all__}


def test_every_field_of_a_run_and_an_answer_exists() -> None:
    from medlit.cli.cli import Run
    from medlit.data.datamodule import TranscriptionDataModule

    fields = {
        "run": (*Run._fields, "test"),
        "tested": Run._fields,
        "data": dir(TranscriptionDataModule),
        "answer": medlit.Prediction.__annotations__,
        "again": medlit.Prediction.__annotations__,
    }
    for node in ast.walk(TREE):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert node.attr in fields.get(node.value.id, [node.attr])


@pytest.mark.parametrize("verb", ["fit", "audit"])
def test_its_settings_are_understood(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from medlit.cli.arguments import parse_settings

    monkeypatch.chdir(NOTEBOOK.parent)
    config, given = settings().values()
    flags = [f"--{name.replace('__', '.')}={value}" for name, value in given.items()]  # type: ignore[attr-defined]
    assert parse_settings(verb, [*(f"--config={path}" for path in config), *flags])  # type: ignore[attr-defined]


def test_links_and_configs_lead_somewhere() -> None:
    text = "".join("".join(cell["source"]) for cell in CELLS)
    links = re.findall(r"\]\(([^)#\s]+)", text) + re.findall(r'"(\.\./[^"]+)"', text)
    assert len(links) > 5
    assert not [link for link in links if not (NOTEBOOK.parent / link).exists()]


def test_its_outputs_are_kept_and_name_no_machine() -> None:
    outputs = [output for cell in CELLS if cell["cell_type"] == "code" for output in cell["outputs"]]
    assert [output["output_type"] for output in outputs].count("error") == 0
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert all(cell["execution_count"] for cell in CELLS if cell["cell_type"] == "code")
    shown = json.dumps([{**output, "data": {**output.get("data", {}), "image/png": ""}} for output in outputs])
    assert not re.search(r"/(?:home|root|tmp|work|usr|opt|Users)/|%\||Warning", shown)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_it_runs_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", ":".join(sys.path))
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "examples").mkdir()
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    place = {"metadata": {"path": str(tmp_path / "examples")}}
    nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3", resources=place).execute()
    run = tmp_path / "examples" / "logs" / "quickstart" / "version_0"
    assert (run / "report.html").is_file()
    assert (run / "adapter" / "medlit.json").is_file()
