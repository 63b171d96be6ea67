"""`make quickstart`: test the base model, fine-tune it, test it again, classify the test notes, compare.

All in one process, so the ten seconds of imports are spent once.
"""

import gc
import time
from pathlib import Path

from rich.console import Console

from medlit.cli import end_on_signals
from medlit.unsloth_first import import_unsloth

CONFIG = ["--config", "configs/quickstart.yaml"]
ZERO_SHOT = ["--config", "configs/debug/zero_shot.yaml"]
NEXT = """

Next:
  open the report          {run_dir}/report.html
  classify a note          source .venv/bin/activate
                           medlit predict --config configs/quickstart.yaml --ckpt_path best \\
                             --data.predict.text 'Patient 30 years old, since Monday: the heart races.'
  train on your own notes  docs/data.md"""


def main() -> None:
    """Run the commands and list what they wrote; exits with code 2 outside the project's folder."""
    console = Console()
    if not Path(CONFIG[1]).is_file():
        message = f"medlit: {CONFIG[1]} does not exist; run the quickstart in the project's folder."
        console.print(message, soft_wrap=True)
        raise SystemExit(2)
    start = time.monotonic()
    console.print("Quickstart: five steps, about 15 minutes on two CPU cores, one or two on a GPU", highlight=False)
    import_unsloth()
    before = _run(console, "1/5  test the base model before fine-tuning (zero-shot)", ["test", *CONFIG, *ZERO_SHOT])
    run_dir = _run(console, "2/5  fine-tune it", ["fit", *CONFIG])
    trained = ["--ckpt_path", "best", "--run_dir", str(run_dir)]
    _run(console, "3/5  test it again", ["test", *CONFIG, *trained])
    _run(console, "4/5  classify the test notes", ["predict", *CONFIG, *trained])
    console.rule("5/5  compare with simpler systems", align="left")
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


def _run(console: Console, title: str, arguments: list[str]) -> Path:
    """Run a command; returns its run folder."""
    from medlit.cli.cli import main as medlit

    console.rule(title, align="left")
    folder = medlit(arguments).run_folder
    # Free the model now; otherwise it stays in memory beside the next command's until the collector runs.
    gc.collect()
    return folder


if __name__ == "__main__":
    end_on_signals()
    main()
