"""The notebook's cells with the settings that it names for a T4, within the memory that a T4 leaves to a process.

LLAMA_TOKENIZER=folder pytest -m gpu -s tests/gpu/test_t4.py
"""

import json
import re
from pathlib import Path

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
T4_GIB = 14.5
NOTES = 120


def test_the_notebook_on_a_t4(
    llama_8b: Path, long_notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notebook = json.loads((ROOT / "examples" / "medlit.ipynb").read_text())
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]
    (on_a_t4,) = (
        block for kind, text in cells if kind == "markdown" for block in re.findall(r"```python\n(.*?)```", text, re.S)
    )
    code = [text for kind, text in cells if kind == "code" and "IPython" not in text]
    assert code[0].startswith("CONFIG =")
    table = tmp_path / "notes.jsonl"
    table.write_text("".join(long_notes.read_text().splitlines(keepends=True)[:NOTES]))
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "examples").mkdir()
    monkeypatch.chdir(tmp_path / "examples")

    names: dict = {}
    exec("import medlit, torch", names)
    torch = names["torch"]
    torch.cuda.set_per_process_memory_fraction(T4_GIB * 2**30 / torch.cuda.get_device_properties(0).total_memory)
    exec(on_a_t4, names)
    # Turing has no kernel for packed notes; a newer GPU has.
    names["SETTINGS"] |= {
        "data__source": str(table),
        "data__batching__packing": False,
        "model__language_model__base_model": str(llama_8b),
        "trainer__max_steps": 3,
        "val_every_steps": 3,
    }
    for cell in code[1:]:
        exec(cell, names)
    peak = torch.cuda.max_memory_reserved() / 2**30
    tested = names["tested"].metrics
    print(f"\npeak {peak:.2f} GiB reserved; test loss {tested['loss']:.3f}, {tested['n']} notes; {names['again']}")
    assert peak <= T4_GIB
    assert names["again"] == names["answer"]
    assert Path("runs/my-adapter/adapter_model.safetensors").exists()
