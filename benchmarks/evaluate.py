"""Speed and memory of answering notes with each decoder and with the recipe's loop.

    LLAMA_TOKENIZER=folder python benchmarks/evaluate.py
    LLAMA_TOKENIZER=folder python benchmarks/evaluate.py --only validation_in_fit --notes 370 --output FILE
    LLAMA_TOKENIZER=folder python benchmarks/evaluate.py --family granite_8b --only systems padded --output FILE
    python benchmarks/evaluate.py --tiny --output FILE        the same road on a CPU, in seconds

On a GPU: an 8B Llama of the right shape with random weights (in NF4, with a fresh adapter) answers notes of real
lengths (log-normal, median 683 tokens, sigma 0.57, cut at 1,800) under the 13 specialties of the public data set. With
`--family` it is eight layers of that family's real width.

    recipe_32, recipe_4    one note at a time, 32 new tokens each, or 4
    generate               free greedy in batches; a logits processor forces each note to one of the labels that have at
                           least 4 tokens, since random weights leave the list at once, which would flatter
    generate_stepwise      the same without reading the labels ahead: what an answer off the list costs
    constrained, likelihood
    prompts_only           what every decoder begins with: the prompts, once

`padded`, which runs if it is named, repeats `likelihood` and `prompts_only` with padded instead of packed prompts.

Batches are those of a validation: longest first, at most so many padded tokens as `--token_budgets` says, and a note
for every 512 of them: 64 notes for the default of 32,768. Then: does a note
get the same label alone as in a batch; and what does a validation of 370 notes, its loss included, cost beside the 60
optimizer steps of a fit. Writes `benchmarks/results/evaluate.json`, as far as it got.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from builtin_notes import SPECIALTIES as BUILTIN_SPECIALTIES
from shapes import FAMILIES, write_family, write_llama_8b

if TYPE_CHECKING:
    import torch

    from medlit.data.collate import Collator, Prompts, TokenisedNote
    from medlit.model.decoding import Answers

SPECIALTIES = tuple(sorted(BUILTIN_SPECIALTIES))  # the public data set's, in alphabetical order
HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "evaluate.json"
PARTS = ("systems", "padded", "parity", "validation_in_fit")
TINY = {"notes": 5, "recipe_notes": 1, "parity_notes": 3, "fit_steps": 1, "max_length": 256}
BUDGET, TOKENS_A_NOTE = 64 * 512, 512
FIT_STEPS, VALIDATION = 60, 370
WARM_UP = 2  # optimizer steps that are not timed: the first one compiles
# Differences of log-likelihoods below this are rounding in bfloat16, in nats.
TIE = 0.25


class Bench:
    """A loaded model and notes to answer.

    Args:
        base_model: folder of the model.
        notes: number of notes.
        recipe_notes: how many of them the recipe's loop answers.
        max_length: most tokens of prompt and answer.
    """

    def __init__(self, base_model: Path, notes: int, recipe_notes: int, max_length: int) -> None:
        import numpy as np
        import torch
        from shapes import CUT, MEDIAN, SIGMA

        from medlit.base_model import load_tokenizer
        from medlit.data.collate import Collator
        from medlit.data.prompt import AlpacaPrompt
        from medlit.model import language_model
        from medlit.model.decoding.likelihood import LabelScorer
        from medlit.model.decoding.trie import TokenTrie
        from medlit.model.loading import load_model
        from medlit.model.settings import LanguageModel, Lora

        self.device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        self.language_model = LanguageModel(str(base_model), max_length=max_length)
        self.model: Any = load_model(self.language_model, Lora(), self.device)
        language_model.inference_mode(self.model)
        self.tokenizer: Any = load_tokenizer(str(base_model))
        self.prompt = AlpacaPrompt(self.tokenizer, max_length=max_length)
        self.trie = TokenTrie.of([self.prompt.response(name) for name in SPECIALTIES])
        self.scorer = LabelScorer(self.model, self.trie)
        self.collator: Collator = Collator(self.prompt.response, self.tokenizer.pad_token_id)
        draw = np.random.default_rng(3407)
        plain = np.setdiff1d(np.arange(len(self.tokenizer)), self.tokenizer.all_special_ids)
        around = len(self.prompt.header) + len(self.prompt.footer)
        lengths = np.minimum(draw.lognormal(MEDIAN, SIGMA, notes), min(CUT, max_length - 32)).astype(int)
        self.rows: list[TokenisedNote] = [
            {
                "row": row,
                "id": str(row),
                "text_hash": str(row),
                "input_ids": [
                    *self.prompt.header,
                    *draw.choice(plain, max(1, length - around)).tolist(),
                    *self.prompt.footer,
                ],
                "cut_tokens": 0,
                "specialty": SPECIALTIES[row % len(SPECIALTIES)],
            }
            for row, length in enumerate(lengths)
        ]
        self.alone = self.rows[:recipe_notes]
        self.results: dict[str, Any] = {
            "hardware": torch.cuda.get_device_name() if self.device.type == "cuda" else platform.processor() or "CPU",
            "versions": {
                name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "unsloth")
            },
            "date": datetime.date.today().isoformat(),
            "notes": notes,
            "mean_prompt_tokens": round(sum(len(row["input_ids"]) for row in self.rows) / notes, 1),
            "systems": [],
        }

    def batches(self, rows: list[TokenisedNote], budget: int = BUDGET) -> list[list[TokenisedNote]]:
        """The batches of a validation, of so many padded tokens."""
        from medlit.data.samplers import length_sorted_batches

        lengths = [len(row["input_ids"]) for row in rows]
        return [[rows[i] for i in batch] for batch in length_sorted_batches(lengths, budget // TOKENS_A_NOTE, budget)]

    def prompts(self, rows: Sequence[TokenisedNote]) -> Prompts:
        """A batch on the device."""
        made = self.collator.prompts(rows)
        return made._replace(
            input_ids=made.input_ids.to(self.device), attention_mask=made.attention_mask.to(self.device)
        )

    def autocast(self) -> torch.autocast:
        """Lightning's bf16-mixed, on a GPU."""
        import torch

        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def synchronise(self) -> None:
        """Wait for the GPU."""
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def measure(
        self,
        system: str,
        answer: Callable[[list[TokenisedNote]], object],
        batches: list[list[TokenisedNote]],
        budget: int | None,
    ) -> float:
        """Time a system over batches, after a warm-up on the longest and the shortest; print and keep its row."""
        import torch

        with self.autocast():
            for batch in (batches[0], batches[-1]):
                answer(batch)
            self.synchronise()
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            begin = time.perf_counter()
            for batch in batches:
                answer(batch)
            self.synchronise()
        seconds = time.perf_counter() - begin
        peak = torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else 0.0
        rate = sum(map(len, batches)) / seconds
        print(f"| {system} | {budget or ''} | {rate:.2f} | {peak:.2f} |", flush=True)
        self.results["systems"].append(
            {
                "system": system,
                "token_budget": budget,
                "notes_per_second": round(rate, 3),
                "peak_gib": round(peak, 3),
            }
        )
        return seconds


