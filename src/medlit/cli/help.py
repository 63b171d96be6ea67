"""The parser of settings: `--help` as a manual, and errors of one sentence.

Lightning's parser prints Sphinx markup, every class that a setting accepts, an environment variable on each line and
eighty lines of usage. Here a setting has a sentence (a docstring's, or one of `help.yaml`), its type and its default.
"""

import argparse
import difflib
import re
from collections.abc import Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NoReturn, get_args, get_origin

import yaml
from jsonargparse import DefaultHelpFormatter, get_loader, set_loader
from jsonargparse._actions import _ActionConfigLoad, _ActionHelpClassPath
from jsonargparse._link_arguments import ActionLink
from jsonargparse._signatures import group_instantiate_class
from jsonargparse._util import config_load_stack
from lightning.pytorch.cli import LightningArgumentParser

from medlit.cli import MODEL_VERBS, TOOLS, tool_parser
from medlit.errors import UserError

TEXTS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
ABOUT: dict[str, str] = TEXTS["about"]
LIGHTNING_HELP: dict[str, str] = TEXTS["lightning"]
OWN_HELP: dict[str, str] = TEXTS["own"]

_LIGHTNING = ("trainer.", "checkpoint.", "early_stopping.")
_load_yaml = get_loader("yaml")
# In jsonargparse's errors: a name that is not a setting; the setting whose value is wrong; the value.
_UNKNOWN = re.compile(
    r"unrecognized arguments: (?:--([^\s=]+)|(?P<word>\S+))"
    r"|Group '([\w.]+)' does not accept option '([^']+)'"
    r"|Option '([^']+)' is not accepted|Subcommand '\w+' does not accept option '([^']+)'"
)
_WRONG = re.compile(r'^(?:Parser key "config": )?Parser key "([\w.]+)": (.*)')
_NO_GROUP = re.compile(r"Unable to load config (.*?) - ")
_VALUE = re.compile(r".*(?:Got|Given) value: (.*)$")
# What a value of a type is, in words; for others the type's docstring, if it is one of `number_types`.
_WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "text", list: "a list", dict: "a mapping"}


class RepeatedKeyError(yaml.YAMLError):
    """A key that a config gives twice: YAML would keep the last block and drop the first."""


def load_unique(text: str) -> Any:  # noqa: ANN401
    """Load YAML or JSON for the parser; a RepeatedKeyError for a key given twice, even as model.lora.r."""
    where = config_load_stack.get()[-1][1] if config_load_stack.get() else "the given text"
    nodes: list[tuple[str, Any]] = [("", yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)))]
    seen = set()  # an anchor may stand for its own parent
    while nodes:
        prefix, node = nodes.pop()
        if node in seen or not isinstance(node, yaml.CollectionNode):
            continue
        seen.add(node)
        if isinstance(node, yaml.SequenceNode):
            nodes += [(prefix, each) for each in node.value]
            continue
        keys = [(str(key.value), key.start_mark.line + 1, value) for key, value in node.value]
        nodes += [(f"{prefix}{name}.", value) for name, _, value in keys]
        groups = {name: line for name, line, value in keys if isinstance(value, yaml.MappingNode)}
        lines: dict[str, int] = {}
        for name, line, _ in keys:
            parents = accumulate(name.split(".")[:-1], "{}.{}".format)
            other = lines.get(name) or next((groups[parent] for parent in parents if parent in groups), None)
            if other is not None and name != "<<":
                raise RepeatedKeyError(
                    f"{prefix}{name}: given in line {line} of {where} and, itself or its group, in line {other}, where"
                    " one would replace the other; make them one block."
                )
            lines[name] = line
    return _load_yaml(text)


set_loader("yaml", load_unique, (yaml.YAMLError,))


