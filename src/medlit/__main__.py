"""The entry point: chooses the command and imports only what it needs.

`import lightning` imports transformers, and Unsloth must be imported before both. That takes ten seconds, so `--help`
and `--print_config` skip it.
"""

import difflib
import importlib
import os
import select
import signal
import sys
from pathlib import Path

from medlit.cli import MODEL_VERBS, TOOLS, check_configs, end_on_signals, tool_parser
from medlit.errors import UserError, is_first_process, report_if_slow
from medlit.paths import __version__

_MEANT = {"train": "fit", "finetune": "fit", "eval": "test", "evaluate": "test", "classify": "predict"}


def main(args: list[str] | None = None) -> None:
    """Run `medlit` with these arguments, by default those of the process; exits with 2 after a user's mistake.

    Where nothing reads the output any more, as after `head`, it exits as if SIGPIPE had ended it. That signal stays
    ignored, since it would end a service whose client has gone.
    """
    if args is None:
        end_on_signals()
    try:
        try:
            _run(sys.argv[1:] if args is None else args)
        except SystemExit:
            print(end="", flush=True)
            raise
        print(end="", flush=True)
    except BrokenPipeError:
        output = select.poll()
        output.register(1, 0)
        if not output.poll(0):
            raise  # of another pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what Python flushes at its end
        raise SystemExit(128 + signal.SIGPIPE) from None


def _run(arguments: list[str]) -> None:
    verb = arguments[0] if arguments else ""
    if verb in ("", "-h", "--help"):
        print((Path(__file__).with_name("cli") / "usage.txt").read_text(encoding="utf-8"), end="")
        raise SystemExit(0 if verb else 2)
    if verb == "--version":
        print(f"medlit {__version__}")
        return
    try:
        if verb not in MODEL_VERBS and verb not in TOOLS:
            known = [*MODEL_VERBS, *TOOLS]
            similar = [_MEANT[verb]] if verb in _MEANT else difflib.get_close_matches(verb, known, 1)
            meant = f" did you mean {similar[0]}?" if similar else ""
            raise UserError(f"there is no command {verb!r};{meant} the commands are {', '.join(known)}.")
        check_configs(arguments)
        if verb in TOOLS:
            if not {"-h", "--help"}.isdisjoint(arguments):  # before the tool's imports, which take seconds
                tool_parser(verb).parse_args(["--help"])
            raise SystemExit(importlib.import_module(f"medlit.tools.{verb}").run(arguments[1:]))
        if not any(argument.split("=")[0] in ("-h", "--help", "--print_config") for argument in arguments):
            from medlit.unsloth_first import import_unsloth

            with report_if_slow("importing Unsloth, which takes up to a minute from a cold disk", say=_say):
                import_unsloth()
        from medlit.cli.cli import main as run

        run(arguments)
    except UserError as error:
        print(f"medlit: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def _say(message: str) -> None:
    if is_first_process():
        print(f"medlit: {message}", file=sys.stderr)


if __name__ == "__main__":
    main()
