"""Runs of several processes on one machine: forks of this one that find one another.

A fork has imported everything, so that four cost little more than one.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from compare import Weights
from fakes import notes, write_csv

from medlit.model.module import SpecialtyClassifier

Place = dict[str, str]
DDP = ["--trainer.strategy", "ddp", "--trainer.devices"]
# The config for two hosts of 8 GPUs, and of it only what a GPU is needed for set otherwise: two processes each.
SLURM_CONFIG = Path(__file__).parents[1] / "configs" / "hardware" / "slurm.yaml"
SLURM = ["--config", SLURM_CONFIG, "--trainer.accelerator", "cpu", "--trainer.devices", 2]
PATIENCE = 100.0  # seconds
STEPS = 3


def write_forty(folder: Path) -> Path:
    """All forty notes to train on, and 7 and 5 of them, which neither 2 nor 3 divides, to validate and test."""
    rows = [row for split in notes().values() for row in split]
    for split, part in (("train", rows), ("validation", rows[5:12]), ("test", rows[20:25])):
        write_csv(folder / f"{split}.csv", [row | {"id": f"{split} {i}"} for i, row in enumerate(part)])
    return folder


def write_config(path: Path, tiny_config: Path, source: Path) -> Path:
    """The tiny config with those notes: three steps of 32."""
    settings = yaml.safe_load(tiny_config.read_text())
    settings["trainer"]["max_steps"] = settings["val_every_steps"] = STEPS
    settings["data"] |= {"source": str(source), "split": {"kind": "official"}}
    settings["data"]["batching"] |= {"micro_batch_size": 8, "global_batch_size": 32}
    path.write_text(yaml.safe_dump(settings))
    return path


def by_hand(size: int) -> list[Place]:
    """The variables that tell each of several processes of one host its place."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "NODE_RANK": "0"}
    return [place | {"LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)} for rank in range(size)]


def by_srun(size: int, nodes: int) -> list[Place]:
    """The variables that `srun` sets for each process, on hosts of the loopback network: 127.0.0.1, 127.0.0.2, ..."""
    each = size // nodes
    hosts = f"127.0.0.[1-{nodes}]" if nodes > 1 else "127.0.0.1"
    place = {
        "SLURM_JOB_ID": free_job(),
        "SLURM_JOB_NAME": "medlit",
        "SLURM_JOB_NODELIST": hosts,
        "SLURM_NODELIST": hosts,
        "SLURM_STEP_NODELIST": hosts,
        "SLURM_NNODES": str(nodes),
        "SLURM_NTASKS": str(size),
        "SLURM_NTASKS_PER_NODE": str(each),
    }
    return [
        place | {"SLURM_PROCID": str(rank), "SLURM_NODEID": str(rank // each), "SLURM_LOCALID": str(rank % each)}
        for rank in range(size)
    ]


def free_job() -> str:
    """A job number whose port is free: Lightning listens on 15000 and its last four digits."""
    for job in range(os.getpid(), os.getpid() + 10_000):
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", 15_000 + job % 10_000)):
                return str(job)
    raise OSError("no port is free")


class Ranks:
    """Runs one command in several processes.

    Args:
        folder: for what each of them leaves: output, exit code, first gradient, and the files that it wrote.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(
        self,
        size: int,
        *arguments: object,
        prepare: Callable[[int], object] = lambda rank: None,
        nodes: int | None = None,
    ) -> list[int]:
        """Exit codes of a command's processes.

        Args:
            size: how many of them.
            arguments: the command line.
            prepare: what a process does first, given its rank.
            nodes: start them as `srun` does on so many hosts; None: each is told its place by hand.
        """
        flags = [*DDP, size] if nodes is None else []
        command = [str(argument) for argument in [*arguments, *flags]]
        places = by_hand(size) if nodes is None else by_srun(size, nodes)
        children = {rank: self._start(rank, place, command, prepare) for rank, place in enumerate(places)}
        codes, end = dict.fromkeys(children), time.monotonic() + PATIENCE
        while None in codes.values() and time.monotonic() < end:
            for rank, child in children.items():
                if codes[rank] is None and (done := os.waitpid(child, os.WNOHANG))[0]:
                    codes[rank] = os.waitstatus_to_exitcode(done[1])
            time.sleep(0.02)
        hung = [rank for rank, code in codes.items() if code is None]
        for rank in hung:
            os.kill(children[rank], signal.SIGKILL)
            os.waitpid(children[rank], 0)
        assert not hung, f"ranks {hung} hang"
        return [int(code or 0) for code in codes.values()]

    def _start(self, rank: int, place: Place, command: list[str], prepare: Callable[[int], object]) -> int:
        child = os.fork()
        if child:
            return child
        code = 1
        try:
            os.environ |= place
            with (self.folder / f"log{rank}").open("w") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
            written = watch_files()
            keep_first_gradient(self.folder / f"gradient{rank}.pt")
            prepare(rank)
            from medlit.cli.cli import main

            main(command)
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            (self.folder / f"written{rank}.json").write_text(json.dumps(sorted(written)))
            sys.stderr.flush()
            os._exit(code)

    def log(self, rank: int) -> str:
        return (self.folder / f"log{rank}").read_text()

    def gradient(self, rank: int = 0) -> Weights:
        return torch.load(self.folder / f"gradient{rank}.pt", weights_only=True)

    def written(self, rank: int, under: Path) -> set[str]:
        paths = json.loads((self.folder / f"written{rank}.json").read_text())
        return {path for path in paths if Path(path).is_relative_to(under)}


def watch_files() -> set[str]:
    """Every path that this process opens to write, or that a file of its takes the place of."""
    written: set[str] = set()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            written.add(os.path.abspath(arguments[0]))
        if event == "os.rename":
            written.add(os.path.abspath(arguments[1]))

    sys.addaudithook(hook)
    return written


def keep_first_gradient(path: Path) -> None:
    """Save the first optimizer step's gradient, of all processes and before it is clipped."""
    hook = SpecialtyClassifier.on_before_optimizer_step

    def keep(self: SpecialtyClassifier, optimizer: torch.optim.Optimizer) -> None:
        if self.global_step == 0:
            torch.save({name: p.grad for name, p in self.named_parameters() if p.grad is not None}, path)
        hook(self, optimizer)

    SpecialtyClassifier.on_before_optimizer_step = keep  # type: ignore[method-assign]
