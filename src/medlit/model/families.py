"""What differs between the families of base models: the parts of a model, its layers, its head and its adapter."""

import contextlib
import inspect
import re
from dataclasses import replace
from functools import cache
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from medlit.base_model import PACKING_FAMILIES
from medlit.errors import UserError
from medlit.model.settings import TARGET_MODULES, Lora

# Attribute of a model whose prompts are computed again for each continuation; the self-check sets it.
REPLAY = "_medlit_replay"
# Attribute of a text part that is loaded alone: the prefix of its decoder's names, there and in the whole model.
PREFIXES = "_medlit_prefixes"
# What PEFT, given one of these, adapts in a mixture of experts: the experts, which medlit does not.
_EXPERT_LAYERS = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
# Names of routers, experts, attention to an encoder, and the grouped projection of DeepSeek V4.
_LEFT_OUT = re.compile(r"router|indexer|\.experts\.|encoder_attn|cross_?att|o_a_proj")
_NUMBERED = re.compile(r"(.*?\.)(\d+)(\..*)")  # a layer's name around the number of its decoder layer


def causal_lm(model: nn.Module) -> Any:  # noqa: ANN401 - transformers' causal language models share no typed base
    """The transformers model inside PEFT's wrapper, or the model itself."""
    from peft import PeftModel

    return model.base_model.model if isinstance(model, PeftModel) else model


def packing_route(config: Any) -> str | None:  # noqa: ANN401 - transformers' configurations share no typed base
    """How a family's layers take packed notes on a GPU: 'stock', 'fused' or 'softcapped'; None if they do not."""
    return PACKING_FAMILIES.get(config.model_type)


def unlike_llama(config: Any) -> str:  # noqa: ANN401 - as above
    """What a model computes otherwise than Llama 3; empty if nothing."""
    if config.model_type != "llama":
        return f"this is {config.model_type!r}"
    if (rope_type := config.rope_parameters["rope_type"]) not in ("default", "llama3"):
        return f"this one has other rotary positions ({rope_type!r})"
    return "" if config.hidden_act == "silu" else f"this one has another activation ({config.hidden_act!r})"


def loaded_part(config: Any) -> Any:  # noqa: ANN401 - as above
    """The configuration to load: the text part's if it has a class, else the whole; a UserError if it is no decoder."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING

    text = config.get_text_config(decoder=True)
    has_encoder = any(getattr(each, "is_encoder_decoder", False) for each in (config, text))
    is_part = text is not config and text.model_type.startswith(config.model_type)
    if is_part and type(text) in MODEL_FOR_CAUSAL_LM_MAPPING and not has_encoder:
        return text
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING
    if has_encoder or not known:
        raise UserError(
            f"model.language_model.base_model: {config.model_type!r} models are not decoders that generate text; choose"
            " a causal language model."
        )
    return config


def load_options(config: Any, *, on_gpu: bool) -> dict[str, Any]:  # noqa: ANN401 - as above
    """A loader's arguments besides the name: only the text part of a multimodal model, and the attention to use."""
    from transformers.models.auto import modeling_auto as auto

    text = config.get_text_config(decoder=True)
    part, options = loaded_part(config), dict[str, Any]()
    if type(part) not in auto.MODEL_FOR_CAUSAL_LM_MAPPING and not on_gpu:
        # Where Unsloth looks for the class on a CPU; on a GPU it finds the same one.
        multimodal, kind = auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES, part.model_type
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind] = multimodal[kind]
    if part is not config:
        if on_gpu:
            options["text_only"] = True
        else:
            text.quantization_config = getattr(config, "quantization_config", None)
            names = {r"^language_model\.model\.": "model.", r"^model\.language_model\.": "model."}
            options |= {"config": text, "key_mapping": names | {r"^language_model\.lm_head\.": "lm_head."}}
    if not on_gpu and getattr(text, "attn_logit_softcapping", None):
        options["attn_implementation"] = "eager"  # SDPA leaves the cap out
    return options


def body(model: nn.Module) -> Any:  # noqa: ANN401 - see causal_lm
    """The transformer below the output head, whatever its class calls it."""
    inner = causal_lm(model)
    if inner.base_model is not inner:
        return inner.base_model
    embedding = inner.get_input_embeddings()  # Llama 4's class gives its body another name than it has
    return next((part for part in inner.children() if any(each is embedding for each in part.modules())), inner)


