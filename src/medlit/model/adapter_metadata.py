"""What trained weights belong to: `medlit.json` beside an adapter, `medlit` in a checkpoint.

Base model, LoRA settings, prompt, its template, instruction and labels must match wherever the weights are loaded.
Length limit and number formats need not: a config states its own, and `SpecialtyPredictor`, which has no config, uses
those in the file. Temperature and thresholds are fitted to the validation notes and kept in the adapter's file alone.
"""

import math
import stat
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, Self, get_args, get_type_hints

from medlit.atomic_io import read_json, write_json
from medlit.base_model import load_tokenizer
from medlit.data.labels import LabelSet
from medlit.data.prompt import INSTRUCTION, PROMPTS, ChatPrompt, PromptFormat
from medlit.data.sources import public_name
from medlit.data.splits import DataFingerprint
from medlit.errors import UserError, tell
from medlit.model.prior import PRIOR_FILE, TokenPrior
from medlit.model.settings import Decoding, LanguageModel, Lora
from medlit.run_folder import run_of

METADATA_FILE = "medlit.json"
PEFT_FILE = "adapter_config.json"
_DTYPES = get_args(get_type_hints(LanguageModel)["dtype"])


@dataclass(frozen=True)
class InferenceSettings:
    """The other settings that an adapter's answers depend on."""

    max_length: int  # maximum number of tokens in prompt and answer together
    max_response_tokens: int  # tokens of these that are reserved for the answer
    load_in_4bit: bool  # whether the frozen weights are held in bitsandbytes NF4
    dtype: Literal["auto", "bfloat16", "float16", "float32"]  # number format of the frozen computation
    load_in_fp8: bool = False  # whether those of its linear layers are rounded to FP8