def recipe(bench: Bench, tokens: int) -> Callable[[list[TokenisedNote]], object]:
    """The recipe's loop: one note at a time through transformers' generation."""

    def answer(rows: list[TokenisedNote]) -> None:
        for row in rows:
            prompt = bench.prompts([row])
            out = bench.model.generate(
                input_ids=prompt.input_ids,
                attention_mask=prompt.attention_mask,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                pad_token_id=bench.tokenizer.pad_token_id,
            )
            bench.tokenizer.decode(out[0])

    return answer


def forced(bench: Bench, read_ahead: bool) -> Callable[[Prompts], Answers]:
    """Free generation forced to answer labels of at least four tokens, chosen by the note's index."""
    from medlit.data.labels import LabelSet
    from medlit.model.decoding.generate import Generate
    from medlit.model.decoding.likelihood import LabelScorer
    from medlit.model.decoding.trie import TokenTrie

    long = [ids for ids in map(bench.prompt.response, SPECIALTIES) if len(ids) >= 4]

    class Forced(Generate):
        notes: Sequence[int] = ()

        def next_tokens(self, hidden: torch.Tensor, rows: list[int], answers: list[list[int]]) -> list[int]:
            super().next_tokens(hidden, rows, answers)  # what it costs
            return [long[self.notes[row] % len(long)][len(answers[row])] for row in rows]

        def __call__(self, prompts: Prompts) -> Answers:
            self.notes = prompts.rows
            found = super().__call__(prompts)
            assert (found.label_ids < len(SPECIALTIES)).all()
            return found

    scorer = bench.scorer if read_ahead else LabelScorer(bench.model, TokenTrie.of([]))
    return Forced(bench.model, bench.tokenizer, LabelSet(SPECIALTIES), 32, scorer)


