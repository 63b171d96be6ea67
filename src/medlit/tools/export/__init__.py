"""`medlit export`: a fine-tuned model as files that load without medlit, verified before they appear.

Exports a checkpoint, or an adapter folder (--model.adapter), with the settings that it was trained with: those of
--config and flags, or, with --run_dir alone, those of that run's fit. Writes a folder: 'adapter' for PEFT, 'merged' for
transformers (16-bit safetensors), 'gguf' for llama.cpp, 'hub' the adapter folder with its model card for the Hugging
Face Hub. Each has a model card, README.md, made from the run folder.

Then a fresh process loads the files with the plain loader and scores all labels for 50 notes of the test split
(validation, if there is none). If the answers differ too much from those of medlit's model, the export fails and leaves
nothing; otherwise the comparison is verification.json, which names notes by their ids.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from medlit.tools.export import verify

_EXAMPLES = """
examples:
  medlit export --run_dir logs/llama31_8b/version_0 --to merged --output merged
  medlit export --config configs/quickstart.yaml --ckpt_path last --to gguf --gguf_types f16,q8_0 --output gguf
  medlit export --run_dir logs/llama31_8b/version_0 --to hub --repo me/specialties --output card --push
"""


def run(args: Sequence[str]) -> int:
    """Export and verify.

    Args:
        args: the arguments after `medlit export`.

    Raises:
        UserError: the settings, weights or notes cannot be used, or the export answers differently.
    """
    options, rest = build_parser().parse_known_args(args)
    from medlit.unsloth_first import import_unsloth

    import_unsloth()
    from medlit.tools.export.exporter import export

    return export(options, rest)


def build_parser() -> argparse.ArgumentParser:
    """Make the parser of the command's own flags."""
    parser = argparse.ArgumentParser(
        prog="medlit export",
        usage="medlit export [--config FILE ... | --run_dir DIR | --model.adapter DIR] [--ckpt_path best|last|PATH]"
        " --to adapter|merged|gguf|hub --output DIR [--KEY VALUE ...]",
        description=__doc__.partition("\n\n")[2] + _EXAMPLES,
        epilog="Settings as for 'medlit fit' may follow, such as --data.source; 'medlit fit --help' explains them.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--to", choices=("adapter", "merged", "gguf", "hub"), required=True, help="what to write")
    add("--output", type=Path, metavar="DIR", required=True, help="the folder to write; new or empty")
    add("--ckpt_path", metavar="PATH", help="'best', 'last' or a checkpoint; 'best' unless --model.adapter is given")
    add("--model.adapter", dest="adapter", metavar="DIR", help="adapter folder to export instead of a checkpoint")
    add("--run_dir", type=Path, metavar="DIR", help="run folder to take the checkpoint and the settings from")
    add(
        "--gguf_types",
        metavar="LIST",
        default="f16,q8_0",
        help="gguf: one file each of f16, q8_0 and q4_k_m; the last needs llama-cpp-python (default: %(default)s)",
    )
    add("--notes", type=int, metavar="N", default=50, help="notes to compare (default: %(default)s)")
    add(
        "--max_changed",
        type=float,
        metavar="SHARE",
        default=verify.MAX_CHANGED,
        help="largest share of notes that may get another label (0 to 1), not counting notes that medlit's own model"
        f" barely decides, where the two labels are less than {verify.MAX_DRIFT:g} nats (or --max_drift, if smaller)"
        " apart (default: %(default)s)",
    )
    formats = "".join(f"; for {name} {nats:g}" for name, nats in verify.MAX_DRIFT_OF.items())
    add(
        "--max_drift",
        type=float,
        metavar="NATS",
        help=f"most that the log-likelihood of any note's answer may move. {verify.MEASURED_DRIFT} (default:"
        f" {verify.MAX_DRIFT:g}{formats})",
    )
    add("--repo", metavar="OWNER/NAME", help="hub: the repository")
    add("--push", action="store_true", help="hub: upload, with HF_TOKEN; without it, list what would be uploaded")
    add("--public", action="store_true", help="hub: make a new repository public; it is private by default")
    return parser
