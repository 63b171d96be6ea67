"""Fixtures of all tests: separate caches, no network, and the tiny model with its notes.

`import unsloth` takes ten seconds and is done once, by the first test that needs a model.
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import yaml

# Read when these libraries are imported, so set before any test module is.
_CACHE = Path(tempfile.mkdtemp(prefix="medlit-tests-"))
atexit.register(shutil.rmtree, _CACHE, ignore_errors=True)
for _name in [name for name in os.environ if name.startswith("MEDLIT_")]:
    del os.environ[_name]
os.environ |= {
    "MEDLIT_CACHE": str(_CACHE / "medlit"),
    "HF_HOME": str(_CACHE / "huggingface"),
    "HF_DATASETS_CACHE": str(_CACHE / "datasets"),
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "UNSLOTH_DISABLE_STATISTICS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Layers this small gain nothing from a second thread, and on a busy machine the waiting costs 30 times the work.
    "OMP_NUM_THREADS": "1",
}

from fakes import write_llama, write_notes  # noqa: E402

from medlit import errors  # noqa: E402
from medlit.unsloth_first import import_unsloth  # noqa: E402

errors.SLOW = 3600.0  # on a busy machine a tiny fit has slow stages too, whose lines tests would count

if TYPE_CHECKING:
    from processes import Ranks
    from torch import Tensor

    Fp8Call = tuple[Tensor, Tensor]


class Outcome(NamedTuple):
    """What a command left: exit code, standard output, standard error."""

    code: int
    out: str
    err: str


Medlit = Callable[..., Outcome]


_PARSERS: dict[object, dict[str, object]] = {}  # verb -> what setting up its parser left


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not draw the figures of reports and validations: `tests/report` draws each of them, and `fitted` some."""
    import numpy as np
    from matplotlib.figure import Figure

    draw = Figure.savefig

    def savefig(figure: Figure, file: Any, **settings: Any) -> None:  # noqa: ANN401
        if settings.get("format") == "svg":
            file.write(b"<svg/>")
        else:
            draw(figure, file, **settings)

    monkeypatch.setattr(Figure, "savefig", savefig)
    monkeypatch.setattr("medlit.callbacks.report.confusion_figure", lambda results, title: Figure(figsize=(1, 1)))
    monkeypatch.setattr("medlit.callbacks.report.pixels", lambda figure: np.zeros((8, 8, 3), dtype=np.uint8))


@pytest.fixture
def run_medlit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, undrawn: None) -> Medlit:
    """Run a command in this process; only user errors end in an exit code, others are raised.

    Two things are saved, of which other tests look at the result: a verb's parser is set up once, and pictures are not
    drawn.
    """
    from lightning.pytorch.cli import LightningCLI

    from medlit.cli.cli import MedlitCLI, main

    setup_parser = LightningCLI.setup_parser

    def setup_once(cli: MedlitCLI, *arguments: object, **settings: object) -> None:
        before, verb = dict(vars(cli)), vars(cli)["verb"]
        if verb not in _PARSERS:
            setup_parser(cli, *arguments, **settings)  # type: ignore[arg-type]
            _PARSERS[verb] = {name: value for name, value in vars(cli).items() if before.get(name) is not value}
        vars(cli).update(_PARSERS[verb])

    monkeypatch.setattr(LightningCLI, "setup_parser", setup_once)

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = 0
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Outcome(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the tiny model, with Unsloth imported."""
    import_unsloth()
    return write_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def fp8_kernel(monkeypatch: pytest.MonkeyPatch) -> list[Fp8Call]:
    """A stand-in for Unsloth's product with FP8 weights, which needs a GPU; the weights and scales that it is given."""
    from torch.nn import functional

    given: list[Fp8Call] = []

    def fp8_linear(hidden: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        given.append((weight, scale))
        return functional.linear(hidden, weight.to(scale.dtype) * scale, bias)

    contents: dict[str, dict[str, object]] = {"unsloth.kernels": {}, "unsloth.kernels.fp8": {"fp8_linear": fp8_linear}}
    for name, content in contents.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return given


@pytest.fixture(scope="session")
def notes_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the forty notes, one CSV file a split."""
    return write_notes(tmp_path_factory.mktemp("notes"))


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory, llama: Path, notes_folder: Path) -> Path:
    """A config of the tiny model and the forty notes: 11 steps of 8 notes in 2 micro-batches, validated every 4."""
    path = tmp_path_factory.mktemp("configs") / "tiny.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "trainer": {
                    "accelerator": "cpu",
                    "max_steps": 11,
                    "num_sanity_val_steps": 0,
                    "enable_progress_bar": False,
                    "enable_model_summary": False,
                },
                "val_every_steps": 4,
                "model": {
                    "language_model": {"base_model": str(llama), "max_length": 112, "gradient_checkpointing": "none"},
                    "optimizer": {"learning_rate": 2e-2, "warmup_steps": 0},
                    "decoding": {"max_new_tokens": 8},
                },
                "data": {
                    "source": str(notes_folder),
                    "max_response_tokens": 8,
                    "batching": {"global_batch_size": 8, "micro_batch_size": 4, "eval_batch_size": 4},
                },
            }
        )
    )
    return path


@pytest.fixture(scope="session")
def fitted(tmp_path_factory: pytest.TempPathFactory, tiny_config: Path) -> Path:
    """The run folder of one tiny fit, for tests that only read it."""
    from medlit.cli.cli import main

    root = tmp_path_factory.mktemp("fitted")
    main(["fit", "--config", str(tiny_config), "--trainer.default_root_dir", str(root)])
    return root / "tiny" / "version_0"


@pytest.fixture
def run(fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that run as the newest of `logs/` in a working folder of the test's own."""
    folder = tmp_path / "logs" / "tiny" / "version_0"
    shutil.copytree(fitted, folder)
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.fixture
def ranks(tmp_path: Path) -> Ranks:
    """Runs one command in several processes."""
    from processes import Ranks

    return Ranks(tmp_path)