def decoders(bench: Bench) -> dict[str, Callable[[Prompts], Answers]]:
    """System -> decoder."""
    from medlit.data.labels import LabelSet
    from medlit.model.decoding.likelihood import Constrained, Likelihood

    labels = LabelSet(SPECIALTIES)
    return {
        "generate": forced(bench, read_ahead=True),
        "generate_stepwise": forced(bench, read_ahead=False),
        "constrained": Constrained(bench.scorer, labels),
        "likelihood": Likelihood(bench.scorer, labels),
    }


def parity(bench: Bench, answer: Callable[[Prompts], Answers], notes: int) -> dict[str, Any]:
    """Compare answers of a batch with those of each note alone; differences within rounding count as ties."""
    import torch

    rows = bench.batches(bench.rows)[-1][:notes]
    with bench.autocast():
        together = answer(bench.prompts(rows))
        alone = [answer(bench.prompts([row])) for row in rows]
    scores = together.log_likelihoods
    single = torch.cat([one.log_likelihoods for one in alone if one.log_likelihoods is not None])
    labels = torch.cat([one.label_ids for one in alone])
    assert scores is not None
    differ = (labels != together.label_ids).nonzero()[:, 0]
    # How much more likely the batch finds its label than the label of the note alone.
    gaps = (scores[differ, together.label_ids[differ]] - scores[differ, labels[differ]]).abs()
    return {
        "notes": len(rows),
        "same_label": len(rows) - len(differ),
        "ties": int((gaps < TIE).sum()),
        "gaps_of_other_labels": [round(float(gap), 4) for gap in gaps],
        "largest_change_of_a_log_likelihood": round(float((scores - single).abs().max()), 4),
        "median_change_of_a_log_likelihood": round(float((scores - single).abs().median()), 5),
    }


def validation_in_fit(bench: Bench, answer: Callable[[Prompts], Answers], steps: int) -> dict[str, Any]:
    """Seconds of a validation with its loss, and of a fit's optimizer steps around it."""
    import torch

    from medlit.data.collate import Batch
    from medlit.model import language_model
    from medlit.model.settings import Lora

    def validate() -> None:
        for batch in bench.batches(bench.rows):
            # With the labels' log-likelihoods comes the loss.
            answer(bench.prompts(batch))

    def on_device(batch: Batch) -> Batch:
        return Batch(*(part.to(bench.device) if isinstance(part, torch.Tensor) else part for part in batch))

    with bench.autocast():
        validate()
        bench.synchronise()
        begin = time.perf_counter()
        validate()
        bench.synchronise()
    validating = (time.perf_counter() - begin) * VALIDATION / len(bench.rows)

    language_model.train_mode(bench.model, bench.language_model)
    recomputation = language_model.make_recomputation(bench.model, bench.language_model, Lora())
    packed = language_model.can_pack(bench.model)
    collate = bench.collator.packed if packed else bench.collator.train
    seconds, tokens = [], 0
    for rows in step_rows(bench, WARM_UP + steps, packed):
        begin = time.perf_counter()
        for part in rows:
            with bench.autocast():
                loss = language_model.loss_sum(bench.model, on_device(collate(part, 1)), recomputation)
            loss.backward()
            tokens += sum(map(bench.collator.length, part)) if len(seconds) >= WARM_UP else 0
        bench.model.zero_grad()
        bench.synchronise()
        seconds.append(time.perf_counter() - begin)
    fitting = sum(seconds[WARM_UP:]) / steps * FIT_STEPS
    return {
        "validation_seconds": round(validating, 2),
        "fit_seconds": round(fitting, 2),
        "fit_tokens_per_second": round(tokens / sum(seconds[WARM_UP:])),
        "share": round(validating / fitting, 4),
    }