@dataclass(frozen=True)
class AdapterMetadata:
    """Metadata of an adapter or a checkpoint."""

    base_model: str  # as the user named it
    revision: str | None  # of the base model on the Hub
    lora: dict[str, Any]  # the structural settings of `Lora`; empty for the bare base model
    prompt: str  # format and version of the prompt
    labels: list[str]  # label names, in the order of their ids
    instruction: str | None = None  # the instruction of the prompt; None if the file lacks it
    inference: InferenceSettings | None = None  # None if the file lacks it
    # `decoding_key` -> what is fitted to the validation notes: temperature, and thresholds by `Decoding.sets`.
    temperatures: dict[str, float] = field(default_factory=dict)
    thresholds: dict[str, dict[str, float]] = field(default_factory=dict)
    data: DataFingerprint | None = None  # the notes that the weights were trained with; an adapter's file only
    template: str | None = None  # the chat template with its texts in braces; None for Alpaca's

    @classmethod
    def of(
        cls,
        language_model: LanguageModel,
        lora: Lora | None,
        label_set: LabelSet,
        instruction: str = INSTRUCTION,
        max_response_tokens: int = 32,
    ) -> Self:
        """The metadata of a model with these settings; a UserError if they need a chat template that it lacks."""
        of = language_model
        return cls(
            base_model=of.base_model,
            revision=of.revision,
            lora={} if lora is None else lora.structure(),
            prompt=PROMPTS[of.prompt_format].version,
            labels=list(label_set.names),
            instruction=instruction,
            inference=InferenceSettings(of.max_length, max_response_tokens, of.load_in_4bit, of.dtype, of.load_in_fp8),
            template=_chat_template(of.base_model, of.revision) if of.prompt_format == "chat" else None,
        )

    @classmethod
    def from_dict(cls, values: object, source: str = "ckpt_path: the file") -> Self:
        """Read what `to_dict` gave; a UserError if it is something else, such as release 0.1's."""
        unknown = UserError(f"{source} was not written by this version of medlit; use its own, or fit again.")
        try:
            given = dict(values)  # type: ignore[call-overload]
            if given.get("lora", {}).get("loftq") is False:  # of release 0.2, which has since lost LoftQ
                given["lora"] = {name: value for name, value in given["lora"].items() if name != "loftq"}
            inference = given.pop("inference", None)
            temperatures, thresholds = (given.pop(name, {}) for name in ("temperatures", "thresholds"))
            metadata = cls(
                **given | {"data": DataFingerprint.from_dict(given.get("data"))},
                inference=None if inference is None else InferenceSettings(**inference),
                temperatures=dict(temperatures),
                thresholds={key: dict(value) for key, value in thresholds.items()},
            )
        except (TypeError, ValueError, AttributeError) as error:
            raise unknown from error
        if not metadata._is_typed():
            raise unknown
        LabelSet.from_names(metadata.labels)
        return metadata

    @property
    def prompt_format(self) -> PromptFormat:
        """The format of the prompt, whatever its version."""
        return "chat" if self.prompt.startswith("chat-") else "alpaca"

    def _is_typed(self) -> bool:
        """Whether every value has the type that medlit writes."""
        optional: list[object] = [text or "" for text in (self.revision, self.instruction, self.template)]
        texts = [self.base_model, self.prompt, *optional]
        temperatures = self.temperatures.values()
        return (
            (type(self.lora), type(self.labels)) == (dict, list)
            and all(isinstance(text, str) for text in [*texts, *self.lora, *self.labels, *self.temperatures])
            and all(isinstance(t, int | float) and 0 < t < math.inf for t in temperatures)
            and all(isinstance(t, int | float) and 0 <= t <= 1 for by in self.thresholds.values() for t in by.values())
            and (self.inference is None or _are_inference_settings(self.inference))
        )

    @classmethod
    def read(cls, file: Path) -> Self:
        """Read a metadata file, and from PEFT's beside it how the weights apply; a UserError if one is damaged."""
        try:
            values = read_json(file)
        except (ValueError, RecursionError, TypeError) as error:
            raise UserError(f"model.adapter: {file} is damaged; copy the adapter's folder again.") from error
        metadata = cls.from_dict(values, f"model.adapter: {file}")
        if not (peft := file.with_name(PEFT_FILE)).is_file():
            return metadata
        recorded = (defaults := Lora().structure()) | metadata.lora
        theirs, default = read_peft_config(peft)[1].structure(), defaults["target_modules"]
        # Where the default names do not fit a family, PEFT's file has those of the layers that were adapted.
        if recorded["target_modules"] == default and not set(default).issubset(theirs["target_modules"]):
            recorded["target_modules"] = theirs["target_modules"]
            metadata = replace(metadata, lora=recorded)
        lora = recorded | theirs | {name: recorded[name] for name in ("target_modules", "layers_to_transform")}
        return metadata if lora == recorded else replace(metadata, lora=lora, temperatures={}, thresholds={})

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for a checkpoint that loads without running code, and for JSON."""
        return asdict(self)

    def public(self, *, with_base: bool = True) -> Self:
        """Without the folders of the notes and, unless it has to be found there, of the base model."""
        data = None if self.data is None else replace(self.data, source=public_name(self.data.source))
        return replace(self, data=data, base_model=public_name(self.base_model) if with_base else self.base_model)


@cache  # every checkpoint has it
def _chat_template(base_model: str, revision: str | None) -> str:
    return str(ChatPrompt(load_tokenizer(base_model, revision)).template)


def read_peft_config(file: Path) -> tuple[dict[str, Any], Lora]:
    """All of an `adapter_config.json`, and its LoRA settings; a UserError if damaged or not run by medlit."""
    try:
        config = read_json(file)
    except (OSError, ValueError, RecursionError, TypeError) as error:
        raise UserError(f"model.adapter: {file} is missing or broken; copy the adapter's folder again.") from error
    try:
        return config, Lora.from_peft(config)
    except ValueError as error:
        raise UserError(
            f"model.adapter: in {file} {error}; merge the adapter into its base model with PEFT (merge_and_unload) and"
            " set model.language_model.base_model to the merged folder."
        ) from error


def _are_inference_settings(given: InferenceSettings) -> bool:
    counts, switches = (given.max_length, given.max_response_tokens), (given.load_in_4bit, given.load_in_fp8)
    typed = all(type(count) is int and count > 0 for count in counts) and all(type(on) is bool for on in switches)
    return typed and given.dtype in _DTYPES


def check_metadata(ours: AdapterMetadata, theirs: AdapterMetadata, source: str) -> None:
    """Raise a UserError unless weights fit a config's model and know every label of its data."""
    for key, mine, other in (
        ("model.language_model.base_model", ours.base_model, theirs.base_model),
        ("model.language_model.revision", ours.revision, theirs.revision),
        ("data.prompt_format", ours.prompt_format, theirs.prompt_format),
        ("data.instruction", ours.instruction, theirs.instruction or ours.instruction),
    ):
        if mine != other:
            raise UserError(
                f"{key}: {source} was trained with {other!r} and the config says {mine!r}; set it to {other!r}."
            )
    if not ours.lora:
        raise UserError(f"model.lora: null is the bare base model and {source} is an adapter; leave out one of them.")
    defaults = Lora().structure()
    for key in {**defaults, **theirs.lora}:
        mine, other = ours.lora.get(key), theirs.lora.get(key, defaults.get(key))
        if mine != other:
            raise UserError(f"model.lora.{key}: {source} was trained with {other!r} and the config says {mine!r}.")
    if ours.prompt != theirs.prompt:
        raise UserError(
            f"{source} was trained with the prompt {theirs.prompt!r} and this medlit uses {ours.prompt!r}; use the"
            " version of medlit that wrote it."
        )
    if theirs.template != ours.template:
        raise UserError(
            f"model.language_model.revision: {source} was trained with another chat template than {ours.base_model}"
            " has; set it to the revision that has the template, or train again."
        )
    known = LabelSet(tuple(theirs.labels))
    unknown = [name for name in ours.labels if known.index(name) is None]
    if unknown:
        raise UserError(
            f"data.columns.label: the data has the label {unknown[0]!r}, which {source} was not trained on; map it"
            " with data.labels.aliases, or train again."
        )


