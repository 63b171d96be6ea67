"""Checks of settings that the parser does not make: values that no type can express, null, and names that are gone."""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from pydoc import locate
from types import NoneType
from typing import Any, get_args

import yaml
from jsonargparse import ArgumentParser, Namespace

from medlit.base_model import BUILTIN, is_same_model
from medlit.cli import MODEL_VERBS, TOOLS, no_config
from medlit.errors import UserError, tell
from medlit.evaluation.metrics import MONITORS
from medlit.model.adapter import adapter_folder, adapter_settings, read_metadata
from medlit.model.settings import LanguageModel, Lora, check_decoding
from medlit.paths import local_path

ENV_PREFIX = "MEDLIT"
_TABLES = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
RENAMED: dict[str, str] = _TABLES["renamed"]
REMOVED: dict[str, str] = _TABLES["removed"]
OLD_VALUES: dict[tuple[str, str | bool], str] = {
    (name, value): text for name, values in _TABLES["old_values"].items() for value, text in values.items()
}
_NAMES = ", ".join(MONITORS)
_MONITOR = {"values": MONITORS, "advice": f"{{value!r}} is not measured in a validation; choose one of {_NAMES}"}
_CHECKS: dict[str, Any] = {**_TABLES["checks"], "checkpoint.monitor": _MONITOR, "early_stopping.monitor": _MONITOR}
_GROUPS = {"trainer", "model", "model.language_model", "data", "checkpoint", "early_stopping"}


def _fits(value: Any, check: Mapping[str, Any]) -> bool:  # noqa: ANN401
    is_number = isinstance(value, int | float) and math.isfinite(value) and value <= check.get("most", math.inf)
    is_above = is_number and (value >= check.get("least", math.inf) or value > check.get("over", math.inf))
    return is_above or value in check.get("values", ())


def check_settings(config: Any, parser: ArgumentParser, fit: bool = False) -> None:  # noqa: ANN401 - a Namespace
    """Raise a UserError for the first of a command's settings whose value is wrong although its parser accepts it."""
    for name in filter(config.__contains__, parser.groups):  # type: ignore[arg-type]
        if not isinstance(config[name], Namespace) and (name, config[name]) != ("model.lora", None):
            raise UserError(f"{not_a_group(name, config[name])}.")
    for action in parser._actions:  # jsonargparse accepts null for every setting of a YAML
        key, kinds = action.dest, get_args(getattr(action, "_typehint", None))
        is_needed = NoneType not in kinds or key == "trainer.default_root_dir"
        if is_needed and key not in ("config", "model.lora") and config.get(key, "") is None:
            raise UserError(f"{key}: must have a value; leave it out for the default.")
    for key, check in _CHECKS.items():
        if not isinstance(config[key], Namespace) and not _fits(config[key], check):
            raise UserError(f"{key}: {check['advice'].format(value=config[key])}.")
    if str(config.trainer.max_time).strip("0:") == "":
        raise UserError(f"trainer.max_time: must be over 0, or null, not {config.trainer.max_time}.")
    check_classes(config.trainer)
    check_decoding(config.model.decoding, predicts=False, fits=fit)
    endless = config.trainer.max_steps == -1 and config.trainer.max_epochs in (None, -1)
    if fit and endless and config.trainer.max_time is None:
        raise UserError("trainer.max_steps: -1 needs another limit; set trainer.max_epochs or trainer.max_time.")
    weights = next((key for key in ("model.adapter", "ckpt_path") if config.get(key) is not None), None)
    if config.model.lora is None and (fit or weights is not None):
        why = "a fit trains an adapter; leave it" if fit else f"{weights} names an adapter's weights; leave one of them"
        raise UserError(f"model.lora: null is the bare base model, and {why} out.")


def not_a_group(name: str, value: object) -> str:
    """Say what stands in place of a group of settings, without text that may be notes."""
    shown = "text" if isinstance(value, str) else "a list" if isinstance(value, list) else value
    return f"{name}: must be a group of settings, not {shown}; 'medlit fit --help' shows them"


