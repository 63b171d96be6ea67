"""`medlit export`: a fine-tuned model as files that load without medlit, verified before they appear."""

import argparse
from collections.abc import Sequence

from medlit.errors import UserError
from medlit.tools import make_parser
from medlit.tools.export import verify


def run(args: Sequence[str]) -> int:
    """Export and verify; a UserError if settings, weights or notes do not serve, or the export answers differently."""
    options, rest = build_parser().parse_known_args(args)
    if options.to not in ("adapter", "merged", "gguf"):
        raise UserError(f"to: must be adapter, merged or gguf, not {options.to!r}; 'hf upload' sends it to the Hub.")
    from medlit.unsloth_first import import_unsloth

    import_unsloth()
    from medlit.tools.export.exporter import export

    return export(options, rest)


def build_parser() -> argparse.ArgumentParser:
    """Make the parser of the command's own flags."""
    formats = "".join(f"; for {name} {nats:g}" for name, nats in verify.MAX_DRIFT_OF.items())
    parser = make_parser("export", MAX_DRIFT=verify.MAX_DRIFT, formats=formats)
    parser.set_defaults(max_changed=verify.MAX_CHANGED)
    return parser