def decoding_key(decoding: Decoding) -> str:
    """The decoding settings that a temperature belongs to, as a key."""
    return f"mode={decoding.mode}{';prior=tfidf' * decoding.uses_prior}"


def metadata_of_weights(checkpoint: str | Path | None, adapter: str | Path | None) -> Path | None:
    """Metadata file of the adapter folder that holds the weights in use; None where only a checkpoint holds them."""
    folder = None if adapter is None else Path(adapter).expanduser()
    if checkpoint is not None:
        run = run_of(Path(checkpoint)) if Path(checkpoint).name == "best.ckpt" else None
        folder = None if run is None else run / "adapter"
    file = None if folder is None else folder / METADATA_FILE
    return file if file is not None and file.is_file() else None


def read_fitted(
    checkpoint: str | Path | None, adapter: str | Path | None, decoding: Decoding, complete: bool = False
) -> tuple[float | None, dict[str, float], TokenPrior | None]:
    """Temperature, thresholds and prior of some weights; `complete`: a UserError if the settings' sets lack theirs."""
    file, key = metadata_of_weights(checkpoint, adapter), decoding_key(decoding)
    kept = {} if file is None else vars(AdapterMetadata.read(file))
    temperature, thresholds = kept.get("temperatures", {}).get(key), kept.get("thresholds", {}).get(key, {})
    if complete and decoding.sets and decoding.sets not in thresholds:
        name = "answer" if decoding.coverage is None else "coverage"
        advice = "run 'medlit validate' with these settings on the best checkpoint or its adapter first"
        lacking = f"the weights have no threshold for {decoding.sets} with {decoding.mode!r}; {advice}"
        if checkpoint is None and adapter is None:
            lacking = f"there are no weights to have a threshold; give ckpt_path or model.adapter, or leave {name} out"
        raise UserError(f"model.decoding.{name}: {lacking}.")
    if complete and thresholds.get(decoding.sets) == 0.0:
        tell("model.decoding.coverage: the validation notes were too few for it, so that every set holds every label")
    has_prior = decoding.uses_prior and file is not None and file.with_name(PRIOR_FILE).is_file()
    return temperature, thresholds, TokenPrior.load(file.with_name(PRIOR_FILE)) if has_prior and file else None


def write_fitted(file: Path, decoding: Decoding, temperature: float, thresholds: dict[str, float]) -> None:
    """Add a temperature, and the thresholds fitted at it, to an adapter's metadata file; the file's mode stays.

    Thresholds of other coverages stay if the temperature does, since then they were fitted to the same answers. Raises
    a UserError if the file is damaged, or its folder is full or closed.
    """
    key, values = decoding_key(decoding), AdapterMetadata.read(file).to_dict()
    is_same = math.isclose(values["temperatures"].get(key, 0.0), temperature, rel_tol=1e-4)  # as it is fitted
    values["temperatures"][key] = temperature
    values["thresholds"][key] = (values["thresholds"].get(key, {}) if is_same else {}) | thresholds
    mode = stat.S_IMODE(file.stat().st_mode)
    write_json(file, values)
    file.chmod(mode)
