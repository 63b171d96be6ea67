"""`make faults`: kill a fit at random moments, fifty times, and see that nothing is lost.

Every attempt runs in a fork of this process, which has imported everything, and ends by SIGKILL: at a random moment of
its life, in the middle of a checkpoint's bytes, or right before or after a file takes its predecessor's place. The
next attempt goes on from what is there. After some kills the fit is let run to its end, and must then be the fit that
was never killed: weights, optimizer, schedule and sampler to the bit, every point of every curve, the adapter folder.

    python tests/faults/harness.py --kills 50
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

KILLS_OF_A_FIT = 5
_FIT = {
    "trainer.accelerator": "cpu",
    "trainer.max_steps": 12,
    "trainer.num_sanity_val_steps": 0,
    "trainer.enable_progress_bar": "false",
    "trainer.enable_model_summary": "false",
    "val_every_steps": 3,
    "model.language_model.max_length": 112,
    "model.language_model.gradient_checkpointing": "none",
    "model.lora.r": 64,
    "model.lora.dropout": 0.1,
    "model.optimizer.learning_rate": 2e-2,
    "model.decoding.max_new_tokens": 2,
    "data.max_response_tokens": 8,
    "data.batching.global_batch_size": 8,
    "data.batching.micro_batch_size": 4,
    "data.batching.eval_batch_size": 4,
}


class Harness:
    """Fits of one tiny model that are killed.

    Args:
        folder: for the model, the notes and the runs.
        llama: the base model's folder.
        notes: the notes' folder.
        seed: of the moments.
    """

    def __init__(self, folder: Path, llama: Path, notes: Path, seed: int = 0) -> None:
        settings = _FIT | {"model.language_model.base_model": llama, "data.source": notes}
        self.arguments = ["fit", *(part for key, value in settings.items() for part in (f"--{key}", str(value)))]
        self.folder = folder
        self.draw = random.Random(seed)
        self.whole = folder / "whole" / "version_0"
        began = time.monotonic()
        code = self._attempt(self.whole, lambda: None, None)
        self.seconds = time.monotonic() - began
        if code:
            raise RuntimeError(f"the fit that nobody kills ended with {code}: {self._log(self.whole).read_text()}")

    def kill(self, kills: int) -> int:
        """Kill so many attempts; returns how many of them were survived."""
        done = survived = fits = 0
        while done < kills:
            run = self.folder / f"fit_{fits}" / "version_0"
            fits += 1
            here = 0
            while here < min(KILLS_OF_A_FIT, kills - done):
                prepare, delay = self._death()
                if self._attempt(run, prepare, delay) == -signal.SIGKILL:
                    here += 1
                    self._check(run)
                elif self._complete(run):
                    break
            code = 0 if self._complete(run) else self._attempt(run, lambda: None, None)
            if code and not self._complete(run):  # the last kill may have left nothing to do
                print(f"fit {fits}: went on to code {code}\n{self._log(run).read_text()[-2000:]}")
                done += here
                continue
            from compare import differences

            found = differences(run, self.whole)
            print(f"fit {fits}: {here} kills, {'as if there were none' if not found else found[:5]}", flush=True)
            done += here
            survived += here if not found else 0
            shutil.rmtree(run.parent)
        return survived

    # --- one attempt --------------------------------------------------------------------------------------------------

    def _death(self) -> tuple[Callable[[], None], float | None]:
        """What the child does to itself, and after how many seconds it is killed from outside."""
        nth = self.draw.randint(1, 12)
        kind = self.draw.choice(["moment", "moment", "bytes", "before", "after"])
        if kind == "moment":
            return (lambda: None), self.draw.uniform(0, self.seconds)
        return (lambda: die_in_a_write(kind, nth)), None

    def _attempt(self, run: Path, prepare: Callable[[], None], delay: float | None) -> int:
        """Run the fit, or what is left of it, in a fork; returns its exit code, negative for a signal."""
        arguments = [*self.arguments, "--run_dir", str(run)]
        if (run / "checkpoints" / "last.ckpt").exists():
            arguments += ["--ckpt_path", "last"]
        self._log(run).parent.mkdir(parents=True, exist_ok=True)
        self._log(run).touch()
        child = os.fork()
        if not child:
            _fit(arguments, prepare, self._log(run))
        if delay is not None:
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    @staticmethod
    def _log(run: Path) -> Path:
        return run.parent / "log.txt"

    @classmethod
    def _complete(cls, run: Path) -> bool:
        """It reached its end, or was killed when it had nothing left to do."""
        return (run / "complete").exists() or "has been trained for 12 steps" in cls._log(run).read_text()

    @staticmethod
    def _check(run: Path) -> None:
        """Every checkpoint is whole, and so is the adapter."""
        from safetensors.torch import load_file

        from medlit.model.checkpoints import read_checkpoint

        for path in (run / "checkpoints").glob("[!.]*.ckpt"):
            read_checkpoint(path)
        if (weights := run / "adapter" / "adapter_model.safetensors").parent.exists():
            load_file(weights)


def _fit(arguments: list[str], prepare: Callable[[], None], log: Path) -> None:
    """The child: fit, leave a word that the end was reached, and go without a farewell."""
    from medlit.cli.cli import main

    code = 1
    try:
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        prepare()
        (main(arguments).run_folder / "complete").touch()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(code)


def die_in_a_write(kind: str, nth: int) -> None:
    """Make this process kill itself at its nth checkpoint's bytes, or beside the nth file that takes its place."""
    seen = 0

    def due() -> bool:
        nonlocal seen
        seen += 1
        return seen == nth

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    write, move = Path.write_bytes, os.replace

    def half(path: Path, data: memoryview) -> int:
        if due():
            write(path, data[: len(data) // 2])
            die()
        return write(path, data)

    def beside(old: Path, new: Path) -> None:
        this = due()
        if this and kind == "before":
            die()
        move(old, new)
        if this:
            die()

    if kind == "bytes":
        Path.write_bytes = half  # type: ignore[method-assign]
    else:
        os.replace = beside  # type: ignore[assignment]


def main() -> None:
    """Kill, and say how many kills were survived."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="medlit-faults-") as name:
        folder = Path(name)
        os.environ |= {variable: str(folder / variable) for variable in ("MEDLIT_CACHE", "HF_HOME")}
        from medlit.unsloth_first import import_unsloth

        import_unsloth()
        from fakes import write_llama, write_notes

        harness = Harness(folder, write_llama(folder / "llama"), write_notes(folder / "notes"), options.seed)
        survived = harness.kill(options.kills)
    print(f"{survived} of {options.kills} kills survived")
    raise SystemExit(survived != options.kills)


if __name__ == "__main__":
    main()
