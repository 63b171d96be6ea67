"""How `--help` looks: jsonargparse's list of settings, less what no reader of it can use.

Lightning's parser tells each of its settings in Sphinx markup, names every class that could stand there, prints the
environment's variable of each line and begins with eighty lines of usage. Here a setting is told in words, with its
type and default; what it may also be is in Lightning's own manual.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable

from jsonargparse import DefaultHelpFormatter
from jsonargparse._actions import _ActionConfigLoad, _ActionHelpClassPath
from jsonargparse._link_arguments import ActionLink

from medlit.cli.help_texts import FIT_ALONE, LIGHTNING, TITLES, TOLD, UNTOLD, VERBS

# Type, and "or null" around it -> what stands for a value.
_NUMBERS = {"int": "N", "NonNegativeInt": "N", "float": "X"}
_OR_NULL = re.compile(r"Optional\[(\w+)\]|(\w+) \| null")


class HelpFormatter(DefaultHelpFormatter):
    """Formats the help of a verb that runs a model."""

    @property
    def _verb(self) -> str:
        return self._prog.rpartition(" ")[2]

    def _listed(self, action: argparse.Action) -> bool:
        """Whether a setting is told in this verb's help."""
        if isinstance(action, _ActionConfigLoad | _ActionHelpClassPath | ActionLink):
            return False
        name = action.dest
        if name in UNTOLD or (name.startswith(LIGHTNING) and name not in TOLD):
            return False
        if name in VERBS:
            return self._verb in VERBS[name]
        return self._verb == "fit" or not name.startswith(FIT_ALONE)

    def add_usage(self, usage: str | None, actions: Iterable[argparse.Action], *args: object, **kwargs: object) -> None:
        """One line: eighty with every setting in brackets say less."""
        line = f"medlit {self._verb} [--config FILE ...] [--GROUP.KEY VALUE ...]"
        super().add_usage(line, [], *args, **kwargs)

    def add_arguments(self, actions: Iterable[argparse.Action]) -> None:
        """A group under the name that its settings begin with."""
        listed = [action for action in actions if self._listed(action)]
        if listed:
            first = listed[0].dest
            key = first.rpartition(".")[0] or first
            section = self._current_section
            section.heading = TITLES.get(key, section.heading)
        super().add_arguments(listed)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        # jsonargparse would add the variable of each, and Lightning an option that appends to lists.
        names = [name for name in action.option_strings if not name.endswith("+")]
        value = (
            "" if action.nargs == 0 else f" {self._format_args(action, self._get_default_metavar_for_optional(action))}"
        )
        return ", ".join(name + value for name in names)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        if action.dest == "config":
            return "FILE"
        kind = _OR_NULL.sub(r"\1\2", self._get_type_str(action) or "")
        return _NUMBERS.get(kind) or super()._get_default_metavar_for_optional(action)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = TOLD.get(action.dest) or (action.help or "")
        text = text[:1].upper() + text[1:].rstrip(".")
        if action.dest in ("help", "config", "print_config"):
            return text + "."
        kind = self._plain_type(action)
        return f"{text}. ({f'type: {kind}, ' if kind else ''}default: %(default)s)"

    def _plain_type(self, action: argparse.Action) -> str | None:
        """The type, where words and choices do not say it."""
        kind = self._get_type_str(action)
        if action.dest in TOLD or kind is None or kind.startswith(("Literal", "bool")):
            return None
        return kind.replace("NonNegativeInt", "int, at least 0")

    def _expand_help(self, action: argparse.Action) -> str:
        # As YAML and the command line spell it.
        return re.sub(r"default: (True|False)\)$", lambda m: m[0].lower(), super()._expand_help(action))

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(indent + line for line in text.splitlines())
