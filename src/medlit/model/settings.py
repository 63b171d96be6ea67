"""The model's settings, grouped as `--help` and the YAML show them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from medlit.base_model import BUILTIN

TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass
class LanguageModel:
    """The frozen base model.

    Attributes:
        base_model: a Hub id, a local folder, or 'builtin:smollm2-135m' (a pretrained 135M Llama that comes along). The
            very repository that is named is loaded; a name with '-bnb-4bit' is a smaller download for load_in_4bit.
        revision: commit, tag or branch of a Hub model.
        max_length: most tokens of prompt and answer together, in training and in evaluation.
        load_in_4bit: hold the frozen weights in 4 bits each (bitsandbytes NF4).
        dtype: number format of the frozen computation; 'auto' is bfloat16 from Ampere on, float16 before, float32 on a
            CPU.
        gradient_checkpointing: 'auto' keeps as many layers' activations as fit into the GPU's memory and computes the
            others' again in the backward pass; on a CPU it keeps all. 'unsloth' keeps none and holds the layers' inputs
            in host memory (least GPU memory), 'off' keeps all.
        memory_budget_gib: most GPU memory, in GiB, that gradient_checkpointing 'auto' fills; null: what is free.
    """

    base_model: str = BUILTIN
    revision: str | None = None
    max_length: int = 2048
    load_in_4bit: bool = True
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    gradient_checkpointing: Literal["auto", "unsloth", "off"] = "auto"
    memory_budget_gib: float | None = None


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
        loftq: initialise so as to make up for quantisation (Li 2023, arXiv 2310.08659); needs a GPU and weights not yet
            in 4-bit.
        seed: seed of the adapter's random initialisation and of dropout.
    """

    r: int = 16
    alpha: int = 16
    dropout: float = 0.0
    bias: Literal["none", "all", "lora_only"] = "none"
    target_modules: list[str] = field(default_factory=lambda: list(TARGET_MODULES))
    rslora: bool = False
    loftq: bool = False
    seed: int = 3407

    def as_peft(self) -> dict[str, Any]:
        """The adapter as PEFT calls its parts, but for how its weights begin."""
        return {
            "r": self.r,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "bias": self.bias,
            "target_modules": list(self.target_modules),
            "use_rslora": self.rslora,
        }

    def structure(self) -> dict[str, Any]:
        """The settings that decide which weights there are and what they mean; seed and dropout do not.

        LoftQ does: it changes the frozen weights too, in a way that the same setting makes again at load.
        """
        kept = ("r", "alpha", "bias", "target_modules", "rslora", "loftq")
        return {k: sorted(v) if isinstance(v, list) else v for k, v in asdict(self).items() if k in kept}


@dataclass
class Optimizer:
    """AdamW with 8-bit state (Dettmers 2021, arXiv 2110.02861) and the course of its learning rate.

    Attributes:
        learning_rate: the highest, reached after the warm-up.
        weight_decay: decoupled weight decay.
        warmup_steps: optimizer steps of linear warm-up.
        schedule: what the rate does after the warm-up: 'linear' and 'cosine' fall to 0 at the last step, 'constant'
            stays.
        loraplus_ratio: LoRA's B matrices learn at this many times the learning rate (LoRA+; Hayou 2024, arXiv
            2402.12354); 1 is LoRA.
        on_nonfinite: what a step does whose loss or gradient is no finite number: 'stop' ends the fit and names the
            notes, 'skip' goes on without it and counts it in train/skipped_steps.
    """

    learning_rate: float = 2e-4
    weight_decay: float = 0.01
    warmup_steps: int = 5
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    loraplus_ratio: float = 1.0
    on_nonfinite: Literal["stop", "skip"] = "stop"


@dataclass
class Decoding:
    """How the model answers.

    Attributes:
        mode: 'generate' is free greedy generation, where what is not on the list of labels counts as invalid;
            'constrained' takes the likeliest token that keeps the answer on the list; 'likelihood' takes the label
            whose whole answer is likeliest. The last two give probabilities.
        max_new_tokens: 'generate': most tokens of an answer.
        stop_early: 'generate': end an answer as soon as nothing that may follow can change its label; false goes on to
            the model's own end.
        length_normalise: 'likelihood': compare labels by the mean log-likelihood of their tokens instead of the sum.
        content_free: 'likelihood': notes that say nothing, such as 'N/A'; each label's probability is divided by what
            it is for them (contextual calibration; Zhao 2021, arXiv 2102.09690). Empty: no calibration.
        abstain_below: predict, for a table: leave a note's specialty empty, and say so in the column 'abstained', where
            the answer's probability is below this (0 to 1); what the model answered stays in 'answer'. Needs a mode
            that gives probabilities. null: never abstain.
    """

    mode: Literal["generate", "constrained", "likelihood"] = "generate"
    max_new_tokens: int = 32
    stop_early: bool = True
    length_normalise: bool = False
    content_free: list[str] = field(default_factory=list)
    abstain_below: float | None = None
