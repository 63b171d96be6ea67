"""Parity of the fast path: loss and adapter gradients of the same notes, computed in several ways.

    python benchmarks/train_parity.py --output FILE           the pretrained 135M Llama, in a minute on a GPU
    python benchmarks/train_parity.py --tiny --output FILE    a two-layer one on the CPU

The plain way is padded notes in Unsloth's layers, uncompiled. In bfloat16 two ways that are equally right differ, by
rounding; so run alone, this asks how far each of them is from the truth: the same notes one by one through stock
transformers and PEFT in float32, on the same 4-bit weights, in a process that never imports Unsloth or medlit's loss.
`train.py` compares on the 8B shape with random weights, which have no truth to be near; there the plain way one note at
a time shows what rounding alone does.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor, nn

    from medlit.data.datamodule import TranscriptionDataModule
    from medlit.model.settings import LanguageModel

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "parity.json"
SWITCH = "UNSLOTH_BLOCK_COMPILE"
NOTES = 6  # of the 8B, whose padded notes must fit with every layer's activations
TRUTH_NOTES = 16  # of the 135M
PLAIN = "plain"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Gradient(NamedTuple):
    """Mean loss over the notes' supervised tokens, in nats, and the adapter's gradient by parameter name, float32."""

    loss: float
    of: dict[str, Tensor]

    def far(self, other: Gradient) -> float:
        """Euclidean distance of the gradients, relative to the other's length."""
        if self.of.keys() != other.of.keys():
            raise ValueError("the two ways train other weights")
        error = sum(float(((self.of[name] - value) ** 2).sum()) for name, value in other.of.items())
        return float((error / sum(float((value**2).sum()) for value in other.of.values())) ** 0.5)


def fill(trained: dict[str, nn.Parameter]) -> None:
    """Fill an adapter with random numbers, equal on every device; with B at zero, A would have no gradient."""
    import torch

    draw = torch.Generator().manual_seed(0)
    for name in sorted(trained):
        p = trained[name]
        std = 0.01 if "lora_B" in name else (3 * p.shape[1]) ** -0.5  # A's as PEFT begins
        p.data.copy_(std * torch.randn(p.shape, generator=draw))


