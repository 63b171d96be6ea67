"""The command line: its verbs, their settings and help, the checks before a run, and how a run ends."""

import argparse
import difflib
import os
import re
import signal
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from medlit.errors import UserError, is_first_process

# `__main__` reads these before it imports anything else; `usage.txt` says what each does.
MODEL_VERBS = ("fit", "validate", "test", "predict")
TOOLS = ("doctor", "audit", "baseline", "export", "serve")
_TYPES = {"int": int, "float": float, "path": Path}
# Settings that may be a file of settings, whose text an error would show.
_MAY_BE_FILES = re.compile(
    r"config|checkpoint|early_stopping|model(\.(language_model|lora|optimizer|decoding))?"
    r"|data(\.(columns|labels|split|batching|predict))?|trainer(\.(accelerator|callbacks|logger|plugins|profiler|strategy))?"
)


def check_configs(arguments: list[str]) -> None:
    """Raise a UserError for a config that is not there or has another name, before the imports that settings take."""
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        flag, equals, value = argument.partition("=")
        name, path = "config" if flag == "-c" else flag.removeprefix("--"), value if equals else following
        is_yaml = path.endswith((".yaml", ".yml", ".json"))
        if flag in ("-c", "--config") and is_yaml and not os.path.exists(path):
            raise UserError(no_config(path))
        if _MAY_BE_FILES.fullmatch(name) and not is_yaml and os.path.splitext(path)[1] and os.path.isfile(path):
            raise UserError(f"{name}: {path} is not named as a YAML file; a table of notes belongs in data.source.")


def no_config(path: str) -> str:
    """The message for a config that is not there, with a similar one, or that is no mapping, but perhaps notes."""
    if os.path.isfile(path):
        return f"config: {path} holds no settings (name: value); a table of notes belongs in data.source."
    wanted = Path(os.path.relpath(path))
    near = {str(other) for other in [*wanted.parent.glob("*.yaml"), *Path("configs").rglob("*.yaml")]}
    similar = difflib.get_close_matches(str(wanted), near, 1)
    hint = f"did you mean {similar[0]}?" if similar else "give the path of a YAML file."
    return f"config: there is no file {wanted}; {hint}"


class _ToolParser(argparse.ArgumentParser):
    """A parser whose errors are medlit's."""

    def error(self, message: str) -> NoReturn:
        """Raise a UserError with argparse's message, and a similar flag for one that is not known."""
        unknown = message.partition("unrecognized arguments: ")[2].replace("=", " ").partition(" ")[0]
        near = difflib.get_close_matches(unknown, self._option_string_actions, 1)
        raise UserError(f"{message}; {f'did you mean {near[0]}? S' if near else 's'}ee '{self.prog} --help'.")


def tool_parser(tool: str) -> argparse.ArgumentParser:
    """Make the parser of a verb's own flags, from its texts and flags in `tools/help/`."""
    import yaml  # not at the top: `make bundle` has no package

    folder = Path(__file__).parents[1] / "tools" / "help"
    usage, text, epilog = (folder / f"{tool}.txt").read_text(encoding="utf-8").split("\n---\n")
    shape = argparse.RawDescriptionHelpFormatter
    parser = _ToolParser(f"medlit {tool}", usage, text, epilog, formatter_class=shape, allow_abbrev=False)
    flags: dict[str, dict[str, Any]] = yaml.safe_load((folder / f"{tool}.yaml").read_text(encoding="utf-8"))
    for name, flag in flags.items():
        parser.add_argument(f"--{name}", **flag | ({"type": _TYPES[flag["type"]]} if "type" in flag else {}))
    return parser


def end_on_signals() -> None:
    """From now on SIGINT and SIGTERM end this process with one line and exit code 128 + their number.

    Not by an exception: raised during an import it would print pages of traceback, and in a destructor or a bare
    `except:`, of which Unsloth has many, it would be ignored. Partial files are removed and child processes killed.
    """
    first = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() == first:  # no fork of it, such as a worker that loads data
            if is_first_process():
                os.write(2, f"medlit: stopped by {signal.Signals(number).name}.\n".encode())
            with suppress(Exception):  # the signal may come during this import
                import psutil

                children = psutil.Process().children(recursive=True)
                for child in children:
                    child.kill()
                psutil.wait_procs(children, timeout=3)
            with suppress(Exception):
                sys.modules["medlit.atomic_io"].remove_unfinished()
        os._exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as `nohup` and a shell's `&` set it
            signal.signal(number, end)
