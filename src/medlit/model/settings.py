"""The model's settings, grouped as `--help` and the YAML show them."""

# ruff: noqa: RUF009 - `_lora` makes a field

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from medlit.base_model import BUILTIN
from medlit.errors import UserError
from medlit.number_types import DropoutRate, NonNegativeInt, NonNegativeNumber, PositiveInt, PositiveNumber, Probability

TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class LanguageModel:
    """The frozen base model.

    Attributes:
        base_model: a Hub id, a local folder, or 'builtin:smollm2-135m' (a pretrained 135M Llama from a PyPI package).
            Exactly the repository that is named is loaded; one with '-bnb-4bit' in its name is a smaller download.
        revision: commit, tag or branch of a Hub model.
        max_length: most tokens of prompt and answer together, in training and in evaluation.
        load_in_4bit: hold the frozen weights in 4 bits each (bitsandbytes NF4).
        dtype: number format of the frozen computation; 'auto' is bfloat16 from Ampere on, float16 before, float32 on a
            CPU.
        gradient_checkpointing: 'auto' keeps the activations of as many layers as fit into the GPU's memory and
            recomputes the others in the backward pass; on a CPU it keeps all. 'unsloth' keeps none and holds the
            layers' inputs in host memory (least GPU memory), 'none' keeps all.
        memory_budget_gib: most GPU memory, in GiB, that gradient_checkpointing 'auto' fills; null: what is free.
    """

    base_model: str = BUILTIN
    revision: str | None = None
    max_length: PositiveInt = 2048
    load_in_4bit: bool = True
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    gradient_checkpointing: Literal["auto", "unsloth", "none"] = "auto"
    memory_budget_gib: PositiveNumber | None = None


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
        target_modules: linear layers that get an adapter.
        rslora: scale by alpha / sqrt(r) instead (Kalajdzievski 2023, arXiv 2312.03732).
        dora: train the magnitude of each weight apart from its direction (Liu 2024, arXiv 2402.09353); slower, without
            Unsloth's fast path.
        loftq: initialise the adapter to compensate for quantisation (Li 2023, arXiv 2310.08659); needs a GPU and
            weights that are not stored in 4 bits.
        seed: seed of the adapter's initialisation and of dropout.
    """

    r: PositiveInt = _lora(16, "r")
    alpha: PositiveInt = _lora(16, "lora_alpha")
    dropout: DropoutRate = _lora(0.0, "lora_dropout", structural=False)
    bias: Literal["none", "all", "lora_only"] = _lora("none", "bias")
    target_modules: list[str] = _lora(lambda: list(TARGET_MODULES), "target_modules")
    rslora: bool = _lora(False, "use_rslora")
    dora: bool = _lora(False, "use_dora")
    loftq: bool = _lora(False)  # changes the frozen weights too, in a way that the same setting repeats at load
    seed: NonNegativeInt = _lora(3407, structural=False)

    def as_peft(self) -> dict[str, Any]:
        """The arguments of PEFT's `LoraConfig`, without initialisation."""
        return {f.metadata["peft"]: getattr(self, f.name) for f in fields(self) if f.metadata["peft"]}

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
        max_new_tokens: 'generate': most tokens of an answer.
        stop_early: 'generate': stop as soon as no continuation can change the label; false: at the EOS token.
        abstain_below: predict, for a table: leave the specialty empty and set 'abstained' where the answer's
            probability is below this (0 to 1); the model's answer stays in 'answer'. Needs a mode that gives
            probabilities. null: never abstain.
    """

    mode: Literal["generate", "constrained", "likelihood"] = "generate"
    max_new_tokens: PositiveInt = 32
    stop_early: bool = True
    abstain_below: Probability | None = None


def check_decoding(decoding: Decoding) -> None:
    """Check that predictions can abstain as the settings say.

    Raises:
        UserError: naming the setting.
    """
    threshold = decoding.abstain_below
    if threshold is not None and not 0 <= threshold <= 1:
        raise UserError(f"model.decoding.abstain_below: must be a probability from 0 to 1, not {threshold}.")
    if threshold is not None and decoding.mode == "generate":
        raise UserError(
            "model.decoding.abstain_below: 'generate' gives no probabilities; set model.decoding.mode to 'likelihood'"
            " or 'constrained', or leave abstain_below out."
        )