def step_rows(bench: Bench, steps: int, packed: bool) -> Iterator[list[list[TokenisedNote]]]:
    """Micro-batches of some optimizer steps of 32 notes, as in a fit."""
    import numpy as np

    from medlit.data.samplers import StepSampler
    from medlit.data.settings import Batching

    lengths = np.array([bench.collator.length(row) for row in bench.rows])
    batching = Batching(global_batch_size=min(32, len(lengths)), micro_batch_size=8)
    sampler = StepSampler(lengths, lengths, np.zeros_like(lengths), np.arange(len(lengths)), batching, BUDGET, packed)
    micro = [batch for epoch in range(steps) for batch in (sampler.set_epoch(epoch), *sampler)[1:]]
    for step in range(steps):
        part = micro[step * sampler.micro_batches : (step + 1) * sampler.micro_batches]
        yield [[bench.rows[i] for i in batch.indices] for batch in part]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every system and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    default = [part for part in PARTS if part != "padded"]
    parser.add_argument("--only", nargs="+", choices=PARTS, default=default, help="parts to measure")
    parser.add_argument("--family", choices=FAMILIES, help="eight layers of this family instead of the 8B")
    parser.add_argument("--tiny", action="store_true", help="a two-layer model on the CPU, and few notes")
    parser.add_argument("--notes", type=int, default=256)
    parser.add_argument("--token_budgets", type=int, nargs="+", default=[BUDGET], help="of the batches")
    parser.add_argument("--recipe_notes", type=int, default=12)
    parser.add_argument("--parity_notes", type=int, default=32)
    parser.add_argument("--fit_steps", type=int, default=6, help="optimizer steps to time")
    parser.add_argument("--max_length", type=int, default=2048)
    parser.add_argument("--output", type=Path, default=RESULTS)
    if parser.parse_args(arguments).tiny:
        parser.set_defaults(**TINY)
    options = parser.parse_args(arguments)

    from medlit.unsloth_first import import_unsloth

    import_unsloth()
    with tempfile.TemporaryDirectory() as folder:
        base = base_model(Path(folder), options.family, options.tiny)
        bench = Bench(base, options.notes, options.recipe_notes, options.max_length)
    bench.results |= {"family": options.family} if options.family else {}
    print(f"{bench.results['hardware']}, {options.notes} notes of {bench.results['mean_prompt_tokens']} tokens")
    measure(bench, options)


def base_model(folder: Path, family: str | None, tiny: bool) -> Path:
    """Write the weights of the measured model."""
    if not tiny:
        return write_family(folder, family) if family else write_llama_8b(folder)
    from fakes import write_llama

    return write_llama(folder)


def measure(bench: Bench, options: argparse.Namespace) -> None:
    """Measure the requested parts; the file is written after each."""
    from medlit.atomic_io import atomic_write
    from medlit.model.decoding.kv_cache import read_prompts
    from medlit.model.families import body
    from medlit.model.packing import PACKS, can_pack

    def keep() -> None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(options.output) as path:
            path.write_text(json.dumps(bench.results, indent=2) + "\n", encoding="utf-8")

    def timed(system: str, answer: Callable[[Prompts], object], budget: int) -> None:
        bench.measure(system, lambda rows: answer(bench.prompts(rows)), bench.batches(bench.rows, budget), budget)
        keep()

    found = decoders(bench)
    answers: dict[str, Callable[[Prompts], object]] = {
        **found,
        "prompts_only": lambda prompts: read_prompts(bench.model, prompts),
    }
    print("| system | token budget | notes/s | peak GiB |\n| --- | --- | --- | --- |")
    if "systems" in options.only:
        for budget in options.token_budgets:
            for system, answer in answers.items():
                timed(system, answer, budget)
        for tokens in (4, 32):
            bench.measure(f"recipe_{tokens}", recipe(bench, tokens), [[row] for row in bench.alone], None)
            keep()
    if "padded" in options.only:
        packs = can_pack(bench.model)
        setattr(body(bench.model), PACKS, False)
        for budget in options.token_budgets:
            timed("likelihood_padded", found["likelihood"], budget)
            timed("prompts_only_padded", answers["prompts_only"], budget)
        setattr(body(bench.model), PACKS, packs)
    if "parity" in options.only:
        for system in ("constrained", "likelihood"):
            bench.results.setdefault("parity", {})[system] = parity(bench, found[system], options.parity_notes)
            keep()
        print("batch beside alone:", json.dumps(bench.results["parity"], indent=2))
    if "validation_in_fit" in options.only:
        bench.results["validation_in_fit"] = validation_in_fit(bench, found["generate"], options.fit_steps)
        keep()
        print("validation in fit:", json.dumps(bench.results["validation_in_fit"]))


if __name__ == "__main__":
    main()
