"""`make quickstart`: test the base model, fine-tune it, test it again, classify the test notes, compare.

All in one process, so the ten seconds of imports are spent once.
"""

import time
from pathlib import Path

from rich.console import Console

from medlit.cli import end_on_signals
from medlit.unsloth_first import import_unsloth

CONFIG = ["--config", "configs/quickstart.yaml"]
ZERO_SHOT = ["--config", "configs/debug/zero_shot.yaml"]
NEXT = """
Next:
  1. Look at the report    {run_dir}/report.html
  2. Use your own notes    medlit audit --data.source notes.csv
                           medlit fit --config configs/quickstart.yaml --run_dir logs/my-notes \\
                             --data.source notes.csv --model.language_model.max_length 1024
                           (columns of other names, in both commands: --data.columns.text NOTE
                           --data.columns.label SPECIALTY; tables that are read: docs/data.md)
  3. Train a larger model  on an NVIDIA GPU of 8 GB or more (docs/hardware.md lists models and their memory):
                           medlit doctor --config configs/llama31_8b.yaml
                           medlit fit --config configs/llama31_8b.yaml --data.source notes.csv
The medlit command is in .venv: source .venv/bin/activate"""
_CPU = "on two CPU cores; seconds on a GPU"


def main() -> None:
    """Run the commands and list what they wrote; exits with code 2 outside the project's folder."""
    console = Console()
    if not Path(CONFIG[1]).is_file():
        message = f"medlit: {CONFIG[1]} does not exist; run the quickstart in the project's folder."
        console.print(message, soft_wrap=True)
        raise SystemExit(2)
    start = time.monotonic()
    console.print("Quickstart: five steps, 7 to 15 minutes on two idle CPU cores, one or two on a GPU", highlight=False)
    import_unsloth()
    before = _run(
        console,
        "1/5  test the base model before fine-tuning (zero-shot)",
        f"130 test notes; 1 to 2 minutes {_CPU}",
        ["test", *CONFIG, *ZERO_SHOT],
    )
    run_dir = _run(console, "2/5  fine-tune it", f"120 steps of 4 notes; 5 to 8 minutes {_CPU}", ["fit", *CONFIG])
    trained = ["--ckpt_path", "best", "--run_dir", str(run_dir)]
    _run(console, "3/5  test it again", f"the same test notes; 1 minute {_CPU}", ["test", *CONFIG, *trained])
    _run(
        console,
        "4/5  classify the test notes",
        f"into a table, predictions.csv; 1 minute {_CPU}",
        ["predict", *CONFIG, *trained],
    )
    _announce(console, "5/5  compare with simpler systems", "TF-IDF, the majority class, zero-shot; seconds")
    from medlit.evaluation.metrics import METRIC
    from medlit.report.systems import systems
    from medlit.tools.baseline import run as baseline

    baseline(["--run_dir", str(run_dir), "--beside", str(before)])

    scores = (f"{system.title} {METRIC['accuracy'].value(system.metrics)}" for system in systems(run_dir))
    files = f"""
Accuracy: {", ".join(scores)}

  report            {run_dir / "report.html"}
  confusion matrix  {run_dir / "confusion_test.png"}
  adapter (PEFT)    {run_dir / "adapter"}
  predictions       {run_dir / "predictions.csv"}
  TensorBoard       make tensorboard, or .venv/bin/tensorboard --logdir logs"""
    console.print(files + NEXT.format(run_dir=run_dir), highlight=False, soft_wrap=True)
    console.print(f"\nDone in {(time.monotonic() - start) / 60:.1f} minutes.", highlight=False)


def _announce(console: Console, title: str, text: str) -> None:
    console.rule(title, align="left")
    console.print(text, highlight=False)


def _run(console: Console, title: str, text: str, arguments: list[str]) -> Path:
    """Run a command; returns its run folder."""
    from medlit.cli.cli import main as medlit

    _announce(console, title, text)
    start = time.monotonic()
    folder = medlit(arguments).run_folder
    console.print(f"({(time.monotonic() - start) / 60:.1f} minutes)", highlight=False)
    return folder


if __name__ == "__main__":
    end_on_signals()
    main()