class _GroupOrNull(_ActionConfigLoad):
    """A group of settings that a flag or a variable can set to null, as a YAML can."""

    def _load_config(self, value: Any, parser: LightningArgumentParser) -> Any:  # noqa: ANN401 - jsonargparse's
        return None if value == "null" else super()._load_config(value, parser)  # type: ignore[no-untyped-call]


def _instantiate_unless_null(group: Any, config: Any) -> None:  # noqa: ANN401 - jsonargparse's
    if config.get(group.dest) is not None:
        group_instantiate_class(group, config)  # type: ignore[no-untyped-call]


class Parser(LightningArgumentParser):
    """Reports an error in one sentence, without pages of usage."""

    def add_class_arguments(self, *args: Any, **kwargs: Any) -> list[str]:  # noqa: ANN401
        """Add the arguments of a class; `model.lora` may be null, and 1 is a number of batches, not the share 1.0."""
        added: list[str] = super().add_class_arguments(*args, **kwargs)
        for action in self._actions:
            if {int, float} <= (kinds := set(get_args(getattr(action, "_typehint", None)))):
                action._typehint = int | float | None if NoneType in kinds else int | float  # type: ignore[attr-defined]
            if action.dest == "model.lora":
                action.__class__ = _GroupOrNull
                action.metavar, action.help = "null", "train and load no adapter: the bare base model"
        if "model.lora" in (self.groups or {}):
            self.groups["model.lora"].instantiate_class = _instantiate_unless_null  # type: ignore[index, union-attr]
        return added

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise a UserError, or, where jsonargparse parses to find out, its own error."""
        if not self.exit_on_error:
            super().error(message, ex)
        cause: BaseException | None = ex
        while cause is not None and not isinstance(cause, RepeatedKeyError):
            cause = cause.__cause__
        raise UserError(str(cause or self._explain(" ".join(message.split()).rstrip(".")))) from ex

    def _explain(self, message: str) -> str:
        """Rewrite an error of jsonargparse's as `setting: what is wrong; how to fix it`."""
        verb = self.prog.rpartition(" ")[2]
        manual = f"'medlit {verb if verb in MODEL_VERBS else 'fit'} --help' explains every setting."
        if unknown := _UNKNOWN.search(message):
            if (word := unknown["word"] or "").endswith((".yaml", ".yml")):
                return f"{word}: put --config before each config; {manual}"
            if word and verb == "predict":  # it may be one of a note
                return f"data.predict.text: a note of several words needs quotes, and this flag before it; {manual}"
            name = ".".join(filter(None, unknown.groups()))
            own = setting_names(tool_parser(verb)) if verb in TOOLS else ()
            similar = difflib.get_close_matches(name, {*setting_names(self), *own}, 1)
            return f"{name}: there is no such setting; {f'did you mean {similar[0]}? ' if similar else ''}{manual}"
        if wrong := _WRONG.match(message):
            name, reason = wrong.groups()
            words = next((describe(getattr(a, "_typehint", None)) for a in self._actions if a.dest == name), None)
            value = _VALUE.match(reason)
            if name != "config" and (given := _NO_GROUP.match(reason)):
                words, value = f"a group of settings{' or null' * (name == 'model.lora')}", given
            reason = class_error(reason) or reason
            return f"{name}: {f'must be {words}, not {value[1]}' if words and value else reason}; {manual}"
        if message.endswith("expected one argument"):
            message += "; write one that begins with a dash as --NAME=-VALUE"
        message = re.sub("^Spaces not allowed .*", "config: a setting's name has no spaces", message)  # perhaps notes
        return f"{message}; {manual}"


def class_error(message: str) -> str | None:
    """Find, in an error that lists a union's types, what is wrong with a class that a config names; None if nothing."""
    given = re.search(r"class_path='(?:\w+\.)*(\w+)'", message)
    _, _, errors = " ".join(message.split()).partition(" Errors: - ")
    for reason in errors.partition(" Given value type: ")[0].split(" - "):
        if reason.startswith("Expected a dot import path string: "):
            name = reason.rpartition(": ")[2]
            return f"there is no class {name if name.replace('.', '_').isidentifier() else 'of such a name'}"
        if given and not reason.startswith(("Expected a <", "Not a valid subclass ", "Does not validate ")):
            return f"{given[1]}: " + reason.rpartition(f"{given[1]}': ")[2].rstrip(".")
    return None