def check_classes(trainer: Namespace) -> None:
    """Raise a UserError for a class that a config names and medlit cannot run with, before any is built."""
    for key in ("callbacks", "logger", "plugins", "profiler", "strategy"):
        given = trainer[key] if isinstance(trainer[key], list) else [trainer[key]]
        for named in (each for each in given if isinstance(each, Namespace)):
            name, settings = named.class_path.rpartition(".")[2], named.get("init_args") or {}
            lineage = [base.__name__ for base in getattr(locate(named.class_path), "__mro__", ())]
            wrong = next(filter(None, map(_TABLES["classes"].get, lineage)), None)
            if key == "callbacks" and settings.get("monitor") not in (None, "train/loss", *MONITORS):
                wrong = f"cannot monitor {settings['monitor']!r}; choose one of {_NAMES}"
            if settings.get("start_method", "popen") != "popen":
                wrong = f"start_method must be 'popen', not {settings['start_method']!r}"
            for folder in ("save_dir", "root_dir", "dir") if key == "logger" else ():
                local_path(f"trainer.logger.init_args.{folder}", settings.get(folder) or "")
            if wrong is not None:
                raise UserError(f"trainer.{key}: {name} {wrong}.")


def adopt_adapter(config: Any, args: Sequence[str], verb: str) -> None:  # noqa: ANN401 - as above
    """Take base model, LoRA settings and prompt format from `model.adapter` where the user left the defaults.

    A flag, a variable, or a config's value other than the default is the user's and must agree with the adapter, or a
    UserError is raised.
    """
    if config.model.adapter is None or config.model.lora is None:
        return
    folder, stated = adapter_folder(config.model.adapter), set()
    for _, where, settings in _given(args, f"{ENV_PREFIX}_{verb.upper()}__"):
        direct = where.startswith(("flag ", "environment "))
        stated |= {name for name in settings if direct or name == "model.language_model.base_model"}
    base, revision, theirs = adapter_settings(folder)
    model, adopted, differing = config.model.language_model, [], []
    is_default = model.base_model == BUILTIN and "model.language_model.base_model" not in stated
    if is_default and base and not is_same_model(BUILTIN, base):
        model.base_model = base
        adopted.append(f"model.language_model.base_model {base}")
    metadata = read_metadata(folder, model.base_model)  # refuses another base model
    if model.base_model == base:
        model.revision = model.revision or revision
    ours, defaults = Lora(**config.model.lora.as_dict()).structure(), Lora().structure()
    shared = sorted(ours.keys() & theirs.keys())
    compared = {f"model.lora.{name}": (ours[name], theirs[name], defaults[name]) for name in shared}
    if metadata is not None:
        forms = (config.data.prompt_format, metadata.prompt_format, LanguageModel().prompt_format)
        compared["data.prompt_format"] = forms
    for key, (mine, other, default) in compared.items():
        if mine != other and (key in stated or mine != default):
            differing.append(f"{key}: the adapter {folder} was trained with {other!r} and the config says {mine!r}")
        elif mine != other:
            adopted.append(f"{key} {other}")
            config[key] = other
    model.prompt_format = config.data.prompt_format
    if differing:
        raise UserError(f"{'; '.join(differing)}; leave out what the adapter sets, or set it to the same.")
    if adopted:
        tell(f"taken from {folder}: {', '.join(adopted)}")


def check_variables(command: str, parser: ArgumentParser) -> None:
    """Check that every variable for a command is a setting; jsonargparse ignores a misspelt one."""
    settings = {action.dest.replace(".", "__").lower() for action in parser._actions}
    for name in sorted(os.environ):
        if not name.startswith(f"{ENV_PREFIX}_") or name in ("MEDLIT_CACHE", "MEDLIT_SERVE_TOKEN"):
            continue
        verb, _, key = name.removeprefix(f"{ENV_PREFIX}_").lower().partition("__")
        if not (key in settings if verb == command else verb in {*MODEL_VERBS, *TOOLS}):
            raise UserError(f"{name}: there is no such setting; names are like {ENV_PREFIX}_FIT__MODEL__LORA__R.")