def text_config(model: nn.Module) -> Any:  # noqa: ANN401 - see causal_lm
    """The text decoder's configuration; in a model of several modalities it is nested."""
    return causal_lm(model).config.get_text_config(decoder=True)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The text decoder's layers; the decoder itself where they are not in one list."""
    decoder = body(model).get_decoder()
    count = getattr(text_config(model), "num_hidden_layers", None)
    lists = ((name, part) for name, part in decoder.named_modules() if isinstance(part, nn.ModuleList))
    # A GIT's decoder holds its vision tower.
    text = (part for name, part in lists if len(part) == count and not re.search("vision|image|audio", name))
    return list(next(text, [decoder]))


def block_swap(model: nn.Module) -> Any:  # noqa: ANN401 - of Unsloth, which imports it on a GPU only
    """What copies the decoder layers at its `indices` from host memory to the GPU; None without such layers."""
    swaps = (getattr(part, "_unsloth_block_swap", None) for part in body(model).modules())
    return next((swap for swap in swaps if swap is not None), None)


def decoder_prefix(model: nn.Module) -> str:
    """What the names of the text decoder's parts start with."""
    decoder = body(model).get_decoder()
    name = next(name for name, part in causal_lm(model).named_modules() if part is decoder)
    return f"{name}." if name else ""


def name_in_base(model: nn.Module, name: str, *, back: bool = False) -> str:
    """A layer's or weight's name in the base model as its repository's own class loads it; `back`: in `model`."""
    before, after = getattr(causal_lm(model), PREFIXES, ("", ""))[:: -1 if back else 1]
    return re.sub(rf"^(base_model\.model\.)?{re.escape(before)}", rf"\g<1>{after}", name)


def has_dropout(model: nn.Module) -> bool:
    """Whether a training pass draws random numbers: LoRA's dropout, or dropout or jitter of the base model."""
    layers = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    # Many families have no layer for it, but a rate above 0 in their configuration.
    settings = text_config(model).to_json_string(use_diff=False)
    return layers or re.search(r'(drop|jitter)[^"]*": [\d.e-]*[1-9]', settings) is not None


def adaptable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of the text decoder that LoRA adapts as intended, by their full names.

    Left out are routers, experts and what PEFT takes for their names, attention to an encoder that is not there, and
    layers whose weight their module reads by itself, past an adapter, as Mamba's kernels do.
    """
    inside = {part for layer in decoder_layers(model) for part in layer.modules()}
    parts: dict[str, nn.Module] = dict(causal_lm(model).named_modules())
    mixture = any(f".{name}".endswith(".experts") for name in parts)
    found: dict[str, nn.Module] = {}
    for name, part in parts.items():
        owner, _, leaf = name.rpartition(".")
        if part in inside and isinstance(part, nn.Linear | Conv1D) and _NUMBERED.match(name):
            routes = leaf.endswith("gate") and hasattr(parts[owner], "experts")
            left_out = routes or (mixture and leaf in _EXPERT_LAYERS) or _LEFT_OUT.search(name)
            if not left_out and not _reads_weight(type(parts[owner]), leaf):  # type: ignore[arg-type]
                found[name] = part
    return found


@cache
def _reads_weight(owner: type, leaf: str) -> bool:
    """Whether a module's code reads the weight of one of its layers instead of calling the layer."""
    try:
        source = "".join(inspect.getsource(each) for each in owner.__mro__ if each not in nn.Module.__mro__)
    except (OSError, TypeError):
        return False
    return re.search(rf"self\.{leaf}\.weight\b(?!\.(dtype|device|shape)|\[)", source) is not None


def fit_targets(model: nn.Module, lora: Lora) -> Lora:
    """The settings, with the family's own layers if the default names do not fit; a UserError for unknown layers."""
    layers = adaptable_layers(model)
    ends = sorted({name.rpartition(".")[2] for name in layers})
    if sorted(lora.target_modules) == sorted(TARGET_MODULES) and ends and not set(TARGET_MODULES).issubset(ends):
        lora = replace(lora, target_modules=ends)
    named = isinstance(targets := lora.target_modules, list)
    given = [("target_modules", text, rf"(.*\.)?{re.escape(text)}") for text in targets if named]
    given += [] if named else [("target_modules", str(targets), str(targets))]
    spellings = [list(layers), [name_in_base(model, name) for name in layers]]
    for setting in ("rank_pattern", "alpha_pattern"):
        given += [(setting, text, rf"(.*\.)?({text})") for text in getattr(lora, setting)]
    for setting, text, pattern in given:
        with contextlib.suppress(re.error):
            own, base = ({i for i, n in enumerate(names) if re.fullmatch(pattern, n)} for names in spellings)
            if own | base if setting == "target_modules" else own and own == base:  # a pattern is saved as it is
                continue
        fault = f"the base model has no linear layer called {text!r} for an adapter"
        raise UserError(f"model.lora.{setting}: {fault}; it has {', '.join(ends) or 'none'}.")
    count = len(decoder_layers(model))
    if lora.layers_to_transform and max(lora.layers_to_transform) >= count:
        raise UserError(f"model.lora.layers_to_transform: the base model has {count} layers, from 0 to {count - 1}.")
    return lora


