"""`medlit export`: a fine-tuned model as files that others load without medlit, checked before they are there.

Takes a checkpoint, or an adapter folder (--model.adapter), and the settings that it was trained with: those of --config
and flags, or, with --run_dir alone, those of that run's fit. Writes a folder: 'adapter' for PEFT, 'merged' for
transformers
(16-bit safetensors), 'gguf' for llama.cpp, 'hub' the adapter folder and its model card for the Hugging Face Hub. Each
has a model card, README.md, out of what the run folder holds.

Then a process of its own loads what was written, with the plain loader, and weighs all specialties for 50 notes of the
test split (without one: validation). Where that differs too much from what medlit's model says of the same notes, the
export fails and leaves nothing; otherwise the comparison is verification.json, which names notes by their ids.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from medlit.tools.export import tolerances

_EXAMPLES = """
examples:
  medlit export --run_dir logs/llama31_8b/version_0 --to merged --output merged
  medlit export --config configs/quickstart.yaml --ckpt_path last --to gguf --gguf_types f16,q8_0 --output gguf
  medlit export --run_dir logs/llama31_8b/version_0 --to hub --repo me/specialties --output card --push
"""
TARGETS = ("adapter", "merged", "gguf", "hub")


def run(args: Sequence[str]) -> int:
    """Export, and prove it.

    Args:
        args: the arguments after `medlit export`.

    Raises:
        UserError: the settings, the weights or the notes cannot be used, or the export does not answer alike.
    """
    options, rest = parser().parse_known_args(args)
    from medlit.unsloth_first import import_unsloth

    import_unsloth()
    from medlit.tools.export.command import export

    return export(options, rest)


def parser() -> argparse.ArgumentParser:
    """The flags of the verb's own."""
    made = argparse.ArgumentParser(
        prog="medlit export",
        usage="medlit export [--config FILE ... | --run_dir DIR | --model.adapter DIR] [--ckpt_path best|last|PATH]"
        " --to adapter|merged|gguf|hub --output DIR [--KEY VALUE ...]",
        description=__doc__.partition("\n\n")[2] + _EXAMPLES,
        epilog="Settings as for 'medlit fit' may follow, such as --data.source; 'medlit fit --help' explains them.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = made.add_argument
    add("--to", choices=TARGETS, required=True, help="what to write")
    add("--output", type=Path, metavar="DIR", required=True, help="the folder; new, or empty")
    add("--ckpt_path", metavar="PATH", help="'best', 'last' or a checkpoint; 'best' unless --model.adapter is given")
    add(
        "--run_dir",
        type=Path,
        metavar="DIR",
        help="run folder to look for the checkpoint in, and to take settings from",
    )
    add(
        "--onto",
        choices=("trained", "original"),
        default="trained",
        help="merged, gguf: which weights the adapter is added to. 'trained': those that it was trained beside, 4-bit"
        " ones unpacked to 16 bits, which keeps the answers; 'original': the 16-bit weights before they were quantised,"
        " beside which it answers otherwise (default: %(default)s)",
    )
    add("--base", metavar="NAME", help="with --onto original: the 16-bit base model, a Hub id or a folder")
    add(
        "--gguf_types",
        metavar="LIST",
        default="f16,q8_0",
        help="gguf: one file for each, of f16, q8_0 and q4_k_m; the last needs llama-cpp-python (default: %(default)s)",
    )
    add("--notes", type=int, metavar="N", default=50, help="notes to compare on (default: %(default)s)")
    add(
        "--max_changed",
        type=float,
        metavar="SHARE",
        default=tolerances.MAX_CHANGED,
        help="most notes that may get another specialty (0 to 1); not counted are those that medlit's own model hardly"
        f" decides, the two specialties being closer than {tolerances.PLAIN_DRIFT:g} nats or --max_drift, whichever"
        f" is less"
        " (default: %(default)s)",
    )
    formats = "".join(f"; for {name} {nats:g}" for name, nats in tolerances.DRIFT.items())
    add(
        "--max_drift",
        type=float,
        metavar="NATS",
        help=f"most that the log-likelihood of any note's answer may move. {tolerances.MEASURED} (default:"
        f" {tolerances.PLAIN_DRIFT:g}{formats})",
    )
    add("--repo", metavar="OWNER/NAME", help="hub: the repository")
    add("--push", action="store_true", help="hub: really upload, with HF_TOKEN; without it only say what would be sent")
    add("--public", action="store_true", help="hub: make a new repository public; by default it is private")
    return made