def settle_length(args: Sequence[str], env_prefix: str) -> list[str]:
    """The arguments, with flags that remove those limits of a fit's length that a later limit replaces.

    `max_epochs` on the command line replaces the `max_steps` of a config or the default, and the other way round. Where
    one config, or the command line, gives both, the first that a fit reaches ends it. A later null or -1 lifts a limit.
    """
    none = {"trainer.max_steps": "-1", "trainer.max_epochs": "null"}
    layers = dict.fromkeys(none, -1)
    for layer, _, settings in _given(args, env_prefix):
        given = {name: str(settings[name]) not in ("None", "null", "-1") for name in none if name in settings}
        layers |= {name: layer if is_limit else -1 for name, is_limit in given.items()}
    replaced = [name for name, layer in layers.items() if layer < max(layers.values())]
    return [*args, *(f"--{name}={none[name]}" for name in replaced)]


def check_given(args: Sequence[str], env_prefix: str) -> None:
    """Refuse settings of an earlier release, and a value for a whole group, which the parser would lose."""
    for _, where, settings in _given(args, env_prefix):
        for name in _GROUPS & settings.keys():
            beside = os.path.join(os.path.dirname(where), str(settings[name]))  # a config's files are relative to it
            text = beside if os.path.isfile(beside) else settings[name]
            inner = _read(text, name)[1] if isinstance(text, str) else settings
            if name in inner:
                raise UserError(f"{not_a_group(name, inner[name])} ({where}).")
        found = {name: text for name, value in settings.items() if (text := advice(name, value))}
        if found:
            raise UserError("; ".join(f"{name}: {text}" for name, text in found.items()) + f" ({where}).")


def advice(name: str, value: object) -> str | None:
    """What to write instead of a setting, or None if it is not an old one."""
    for old, new in RENAMED.items():
        if name == old or name.startswith(f"{old}."):
            renamed = new + name.removeprefix(old)
            also = advice(renamed, value)
            return f"renamed to {renamed}" + (f", where {also}" if also else "")
    return REMOVED.get(name) or (OLD_VALUES.get((name, value)) if isinstance(value, str | bool) else None)


def _given(args: Sequence[str], env_prefix: str) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Yield precedence, place and settings (name -> value) of each source; the parser checks that the names exist."""
    for variable, value in os.environ.items():
        if variable.startswith(env_prefix):
            name = variable.removeprefix(env_prefix).replace("__", ".").lower()
            yield (0, *_read(value)) if name == "config" else (0, f"environment variable {variable}", {name: value})
    layer = 1  # of the flags before the first config; as for the parser, a config overrides what is written before it
    for argument, following in zip_longest(args, args[1:], fillvalue=""):
        flag, equals, value = argument.partition("=")
        value = value if equals else following
        if flag in ("-c", "--config") or (argument.startswith("-c") and os.path.isfile(argument[2:])):
            layer += 2  # another text with this beginning may be a note
            yield layer - 1, *_read(value if flag in ("-c", "--config") else argument[2:])
        elif flag == "--trainer":
            yield layer, *_read(value, "trainer")
        elif flag.startswith("--"):
            yield layer, f"flag {flag}", {flag[2:]: value}


def _read(config: str, group: str = "") -> tuple[str, dict[str, Any]]:
    """Name and settings of a config, or of a group of settings: a file, or the YAML text itself."""
    is_file = os.path.isfile(config)
    try:
        values = yaml.safe_load(Path(config).read_text(encoding="utf-8") if is_file else config)
    except (yaml.YAMLError, OSError, ValueError) as error:
        if not is_file or isinstance(error, OSError):  # the parser reports it
            return config, {}
        if isinstance(error, UnicodeDecodeError | yaml.reader.ReaderError):
            raise UserError(f"config: {config} is not text in UTF-8; save it as such.") from None
        fault, is_key = f": no valid YAML ({error})", "simple key" in str(getattr(error, "context", ""))  # no colon
        if isinstance(error, yaml.MarkedYAMLError) and (at := error.context_mark if is_key else error.problem_mark):
            fault = f", line {at.line + 1}: no valid YAML ({error.problem})"
        raise UserError(f"config: {config}{fault}; correct it.") from error
    if not group and (isinstance(values, str) or (is_file and not isinstance(values, dict))):
        raise UserError(no_config(config))
    return config if is_file else "the text of --config", _flat(group, values)


def _flat(name: str, value: Any) -> dict[str, Any]:  # noqa: ANN401
    if not isinstance(value, dict):
        return {name: value}
    inner = [_flat(f"{name}.{key}" if name else str(key), below) for key, below in value.items()]
    return {key: leaf for settings in inner for key, leaf in settings.items()}
