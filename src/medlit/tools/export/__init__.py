"""`medlit export`: a fine-tuned model as files that load without medlit, verified before they appear."""

from collections.abc import Sequence

from medlit.cli import tool_parser
from medlit.errors import UserError


def run(args: Sequence[str]) -> int:
    """Export and verify; a UserError if settings, weights or notes are unusable, or the export answers differently."""
    options, rest = tool_parser("export").parse_known_args(args)
    if options.to not in ("adapter", "merged", "gguf"):
        raise UserError(f"to: must be adapter, merged or gguf, not {options.to!r}; for the Hub use 'hf upload'.")
    from medlit.unsloth_first import import_unsloth

    import_unsloth()
    from medlit.tools.export.exporter import export

    return export(options, rest)
