"""`make quickstart`: test the bare model, fine-tune it, test it again, file the test notes, compare.

One process does it all, so the ten seconds that importing takes are paid once.
"""

from __future__ import annotations

import gc
import time
from pathlib import Path

from rich.console import Console

from medlit.unsloth_first import import_unsloth

CONFIG = ["--config", "configs/quickstart.yaml"]
ZERO_SHOT = ["--config", "configs/debug/zero_shot.yaml"]


def main() -> None:
    """Run the verbs and report."""
    console = Console()
    if not Path(CONFIG[1]).is_file():
        console.print(f"medlit: {CONFIG[1]} is not here; run the quickstart in the project's folder.")
        raise SystemExit(2)
    began = time.monotonic()
    import_unsloth()
    before = _run(console, "1/5  test the model as it comes", ["test", *CONFIG, *ZERO_SHOT])
    run = _run(console, "2/5  fine-tune it", ["fit", *CONFIG])
    trained = ["--ckpt_path", "best", "--run_dir", str(run)]
    _run(console, "3/5  test it again", ["test", *CONFIG, *trained])
    _run(console, "4/5  file the test notes", ["predict", *CONFIG, *trained])
    console.rule("5/5  beside simpler systems", align="left")
    from medlit.tools.baseline import run as baseline

    baseline(["--run_dir", str(run), "--beside", str(before)])

    for what, where in (
        ("report", run / "report.html"),
        ("confusion matrix", run / "confusion_test.png"),
        ("adapter (PEFT)", run / "adapter"),
        ("predictions", run / "predictions.csv"),
        ("TensorBoard", "make tensorboard, or .venv/bin/tensorboard --logdir logs"),
    ):
        console.print(f"  {what:<18}{where}", highlight=False, soft_wrap=True)
    console.print(f"\nDone in {(time.monotonic() - began) / 60:.1f} minutes.", highlight=False)


def _run(console: Console, title: str, arguments: list[str]) -> Path:
    """Run a verb; returns its run folder."""
    from medlit.cli.cli import main as run

    console.rule(title, align="left")
    folder = run(arguments).run_folder
    # The model of the verb before would stay beside the next one's until the collector happens to run.
    gc.collect()
    return folder


if __name__ == "__main__":
    main()
