"""Training speed of an 8B model within 10, 24 and 80 GiB, beside TRL on PEFT and on Unsloth, in one run.

    LLAMA_TOKENIZER=folder python benchmarks/train.py --out benchmarks/results/train.json
    python benchmarks/train.py --table benchmarks/results/train.json      the result for README.md
    python benchmarks/train.py --only levers --out FILE                   the levers alone, in four minutes
    python benchmarks/train.py --family qwen3_8b --out FILE               eight layers of another (families.py)
    python benchmarks/train.py --tiny --out FILE                          the same code on a CPU, in a minute or two

Weights are random and of the 8B's shape (`shapes.py`), notes as long as real ones; every system sees the same 32
notes in the same optimizer step. Real tokens are counted: neither padding nor filler. medlit runs as `medlit fit` runs:
its module and its data module under Lightning's Trainer, with clipping, logging and the throughput callback. The file
is written again after each system, so results are kept if the time runs out. Also in it: estimated against
measured memory, agreement of the fast way's gradients with the plain way's, each lever alone, and the host's share.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

BEGIN = time.perf_counter()
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "src"), str(HERE.parent / "tests")]

from shapes import FAMILIES, FUSED, write_notes, write_tiny_family  # noqa: E402 - found by the path above
from train_trl import TUNED  # noqa: E402

GIB = 2**30
NOTES_A_STEP = 32
# GiB and data.batching.micro_batch_size. Few and large micro-batches are fast: each dequantises all weights, and below
# some 5,000 tokens the GPU waits for the host. But they leave memory for fewer layers.
MEDLIT = {"medlit_80gib": (80, 16), "medlit_24gib": (24, 8), "medlit_10gib": (10, 8)}
MEDLIT |= {"medlit_80gib_fp8": (80, 16), "medlit_24gib_fp8": (24, 8)}
# Each in a process that is given the whole GPU; a tuned one is the fastest of several settings.
PEERS = ("unsloth_trl", "unsloth_trl_tuned", "peft_trl", "unsloth_trl_tuned_fp8")
FP8 = "_fp8"  # ends the names of systems with frozen weights in FP8, which run if they are named
# Families whose peers run without flex attention, with which no step ended within minutes of compiling.
WITHOUT_FLEX = ("gemma3_4b",)
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
PARTS = ("systems", "matmul", "loader", "parity", "levers")
ORDER = ("peft_trl", "unsloth_trl", "unsloth_trl_tuned", "medlit_10gib", "medlit_24gib", "medlit_80gib")
ORDER += ("unsloth_trl_tuned_fp8", "medlit_24gib_fp8", "medlit_80gib_fp8")


def main(argv: list[str] | None = None) -> None:
    """Measure, or show a result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "train.json")
    parser.add_argument("--table", type=Path, help="print this result as Markdown and do nothing else")
    parser.add_argument(
        "--systems", nargs="+", choices=[*MEDLIT, *PEERS], help="by default all in 4 bits that run here"
    )
    parser.add_argument("--settings", nargs="+", default=[], choices=TUNED, help="of the tuned peer, by default all")
    parser.add_argument("--only", nargs="+", default=PARTS, choices=PARTS, help="parts to measure")
    parser.add_argument("--steps", type=int, default=8, help="timed optimizer steps")
    parser.add_argument("--warm_up", type=int, default=3, help="steps before them")
    parser.add_argument(
        "--limit", type=float, default=470, help="seconds after which no lever and no setting of a peer is begun"
    )
    parser.add_argument("--family", choices=FAMILIES, help="eight layers of this family instead of the 8B")
    parser.add_argument("--tiny", action="store_true", help="a two-layer model on the CPU")
    args = parser.parse_args(argv)
    if args.table:
        print(table(json.loads(args.table.read_text())))
        return
    if args.systems is None:
        # TRL's loss is a kernel of Triton's, with plain PEFT; an environment for a CPU has no Triton.
        cannot = {"peft_trl"} if importlib.util.find_spec("triton") is None else set()
        args.systems = [each for each in (*MEDLIT, *PEERS) if each not in cannot and not each.endswith(FP8)]
    with tempfile.TemporaryDirectory() as scratch:
        run = Run(args, Path(scratch))
        run.run()
    if failed := run.result.get("failed"):
        raise SystemExit("not measured: " + "; ".join(f"{part} ({why})" for part, why in failed.items()))