def ways(
    model: nn.Module, language_model: LanguageModel, data: TranscriptionDataModule, notes: int
) -> dict[str, Gradient]:
    """Loss and gradient of the first notes, in each way; the model is unchanged."""
    import torch
    from torch import Tensor

    from medlit.model.families import causal_lm
    from medlit.model.language_model import loss_sum, train_mode
    from medlit.model.memory import Recomputation, footprint

    rows = [dict(data.rows("train")[i], row=i) for i in range(notes)]
    tokens = sum(map(data.collator.supervised, rows))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    device = next(iter(trained.values())).device
    inner = causal_lm(model)
    takes = footprint(inner.config, 0, 0)
    fill(trained)
    train_mode(model, language_model)

    def run(parts: list[list[Any]], *, packed: bool, again: bool = False) -> Gradient:
        os.environ[SWITCH] = "1" if packed else "0"
        loss = 0.0
        for part in parts:
            batch = (data.collator.packed if packed else data.collator.train)(part, tokens)
            moved = {name: x.to(device) for name, x in batch._asdict().items() if isinstance(x, Tensor)}
            batch = batch._replace(**moved)
            kept = 1 if again else takes.layers
            choice = Recomputation(inner.model.layers, takes, takes.peak(batch.input_ids.numel(), kept))
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                share = loss_sum(model, batch, choice) / tokens
            share.backward()
            loss += float(share.detach())
        found = {name: p.grad.float().clone() for name, p in trained.items() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return Gradient(loss, found)

    single = [[row] for row in rows]
    found = {
        PLAIN: run([rows], packed=False),
        "plain, again": run([rows], packed=False),
        "plain, one note at a time": run(single, packed=False),
        "packed and compiled": run([rows], packed=True),
        "packed and compiled, computed again": run([rows], packed=True, again=True),
    }
    os.environ[SWITCH] = "1"
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(before[name])
    return found


def compare(model: nn.Module, language_model: LanguageModel, data: TranscriptionDataModule) -> list[dict[str, Any]]:
    """Relative differences from the plain way, of the loss and of all gradients together (by their norm)."""
    found = ways(model, language_model, data, NOTES)
    plain = found.pop(PLAIN)
    return [{"way": way, "loss": one.loss / plain.loss - 1, "gradient": one.far(plain)} for way, one in found.items()]


# --- beside float32 ---------------------------------------------------------------------------------------------------


def truth(folder: Path, notes: Path, out: Path) -> None:
    """Loss and gradient in float32 by stock transformers and PEFT, one note at a time; in a separate process."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    quantized = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantized, dtype=torch.float32, device_map={"": str(device)}
    )
    lora = LoraConfig(r=16, lora_alpha=16, lora_dropout=0, bias="none", target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    fill(trained)
    model.train()
    rows = json.loads(notes.read_text())
    tokens = sum(note["supervised"] for note in rows)
    loss = 0.0
    for note in rows:
        ids = torch.tensor([note["ids"]], device=device)
        labels = ids.clone()
        labels[:, : ids.shape[1] - note["supervised"]] = -100
        share = model(input_ids=ids, labels=labels).loss * (note["supervised"] / tokens)
        share.backward()
        loss += float(share.detach())
    torch.save({"loss": loss, "of": {name: p.grad.cpu() for name, p in trained.items()}}, out)


def beside_truth(llama: str, notes: Path, scratch: Path, max_length: int) -> dict[str, Any]:
    """Distance of each way from the float32 reference, and from the plain way."""
    import torch

    from medlit.base_model import resolve
    from medlit.data.datamodule import TranscriptionDataModule
    from medlit.data.settings import Split, Tokenizer
    from medlit.model.language_model import dtype_for
    from medlit.model.loading import load_model
    from medlit.model.settings import LanguageModel, Lora

    language_model = LanguageModel(llama, max_length=max_length)
    data = TranscriptionDataModule(str(notes), split=Split("official"))
    data.tokenizer = Tokenizer(llama, max_length=max_length)
    data.setup("fit")
    rows = [dict(data.rows("train")[i], row=i) for i in range(TRUTH_NOTES)]
    rows = [
        {"ids": data.collator.train([row], 1).input_ids[0].tolist(), "supervised": data.collator.supervised(row)}
        for row in rows
    ]
    (scratch / "rows.json").write_text(json.dumps(rows))
    command = [sys.executable, __file__, "--truth", resolve(llama), scratch / "rows.json", scratch / "truth.pt"]
    subprocess.run(list(map(str, command)), check=True)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    exact = Gradient(**torch.load(scratch / "truth.pt", map_location=device, weights_only=True))

    model = load_model(language_model, Lora(), device)
    found = ways(model, language_model, data, TRUTH_NOTES)
    lengths = [len(note["ids"]) for note in rows]
    return {
        "hardware": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "unsloth")},
        "date": datetime.now(UTC).date().isoformat(),
        "number": str(dtype_for(device)).removeprefix("torch."),
        "notes": {"count": len(lengths), "tokens": sum(lengths)},
        "ways": [
            {
                "way": way,
                "loss": one.loss / exact.loss - 1,
                "gradient": one.far(exact),
                "gradient_from_plain": one.far(found[PLAIN]),
            }
            for way, one in found.items()
        ],
    }


def table(result: dict[str, Any]) -> str:
    """A result as Markdown."""
    lines = [
        f"{result['hardware']}, {result['date']}; {result['model']}, NF4 with LoRA r 16, {result['number']};"
        f" {result['notes']['count']} notes of {result['notes']['tokens']} tokens in all.",
        "",
        "| way | loss, from float32 | gradient, from float32 | gradient, from plain |",
        "| --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row['way']} | {row['loss']:+.1e} | {row['gradient']:.2%} | {row['gradient_from_plain']:.2%} |"
        for row in result["ways"]
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Compare, write the result and show it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--tiny", action="store_true", help="a two-layer model and short notes, on the CPU")
    parser.add_argument("--truth", nargs=3, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.truth:
        truth(*options.truth)
        return
    sys.path[:0] = [str(HERE), str(HERE.parent / "tests")]
    from shapes import write_notes

    from medlit.unsloth_first import import_unsloth

    import_unsloth()
    from medlit.base_model import BUILTIN, load_tokenizer

    with tempfile.TemporaryDirectory() as name:
        scratch, llama = Path(name), BUILTIN
        if options.tiny:
            from fakes import write_llama

            llama = str(write_llama(scratch / "llama"))
        # Prompt and answer around a text are some 60 tokens.
        shrink, overhead = (8, 8) if options.tiny else (1, 60)
        notes = write_notes(scratch / "notes", load_tokenizer(llama), 2 * TRUTH_NOTES, overhead, shrink)
        result = beside_truth(llama, notes, scratch, 512 if options.tiny else 2048)
    result["model"] = "two random layers" if options.tiny else BUILTIN
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(table(result))


if __name__ == "__main__":
    main()