def target_layers(model: nn.Module, lora: Lora) -> dict[str, nn.Module]:
    """The layers that get an adapter, by their full names."""
    from peft.tuners.tuners_utils import check_target_module_exists

    layers, chosen = adaptable_layers(model), lora.layers_to_transform
    named = [n for n in layers if any(check_target_module_exists(lora, each) for each in (n, name_in_base(model, n)))]
    return {n: layers[n] for n in named if not chosen or int(_NUMBERED.match(n)[2]) in chosen}  # type: ignore[index]


def peft_targets(model: nn.Module, lora: Lora) -> dict[str, Any]:
    """PEFT's settings for the layers to adapt: their full names where PEFT would adapt others of the same names."""
    from peft.tuners.tuners_utils import check_target_module_exists

    chosen, targets, layers = target_layers(model, lora), lora.target_modules, lora.layers_to_transform
    theirs = {name for name, _ in causal_lm(model).named_modules() if check_target_module_exists(lora, name)}
    if theirs != chosen.keys() or (layers and isinstance(targets, str)):  # which PEFT does not take together
        targets, layers = "|".join(map(re.escape, chosen)), None  # exactly these
    turned = any(isinstance(part, Conv1D) for part in chosen.values())
    return {"target_modules": targets, "layers_to_transform": layers, "fan_in_fan_out": turned}


def targets_in_base(model: nn.Module) -> dict[str, Any]:
    """Which layers an adapter of a text part adapts, as PEFT's settings for the whole model; empty for any other."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not hasattr(inner := causal_lm(model), PREFIXES):
        return {}
    names = [name_in_base(model, name) for name, part in inner.named_modules() if isinstance(part, BaseTunerLayer)]
    return {"target_modules": "|".join(map(re.escape, names)), "layers_to_transform": None}


def sliding_window(model: nn.Module) -> int | None:
    """Tokens that a layer with a sliding window attends to, itself included; None without such layers."""
    return text_config(model).sliding_window if "sliding_attention" in attention_kinds(model) else None


def is_mixture(model: nn.Module) -> bool:
    """Whether a router sends each token to some of many experts."""
    return any(re.search("expert|router|moe", name) for name, _ in model.named_modules())


def attention_kinds(model: nn.Module) -> frozenset[str]:
    """Kinds of layers, in transformers' words: full_attention, sliding_attention, linear_attention, ..."""
    from transformers.cache_utils import get_layer_types_and_kwargs

    with contextlib.suppress(AttributeError):
        return frozenset(get_layer_types_and_kwargs(text_config(model))[0])
    return frozenset({"unknown"})


def most_tokens(model: nn.Module) -> int | None:
    """Tokens beyond which a model has no positions, or changes those of the whole batch; None without such a limit."""
    text = text_config(model)
    positions, rope = (getattr(text, name, None) for name in ("max_position_embeddings", "rope_parameters"))
    kinds = [each for each in (rope, *(rope or {}).values()) if isinstance(each, dict)]  # some have one for each kind
    limits = [each.get("original_max_position_embeddings") for each in kinds if each.get("rope_type") == "longrope"]
    limits += [positions for each in kinds if each.get("rope_type") == "dynamic"]
    if not rope and text.model_type != "rwkv" and attention_kinds(model) <= {"full_attention", "sliding_attention"}:
        limits += [positions, getattr(text, "max_seq_len", None)]
    return min((limit for limit in limits if limit and limit > 0), default=None)


def shares_prompts(model: nn.Module) -> bool:
    """Whether continuations can share a prompt's keys and values: without running states, chunks or shared layers."""
    known = attention_kinds(model) <= {"full_attention", "sliding_attention"}
    shared = getattr(text_config(model), "num_kv_shared_layers", 0)
    return known and not shared and not getattr(causal_lm(model), REPLAY, False)