def setting_names(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Names of all settings of a parser and of its verbs, such as model.lora.r."""
    for action in parser._actions:
        yield from (option.removeprefix("--") for option in action.option_strings)
        if isinstance(action.choices, dict):
            for verb in action.choices.values():
                yield from setting_names(verb)


def describe(kind: Any) -> str | None:  # noqa: ANN401 - a type annotation
    """What a value of a type is, in words such as 'an integer or null'; None if that takes more than a phrase."""
    if (plain := get_origin(kind) or kind) in _WORDS:
        return _WORDS[plain] + " of texts; quote numbers" * (get_args(kind)[-1:] == (str,))
    if isinstance(kind, type) and kind.__module__ == "medlit.number_types":
        return kind.__doc__
    if get_origin(kind) is Literal:
        *first, last = map(repr, get_args(kind))
        return " or ".join(filter(None, (", ".join(first), last)))
    if len(kinds := get_args(kind)) == 2 and (kinds[1] is NoneType or get_origin(kinds[0]) is Literal):
        words = describe(kinds[0])
        return words and f"{words} or {'null' if kinds[1] is NoneType else describe(kinds[1])}"
    return None


class HelpFormatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Formats the help of a verb that runs a model."""

    def _is_listed(self, action: argparse.Action) -> bool:
        """Whether the verb's help lists a setting."""
        if isinstance(action, _ActionConfigLoad | _ActionHelpClassPath | ActionLink):
            return isinstance(action, _GroupOrNull)
        name, verb = action.dest, self._prog.rpartition(" ")[2]
        if name in TEXTS["hidden"] or (name.startswith(_LIGHTNING) and name not in LIGHTNING_HELP):
            return False
        if name in TEXTS["verbs"]:
            return verb in TEXTS["verbs"][name]
        return verb == "fit" or not name.startswith(tuple(TEXTS["fit_only"]))

    def add_arguments(self, actions: Iterable[argparse.Action]) -> None:
        """Add a group's settings, with a title that begins with their common name."""
        listed = [action for action in actions if self._is_listed(action)]
        if listed:
            first = next(action.dest for action in listed if not isinstance(action, _GroupOrNull))
            key = first.rpartition(".")[0] or first
            self._current_section.heading = TEXTS["titles"].get(key, self._current_section.heading)
        super().add_arguments(listed)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        # jsonargparse would add the environment variable, and Lightning an option that appends to lists.
        names = [name for name in action.option_strings if not name.endswith("+")]
        if action.nargs == 0:
            return ", ".join(names)
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return ", ".join(f"{name} {value}" for name in names)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        if action.dest == "config":
            return "FILE"
        words = describe(getattr(action, "_typehint", None)) or ""
        if words.startswith("an integer"):
            return "N"
        return "X" if words.startswith("a number") else super()._get_default_metavar_for_optional(action)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = LIGHTNING_HELP.get(action.dest) or (action.help or "")
        text = text[:1].upper() + text[1:].rstrip(".")
        if action.dest in ("help", "config", "print_config") or isinstance(action, _GroupOrNull):
            return text + "."
        kind = getattr(action, "_typehint", None)
        words = describe(kind)
        shown = action.dest in LIGHTNING_HELP or get_origin(kind) is Literal or words in (None, "text")
        return f"{text}. ({'' if shown or str(words).startswith('true') else f'{words}; '}default: %(default)s)"

    def _expand_help(self, action: argparse.Action) -> str:
        return re.sub(r"default: (True|False)\)$", lambda m: m[0].lower(), super()._expand_help(action))