def say(*words: object) -> None:
    """Print progress with the elapsed time."""
    print(f"[{time.perf_counter() - BEGIN:4.0f} s]", *words, file=sys.stderr, flush=True)


class Run:
    """One run: what it measures goes into `result`, and that into a file after each part."""

    def __init__(self, args: argparse.Namespace, scratch: Path) -> None:
        self.args, self.scratch, self.llama = args, scratch, scratch / "llama"
        self.result: dict[str, Any] = {"systems": []}
        self.lab: Any = None  # medlit's model, once it is loaded

    # --- the parts ----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Measure everything, the most important first."""
        llama, peers = self._weights(), {}
        only, systems = self.args.only, self.args.systems if "systems" in self.args.only else ()
        try:
            peers = {name: self._start(name) for name in PEERS if name in systems}
            from medlit.unsloth_first import import_unsloth

            import_unsloth()
            import torch

            self.cuda = torch.cuda.is_available() and not self.args.tiny
            llama()
            say("weights written")
            self._describe()
            self._prepare()
            # Before medlit, which keeps its model on the GPU.
            for name, peer in peers.items():
                self.attempt(name, lambda n=name, p=peer: self.peer(n, p))
        finally:
            for peer in peers.values():
                peer.kill()
        ours = {system: how for system, how in MEDLIT.items() if system in systems}
        for system, (gib, batch_size) in ours.items():
            if not system.endswith(FP8):
                self.attempt(system, lambda s=system, g=gib, b=batch_size: self.medlit(s, g, b))
        for name, part in (("matmul", self.matmul), ("loader", self.loader), ("parity", self.parity)):
            if name in only:
                self.attempt(name, part)
        for name, lever in self.levers() if "levers" in only else ():
            if time.perf_counter() - BEGIN < self.args.limit:
                self.attempt(name, lever)
            else:
                self.result.setdefault("not_begun", []).append(name)
        self.lab = None  # the others have another base model
        for system, (gib, batch_size) in ours.items():
            if system.endswith(FP8):
                self.attempt(system, lambda s=system, g=gib, b=batch_size: self.medlit(s, g, b))
        self.result["seconds"] = round(time.perf_counter() - BEGIN)
        self.save()
        print(table(self.result))

    def attempt(self, name: str, part: Callable[[], None]) -> None:
        """Run a part; a failure is recorded and the other parts still run."""
        try:
            part()
        except Exception as error:
            import traceback

            traceback.print_exc()
            self.result.setdefault("failed", {})[name] = f"{type(error).__name__}: {error}"[:500]
        gc.collect()
        if self.cuda:
            import torch

            torch.cuda.empty_cache()
        self.save()

    def save(self) -> None:
        """Write the result so far."""
        self.args.out.parent.mkdir(parents=True, exist_ok=True)
        half = self.args.out.with_suffix(".half")  # families.py reads the file meanwhile
        half.write_text(json.dumps(self.result, indent=2) + "\n", encoding="utf-8")
        half.replace(self.args.out)

    # --- preparation --------------------------------------------------------------------------------------------------

    def _weights(self) -> Callable[[], None]:
        """Start writing the weights; the returned function waits for them."""
        if self.args.tiny:
            from fakes import write_llama

            family = self.args.family
            return lambda: write_tiny_family(self.llama, family) if family else write_llama(self.llama)
        self.llama.mkdir()
        command = [sys.executable, str(HERE / "shapes.py"), str(self.llama)]
        writer = subprocess.Popen(command + ([self.args.family] if self.args.family else []))

        def wait() -> None:
            if writer.wait():
                raise SystemExit("the weights could not be written")

        return wait

    def _describe(self) -> None:
        import torch

        packages = ("torch", "unsloth", "transformers", "peft", "trl", "bitsandbytes", "lightning", "triton")
        versions = {"python": platform.python_version()}
        for name in packages:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions[name] = importlib.metadata.version(name)
        versions["torch"] = torch.__version__
        self.result |= {
            "hardware": torch.cuda.get_device_name() if self.cuda else f"CPU, {platform.machine()}",
            "versions": versions,
            "date": datetime.now(UTC).date().isoformat(),
        }

    def _prepare(self) -> None:
        """Notes, and their tokens step by step."""
        from medlit.base_model import load_tokenizer

        # The prompt and an answer around the text: 66 tokens of Llama 3.1's.
        count, overhead = (self.args.warm_up + self.args.steps) * NOTES_A_STEP, 66
        tokenizer = load_tokenizer(str(self.llama))
        shrink = 8 if self.args.tiny else 1
        self.source = write_notes(self.scratch / "notes", tokenizer, count, overhead // shrink, shrink)
        data = self.datamodule(16)
        data.setup("fit")
        sampler = data.train_dataloader().sampler
        rows, draw = data.rows("train"), random.Random(0)
        steps: list[list[tuple[list[int], int]]] = []
        micro_batches = iter(sampler)
        for _ in range(self.args.warm_up + self.args.steps):
            # In random order: peers do not sort.
            indices = [index for _ in range(sampler.micro_batches) for index in next(micro_batches).indices]
            draw.shuffle(indices)
            batches = [data.collator.train([dict(rows[i], row=i)], 1) for i in indices]
            steps.append([(batch.input_ids[0].tolist(), len(batch.targets)) for batch in batches])
        self.tokens = [sum(len(ids) for ids, _ in step) for step in steps]
        (self.scratch / "steps.json").write_text(json.dumps(steps))
        mean = sum(self.tokens) / len(self.tokens) / NOTES_A_STEP
        self.result["notes"] = {"a_step": NOTES_A_STEP, "mean_tokens": round(mean, 1)}
        say(f"notes of {mean:.0f} tokens")

    def datamodule(self, batch_size: int, **settings: Any) -> Any:  # noqa: ANN401 - imported late
        """The notes as `medlit fit` batches them."""
        from medlit.data.datamodule import TranscriptionDataModule
        from medlit.data.settings import Batching, Split, Tokenizer

        data = TranscriptionDataModule(
            source=str(self.source),
            split=Split("official"),
            batching=Batching(global_batch_size=NOTES_A_STEP, micro_batch_size=batch_size, **settings),
        )
        data.tokenizer = Tokenizer(str(self.llama), max_length=2048 if self.cuda else 512)
        return data

    # --- medlit -------------------------------------------------------------------------------------------------------

    def fit(self, gib: int, batch_size: int, steps: int, fp8: bool = False, **data: Any) -> Any:  # noqa: ANN401
        """Train as `medlit fit` does and return its timer."""
        import train_medlit

        if self.lab is None:
            gc.collect()
            self.lab = train_medlit.Lab(self.llama, self.scratch, self.cuda, fp8)
        return self.lab.fit(self.datamodule(batch_size, **data), steps, gib)

    def medlit(self, system: str, gib: int, batch_size: int) -> None:
        """One of medlit's rows, with estimated and measured memory."""
        clock = self.fit(gib, batch_size, self.args.warm_up + self.args.steps, system.endswith(FP8))
        measured = {
            "step_seconds": clock.seconds,
            "tokens": self.tokens,
            "supervised_tokens": clock.supervised,
            "cells": clock.cells,
            "graphs": clock.graphs,
            "peak_gib": clock.peak / GIB,
            "lora_parameters": clock.lora_parameters,
        }
        row = self.row(system, measured) | {"packs": clock.packs, "micro_batches": -(-NOTES_A_STEP // batch_size)}
        if clock.kept:
            row |= {
                "layers_kept": [min(clock.kept), max(clock.kept)],
                "estimated_gib": round(clock.estimate / GIB, 2),
                "reserved_gib": round(clock.reserved / GIB, 2),
            }
        self.add(row)
        self.result.setdefault("seconds_from_weights_to_first_step", round(clock.ready, 2))

    def rates(self, measured: dict[str, Any]) -> list[float]:
        """Real tokens a second of each timed step."""
        pairs = zip(measured["tokens"], measured["step_seconds"], strict=True)
        return [tokens / seconds for tokens, seconds in pairs][self.args.warm_up :]

    def row(self, system: str, measured: dict[str, Any]) -> dict[str, Any]:
        """A system's row of the result."""
        timed, rates = slice(self.args.warm_up, None), self.rates(measured)
        rate, seconds = statistics.median(rates), measured["step_seconds"]
        return {
            "system": system,
            "notes_per_second": round(statistics.median(NOTES_A_STEP / s for s in seconds[timed]), 2),
            "tokens_per_second": round(rate),
            "spread": [round(min(rates)), round(max(rates))],
            "padding": round(1 - sum(measured["tokens"][timed]) / sum(measured["cells"][timed]), 4),
            "peak_gib": round(measured["peak_gib"], 2),
            "estimated_gib": None,
            "tflops": round(rate * self.flops() / 1e12, 1),
            "steps": len(rates),
            "step_seconds": [round(s, 3) for s in seconds],
            "first_step_seconds": round(seconds[0], 2),
            "graphs_compiled_after_warm_up": measured["graphs"][-1] - measured["graphs"][self.args.warm_up - 1],
            "supervised_tokens": sum(measured["supervised_tokens"][timed]),
            "lora_parameters": measured["lora_parameters"],
        }

    def add(self, row: dict[str, Any]) -> None:
        """Put a row into the result."""
        self.result["systems"].append(row)
        say(row)

    def flops(self) -> int:
        """Useful operations of training an adapter on one token: 30 GFLOP for the 8B.

        Two operations a weight forward and two for the gradients of activations; frozen weights have no gradient. The
        head counts as if every token needed it and recomputation does not count, so that equal results compare.
        """
        from transformers import AutoConfig

        from medlit.model.memory import model_dimensions

        of = model_dimensions(AutoConfig.from_pretrained(self.llama))
        return 4 * of.hidden * (of.layers * (2 * of.queries + 2 * of.keys + 3 * of.inner) + of.vocabulary)

    # --- peers --------------------------------------------------------------------------------------------------------

    def _start(self, name: str) -> subprocess.Popen[bytes]:
        """Let a peer import its libraries; it then waits for a line on standard input."""
        command = [sys.executable, HERE / "train_trl.py", name, self.llama, self.scratch / "steps.json"]
        command += [self.scratch / f"{name}.json", "--warm_up", self.args.warm_up, "--limit", self.args.limit]
        if self.args.family == "phi35_mini_fused":
            command += ["--targets", *FUSED]
        if name.startswith("unsloth_trl_tuned") and self.args.settings:
            command += ["--settings", *self.args.settings]
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if self.args.tiny else {})
        if self.args.family in WITHOUT_FLEX:
            environment["UNSLOTH_ENABLE_FLEX_ATTENTION"] = "0"
        # Nobody's first step is shortened by another's compilation.
        environment |= {cache: str(self.scratch / name / cache) for cache in CACHES}
        return subprocess.Popen(list(map(str, command)), stdin=subprocess.PIPE, env=environment)

    def peer(self, name: str, process: subprocess.Popen[bytes]) -> None:
        """One of the peers' rows: its fastest setting, and the figures of the others."""
        say(name, "begins")
        process.communicate(b"\n")
        file = self.scratch / f"{name}.json"
        if not file.is_file():
            raise RuntimeError(f"{name} ended with code {process.returncode}")
        tried = json.loads(file.read_text())["tried"]
        measured = [each for each in tried if "step_seconds" in each]
        if not measured:
            raise RuntimeError(tried[0]["error"])
        best = max(measured, key=lambda each: statistics.median(self.rates(each)))
        chosen = ("setting", "recompute", "answer_only", "packing", "padding_free", "attention", "layers_recomputed")
        shown = ("tokens_per_second", "padding", "peak_gib", "first_step_seconds", "graphs_compiled_after_warm_up")
        row = self.row(name, best) | {key: best[key] for key in chosen}
        row["micro_batches"] = best["accumulate"]
        row |= {"flex_attention": False} if self.args.family in WITHOUT_FLEX else {}
        if process.returncode:
            row["ended_with_code"] = process.returncode
        if len(tried) > 1:
            rows = {each["setting"]: self.row(name, each) for each in measured}
            row["tried"] = [
                {"setting": each["setting"]}
                | ({"error": each["error"]} if "error" in each else {})
                | {key: rows[each["setting"]][key] for key in shown if each in measured}
                | {key: each[key] for key in ("padding_free", "loaded_gib") if each in measured}
                for each in tried
            ]
        self.add(row)

    # --- other parts ------------------------------------------------------------------------------------------------

    def matmul(self) -> None:
        """TFLOP/s of one large product, for two seconds on a warm card: the practical limit."""
        import torch

        size, device = (8192, "cuda") if self.cuda else (256, "cpu")
        a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
        for seconds in (1.0, 2.0) if self.cuda else (0.1,):
            count, start = 0, time.perf_counter()
            while time.perf_counter() - start < seconds:
                for _ in range(20):
                    a @ b
                count += 20
                if self.cuda:
                    torch.cuda.synchronize()
            spent = time.perf_counter() - start
        self.result["matmul_tflops"] = round(2 * size**3 * count / spent / 1e12, 3)
        say("matmul", self.result["matmul_tflops"], "TFLOP/s")

    def loader(self) -> None:
        """Tokens per second that two workers batch, without training."""
        data = self.datamodule(8, num_workers=2, packing=True)
        data.setup("fit")
        loader = data.train_dataloader()
        sum(len(batch.ids) for batch in loader)  # starts the workers
        start = time.perf_counter()
        tokens = sum(sum(batch.lengths) for batch in loader)
        self.result["loader_tokens_per_second"] = round(tokens / (time.perf_counter() - start))
        say("loader", self.result["loader_tokens_per_second"], "tokens/s")

    def parity(self) -> None:
        """How much the fast path changes the loss and the gradients."""
        import train_parity

        if self.lab is not None:
            data = self.datamodule(8)
            data.setup("fit")
            self.result["parity"] = train_parity.compare(self.lab.module.model, self.lab.module.language_model, data)
            say("parity", self.result["parity"])

    def levers(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """Each lever alone, by name, in two warm-up steps and four timed ones."""
        from medlit.model import packing

        steps = min(6, self.args.warm_up + self.args.steps)

        def measure(name: str, gib: int, batch_size: int, **settings: Any) -> None:  # noqa: ANN401
            clock = self.fit(gib, batch_size, steps, **settings)
            warm_up = min(2, steps - 1)
            rates = [self.tokens[s] / clock.seconds[s] for s in range(warm_up, steps)]
            row = {
                "lever": name,
                "gib": gib,
                "tokens_per_second": round(statistics.median(rates)),
                "padding": round(1 - sum(self.tokens[:steps]) / sum(clock.cells), 4),
                "peak_gib": round(clock.peak / GIB, 2),
                "first_step_seconds": round(clock.seconds[0], 2),
                "graphs_compiled": clock.graphs[-1],
            }
            self.result.setdefault("levers", []).append(row)
            say(row)

        def odd(name: str) -> None:
            packing.MULTIPLE, kept = 1, packing.MULTIPLE
            try:
                measure(name, 80, 16)
            finally:
                packing.MULTIPLE = kept

        def eager(name: str) -> None:
            os.environ["UNSLOTH_BLOCK_COMPILE"] = "0"
            try:
                measure(name, 80, 16)
            finally:
                os.environ["UNSLOTH_BLOCK_COMPILE"] = "1"

        def lever(name: str, part: Callable[..., None], *where: int, **settings: Any) -> tuple[str, Callable[[], None]]:  # noqa: ANN401
            return name, lambda: part(name, *where, **settings)

        # The rest is compared with the first two rows: the same steps, in the same run.
        yield lever("default, 2 micro-batches a step", measure, 80, 16)
        yield lever("default, 4 micro-batches a step", measure, 24, 8)
        yield lever("4 micro-batches, with room for all layers", measure, 80, 8)
        yield lever("8 micro-batches", measure, 24, 4)
        yield lever("6 micro-batches", measure, 24, 6)
        yield lever("2 micro-batches, layers not compiled", eager)
        yield lever("2 micro-batches, tokens not in multiples of 16", odd)
        yield lever("4 micro-batches of padded notes of like length", measure, 80, 8, packing=False)


def table(result: dict[str, Any]) -> str:
    """A result as Markdown."""
    systems = {row["system"]: row for row in result["systems"]}
    recipe, tuned = (systems.get(peer, {}).get("tokens_per_second") for peer in ("unsloth_trl", "unsloth_trl_tuned"))
    matmul = result.get("matmul_tflops")
    versions = result["versions"]
    lines = [
        f"{result['hardware']}, {result['date']}: "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + (f". One 8192 x 8192 x 8192 product: {matmul} TFLOP/s." if matmul else "."),
    ]
    if systems:
        lines += [
            "",
            "| system | notes/s | tokens/s (slowest to fastest step) | x Unsloth + TRL | x tuned | padding | peak GiB |"
            " TFLOP/s | of a matrix product |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
    for name in ORDER:
        if name in systems:
            row = systems[name]
            ratios = [f"{row['tokens_per_second'] / peer:.2f}" if peer else "" for peer in (recipe, tuned)]
            share = f"{row['tflops'] / matmul:.1%}" if matmul else ""
            low, high = row["spread"]
            lines.append(
                f"| `{name}` | {row['notes_per_second']} | {row['tokens_per_second']:,} ({low:,} to {high:,}) |"
                f" {ratios[0]} | {ratios[1]} | {row['padding']:.1%} | {row['peak_gib']} | {row['tflops']} | {share} |"
            )
    medlit = [row for row in result["systems"] if row.get("estimated_gib")]
    if medlit:
        lines += ["", "| system | micro-batches | layers kept | estimated GiB | measured GiB | first step, s |"]
        lines += ["| --- | --- | --- | --- | --- | --- |"]
        lines += [
            f"| `{row['system']}` | {row['micro_batches']} | {row['layers_kept'][0]} to {row['layers_kept'][1]} |"
            f" {row['estimated_gib']} | {row['peak_gib']} | {row['first_step_seconds']} |"
            for row in medlit
        ]
    if "levers" in result:
        lines += ["", "| lever | within GiB | tokens/s | padding | peak GiB | first step, s |"]
        lines += ["| --- | --- | --- | --- | --- | --- |"]
        lines += [
            f"| {row['lever']} | {row['gib']} | {row['tokens_per_second']:,} | {row['padding']:.1%} |"
            f" {row['peak_gib']} | {row['first_step_seconds']} |"
            for row in result["levers"]
        ]
    if "parity" in result:
        lines += ["", "| way | loss, relative | gradient, relative |", "| --- | --- | --- |"]
        lines += [f"| {row['way']} | {row['loss']:+.1e} | {row['gradient']:.1e} |" for row in result["parity"]]
    if "loader_tokens_per_second" in result:
        lines += ["", f"The loader alone, on 2 workers: {result['loader_tokens_per_second']:,} tokens/s."]
    if "seconds_from_weights_to_first_step" in result:
        lines += [
            f"From loaded weights to the first optimizer step: {result['seconds_from_weights_to_first_step']} s,"
            " with an empty compile cache."
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
