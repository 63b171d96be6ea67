"""Overhead of `SpecialtyPredictor` over the decoder that it calls.

    python benchmarks/predictor.py                                   # the bundled 135M Llama, CPU or GPU
    python benchmarks/predictor.py --adapter logs/llama31_8b/version_0 --notes 320

The bare system has its batches of token ids on the device before the clock starts, and runs the decoder over them. The
predictor starts from texts: it checks and tokenizes them, sorts and pads them into the same batches, carries these to
the device, and makes a `Prediction` of every answer. The two take turns; reported are medians over the rounds, and
the median of the rounds' ratios. A third number is what stays of the predictor's time when the decoder only repeats
its earlier answers. On a CPU the clock is the process's own, which other work on the machine does not disturb; on a GPU
it is the wall's. Without `--adapter` one is made, untrained, over the 13 specialties of the public data set: answers
are then worth nothing and take as long. Writes `benchmarks/results/predictor.json`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builtin_notes import SPECIALTIES as BUILTIN_SPECIALTIES

if TYPE_CHECKING:
    from medlit import SpecialtyPredictor
    from medlit.data.collate import Prompts
    from medlit.model.decoding import Answers

# Listed here: the module that defines them imports transformers, and Unsloth must come first.
MODES = ("generate", "constrained", "likelihood")
RESULTS = Path(__file__).parent / "results" / "predictor.json"
SPECIALTIES = tuple(sorted(BUILTIN_SPECIALTIES))  # the public data set's, in alphabetical order


def write_untrained(folder: Path, base_model: str) -> Path:
    """Write an adapter that changes nothing."""
    import torch

    from medlit.base_model import load_tokenizer
    from medlit.data.labels import LabelSet
    from medlit.model.adapter import save_adapter
    from medlit.model.adapter_metadata import AdapterMetadata
    from medlit.model.loading import load_model
    from medlit.model.settings import LanguageModel, Lora

    language_model, lora = LanguageModel(base_model), Lora()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    model: Any = load_model(language_model, lora, device)
    metadata = AdapterMetadata.of(language_model, lora, LabelSet.from_names(SPECIALTIES))
    save_adapter(model, load_tokenizer(base_model), metadata, folder)
    return folder


def invented(notes: int) -> list[str]:
    """Built-in notes; every third is three of them joined, so that lengths vary as real ones do."""
    from builtin_notes import builtin_notes

    rows = builtin_notes(seed=3407, train=2 * notes, validation=1, test=1)["train"]
    texts = [row["transcription"] for row in rows]
    return ["\n\n".join(texts[place : place + (3 if place % 3 == 0 else 1)]) for place in range(notes)]


def bare(predictor: SpecialtyPredictor, notes: list[str]) -> Callable[[], object]:
    """The predictor's decoder over the batches that the predictor makes of the notes, on the device already."""
    import torch

    from medlit.model.language_model import at_default_precision

    decoder, batches = predictor.decoder, []

    def watching(prompts: Prompts) -> Answers:
        batches.append(prompts)
        return decoder(prompts)

    predictor.decoder = watching
    predictor.predict(notes)
    predictor.decoder = decoder

    def answer() -> None:
        with torch.no_grad(), at_default_precision(decoder.scorer.model):
            for batch in batches:
                decoder(batch)

    return answer


def beside(predictor: SpecialtyPredictor, notes: list[str], rounds: int, on_gpu: bool) -> float:
    """Seconds of everything but the decoder, which replays its earlier answers."""
    decoder, given = predictor.decoder, []

    def watching(prompts: Prompts) -> Answers:
        given.append(decoder(prompts))
        return given[-1]

    predictor.decoder = watching
    predictor.predict(notes)
    took = []
    for _ in range(rounds):
        again = iter(given)
        predictor.decoder = lambda prompts, again=again: next(again)  # type: ignore[misc]
        took.append(seconds(lambda: predictor.predict(notes), on_gpu))
    predictor.decoder = decoder
    return statistics.median(took)


def seconds(work: Callable[[], object], on_gpu: bool) -> float:
    """A decoder ends with its answers on the host, so there is nothing to synchronise."""
    clock = time.perf_counter if on_gpu else time.process_time
    begin = clock()
    work()
    return clock() - begin


def measure(adapter: Path, mode: str, texts: list[str], rounds: int) -> dict[str, Any]:
    """Alternate both, and which one goes first."""
    import torch

    from medlit import SpecialtyPredictor

    # The labels have up to 8 tokens; an untrained model would never stop.
    predictor = SpecialtyPredictor.load(adapter, mode=mode, max_new_tokens=8)  # type: ignore[arg-type]
    on_gpu = torch.cuda.is_available()
    systems: dict[str, Callable[[], object]] = {
        "decoder": bare(predictor, texts),
        "predictor": lambda: predictor.predict(texts),
    }
    for work in systems.values():
        work()
    took: dict[str, list[float]] = {name: [] for name in systems}
    for turn in range(rounds):
        for name in list(systems)[:: 1 if turn % 2 else -1]:
            took[name].append(seconds(systems[name], on_gpu))
    rest = beside(predictor, texts, rounds, on_gpu)
    ratios = [b / a for a, b in zip(took["decoder"], took["predictor"], strict=True)]
    return {
        "mode": mode,
        "notes_per_second": {name: round(len(texts) / statistics.median(times), 3) for name, times in took.items()},
        "milliseconds_beside_the_decoder": round(1000 * rest / len(texts), 3),
        "share_beside_the_decoder": round(rest / statistics.median(took["decoder"]), 5),
        "ratio": round(statistics.median(ratios), 4),
        "ratios": [round(ratio, 4) for ratio in ratios],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every decoder and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--adapter", type=Path, default=None, help="an adapter or run folder, instead of an untrained one"
    )
    parser.add_argument("--base_model", default="builtin:smollm2-135m", help="of the untrained adapter")
    parser.add_argument("--notes", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)

    from medlit.unsloth_first import import_unsloth

    import_unsloth()
    import torch

    from medlit.atomic_io import atomic_write

    texts = invented(options.notes)
    on_gpu = torch.cuda.is_available()
    results: dict[str, Any] = {
        "hardware": torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "adapter": options.adapter.name if options.adapter else f"untrained, of {Path(options.base_model).name}",
        "date": datetime.date.today().isoformat(),
        "notes": len(texts),
        "systems": [],
    }
    print(f"{results['hardware']}, {len(texts)} notes")
    print("| mode | decoder, notes/s | SpecialtyPredictor, notes/s | its time | of it beside the decoder |")
    print("| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        adapter = options.adapter or write_untrained(Path(folder), options.base_model)
        for mode in options.modes:
            row = measure(adapter, mode, texts, options.rounds)
            results["systems"].append(row)
            rates = row["notes_per_second"]
            rest = f"{row['milliseconds_beside_the_decoder']} ms a note, {row['share_beside_the_decoder']:.2%}"
            print(f"| {mode} | {rates['decoder']} | {rates['predictor']} | x {row['ratio']} | {rest} |", flush=True)
            with atomic_write(options.output) as path:
                path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
