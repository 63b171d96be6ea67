"""`medlit export`: a fine-tuned model as files that load without medlit, verified before they appear."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from medlit.tools import make_parser
from medlit.tools.export import verify


def run(args: Sequence[str]) -> int:
    """Export and verify.

    Raises:
        UserError: the settings, weights or notes cannot be used, or the export answers differently.
    """
    options, rest = build_parser().parse_known_args(args)
    from medlit.unsloth_first import import_unsloth

    import_unsloth()
    from medlit.tools.export.exporter import export

    return export(options, rest)


def build_parser() -> argparse.ArgumentParser:
    """Make the parser of the command's own flags; their help is in `help.yaml`."""
    texts = yaml.safe_load(Path(__file__).with_name("help.yaml").read_text(encoding="utf-8"))
    formats = "".join(f"; for {name} {nats:g}" for name, nats in verify.MAX_DRIFT_OF.items())
    parser = make_parser("export")

    def add(name: str, **settings: Any) -> None:  # noqa: ANN401 - argparse's
        text = texts[name].format(MAX_DRIFT=verify.MAX_DRIFT, formats=formats)
        parser.add_argument(f"--{name}", help=text, **settings)

    add("to", choices=("adapter", "merged", "gguf", "hub"), required=True)
    add("output", type=Path, metavar="DIR", required=True)
    add("ckpt_path", metavar="PATH")
    add("model.adapter", dest="adapter", metavar="DIR")
    add("run_dir", type=Path, metavar="DIR")
    add("gguf_types", metavar="LIST", default="f16,q8_0")
    add("notes", type=int, metavar="N", default=50)
    add("max_changed", type=float, metavar="SHARE", default=verify.MAX_CHANGED)
    add("max_drift", type=float, metavar="NATS")
    add("repo", metavar="OWNER/NAME")
    add("push", action="store_true")
    add("public", action="store_true")
    return parser
