"""Every shipped config is parsed by the real parser and keeps its promises; no weights, no GPU."""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest
import yaml
from jsonargparse import Namespace

from medlit.cli.arguments import make_datamodule
from medlit.cli.cli import MedlitCLI
from medlit.data.samplers import micro_batches_per_step
from medlit.data.settings import Tokenizer

if TYPE_CHECKING:
    from lightning.pytorch.cli import LightningArgumentParser

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
RECIPE = CONFIGS / "llama31_8b.yaml"
SMALL = CONFIGS / "models" / "smollm2_135m.yaml"  # with its own rate and length
LAYERS = sorted([*CONFIGS.glob("models/*.yaml"), *CONFIGS.glob("hardware/*.yaml"), *CONFIGS.glob("debug/*.yaml")])
COMMAND = re.compile(r"medlit (\w+)((?: --config \S+| \\\n#)+)")


@cache
def parser(verb: str) -> LightningArgumentParser:
    """The parser of a verb, as `medlit` makes it."""

    class ParserOnly(MedlitCLI):
        def _set_seed(self) -> None: ...
        def before_instantiate_classes(self) -> None: ...
        def instantiate_classes(self) -> None: ...
        def after_instantiate_classes(self) -> None: ...
        def _run_subcommand(self, subcommand: str) -> None: ...

    return ParserOnly([verb]).parser


@cache
def parse(configs: tuple[Path, ...], verb: str = "fit", *flags: str) -> Namespace:
    """The settings of a verb after all layers; nothing is built."""
    layers = [argument for path in configs for argument in ("--config", str(path))]
    return parser(verb).parse_args([verb, *layers, *flags])[verb]


@cache
def unsloths_names() -> ModuleType:
    """Unsloth's tables of repositories, without Unsloth, whose import takes ten seconds."""
    package = importlib.util.find_spec("unsloth")
    assert package is not None
    assert package.origin is not None
    spec = importlib.util.spec_from_file_location("names", Path(package.origin).with_name("models") / "mapper.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def layered(path: Path) -> tuple[Path, ...]:
    """A config with what it is made to lie on."""
    return (path,) if path.parent == CONFIGS else (RECIPE, path)


def flat(values: dict[str, object], prefix: str = "") -> dict[str, object]:
    """Nested settings as dotted keys; lists, strategies and the like stay whole."""
    out: dict[str, object] = {}
    for key, value in values.items():
        if isinstance(value, dict) and "class_path" not in value:
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out


# RECIPE.md, value for value; None where medlit leaves the choice to the hardware, as the recipe does.
RECIPE_VALUES = {
    "seed_everything": 3407,
    "trainer.precision": None,
    "trainer.max_steps": 60,
    "trainer.gradient_clip_val": 1.0,
    "trainer.log_every_n_steps": 1,
    "model.language_model.base_model": "unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit",
    "model.language_model.max_length": 2048,
    "model.language_model.dtype": "auto",
    "model.language_model.load_in_4bit": True,
    "model.lora.r": 16,
    "model.lora.alpha": 16,
    "model.lora.dropout": 0.0,
    "model.lora.bias": "none",
    "model.lora.target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "model.lora.rslora": False,
    "model.lora.dora": False,
    "model.lora.seed": 3407,
    "model.optimizer.learning_rate": 2e-4,
    "model.optimizer.weight_decay": 0.01,
    "model.optimizer.warmup_steps": 5,
    "model.decoding.max_new_tokens": 32,
    "data.source": "hpe-ai/medical-cases-classification-tutorial",
    "data.columns.text": "transcription",
    "data.columns.label": "medical_specialty",
    "data.instruction": "Classify the following medical transcription into the correct medical specialty.",
    "data.batching.global_batch_size": 32,
    "data.batching.micro_batch_size": 8,
    "data.batching.seed": 3407,
}
MENDS = {
    "data.mask_prompt": True,
    "data.split.kind": "auto",
    "data.batching.eval_batch_size": 64,
    "model.language_model.gradient_checkpointing": "auto",
    "val_every_steps": 20,
    "checkpoint.monitor": "val/f1_macro",
    "early_stopping.monitor": "val/f1_macro",
}
BASES = {
    "llama31_8b_base": "unsloth/Meta-Llama-3.1-8B-bnb-4bit",
    "llama31_70b": "unsloth/Meta-Llama-3.1-70B-bnb-4bit",
    "llama31_405b": "unsloth/Meta-Llama-3.1-405B-bnb-4bit",
    "mistral_nemo_base": "unsloth/Mistral-Nemo-Base-2407-bnb-4bit",
    "mistral_nemo_instruct": "unsloth/Mistral-Nemo-Instruct-2407-bnb-4bit",
    "mistral_7b": "unsloth/mistral-7b-v0.3-bnb-4bit",
    "mistral_7b_instruct": "unsloth/mistral-7b-instruct-v0.3-bnb-4bit",
    "phi35_mini": "unsloth/Phi-3.5-mini-instruct-bnb-4bit",
    "phi3_medium": "unsloth/Phi-3-medium-4k-instruct-bnb-4bit",
    "gemma2_9b": "unsloth/gemma-2-9b-bnb-4bit",
    "gemma2_27b": "unsloth/gemma-2-27b-bnb-4bit",
    "llama32_1b": "unsloth/Llama-3.2-1B-Instruct-bnb-4bit",
    "llama32_3b": "unsloth/Llama-3.2-3B-Instruct-bnb-4bit",
    "qwen25_7b": "unsloth/Qwen2.5-7B-Instruct-bnb-4bit",
    "qwen3_600m": "unsloth/Qwen3-0.6B-bnb-4bit",
    "qwen3_4b": "unsloth/Qwen3-4B-bnb-4bit",
    "qwen3_8b": "unsloth/Qwen3-8B-bnb-4bit",
    "qwen3_14b": "unsloth/Qwen3-14B-bnb-4bit",
    "gemma3_1b": "unsloth/gemma-3-1b-it-bnb-4bit",
    "gemma3_4b": "unsloth/gemma-3-4b-it-bnb-4bit",
    "gemma3_27b": "unsloth/gemma-3-27b-it-bnb-4bit",
    "medgemma_4b": "unsloth/medgemma-4b-it-bnb-4bit",
    "medgemma_27b": "unsloth/medgemma-27b-text-it-bnb-4bit",
    "phi4": "unsloth/phi-4-bnb-4bit",
    "mistral_small": "unsloth/Mistral-Small-24B-Instruct-2501-bnb-4bit",
    "smollm3_3b": "unsloth/SmolLM3-3B",
}
IN_16_BITS = {"smollm3_3b"}  # Unsloth publishes no copy in 4 bits


@pytest.fixture(scope="module")
def recipe() -> Namespace:
    return parse((RECIPE,))


@pytest.mark.parametrize(("key", "value"), [*RECIPE_VALUES.items(), *MENDS.items()])
def test_the_recipe_and_its_mends(recipe: Namespace, key: str, value: object) -> None:
    assert recipe[key] == value
    assert type(recipe[key]) is type(value)


def test_the_recipe_file_writes_its_values_out() -> None:
    written = flat(yaml.safe_load(RECIPE.read_text()))
    assert {key: written.get(key, "missing") for key in RECIPE_VALUES} == RECIPE_VALUES


def test_every_choice_of_the_recipe_has_its_reason() -> None:
    lines = RECIPE.read_text().splitlines()
    reasons = [line for line in lines[13:] if line.lstrip().startswith("#")]
    assert len(reasons) > 30


@pytest.mark.parametrize("path", [CONFIGS / "quickstart.yaml", RECIPE, *LAYERS], ids=lambda path: path.stem)
def test_every_config_is_understood(path: Path) -> None:
    settings = parse(layered(path))
    for key, value in flat(yaml.safe_load(path.read_text())).items():
        if not isinstance(value, dict | list) or key.startswith(("model.", "data.")):
            found = settings[key]
            assert (list(found) if isinstance(found, tuple) else found) == value, key


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
@pytest.mark.parametrize("name", ["quickstart", "llama31_8b"])
def test_every_verb_takes_the_same_config(name: str, verb: str) -> None:
    path = CONFIGS / f"{name}.yaml"
    assert parse((path,), verb).data.as_dict() == parse((path,)).data.as_dict()


@pytest.mark.parametrize("path", [CONFIGS / "quickstart.yaml", RECIPE, *LAYERS], ids=lambda path: path.stem)
def test_every_config_names_its_command(path: Path) -> None:
    found = COMMAND.search(path.read_text())
    assert found is not None
    named = tuple(ROOT / name for name in re.findall(r"--config (\S+)", found[2]))
    assert named == layered(path)


@pytest.mark.parametrize(
    "path", [path for path in LAYERS if path.parent.name != "hardware"], ids=lambda path: path.stem
)
def test_a_layer_states_differences_only(recipe: Namespace, path: Path) -> None:
    same = [key for key, value in flat(yaml.safe_load(path.read_text())).items() if recipe[key] == value]
    assert same == []


def test_there_is_a_config_for_every_base() -> None:
    found = {path.stem: yaml.safe_load(path.read_text()) for path in CONFIGS.glob("models/*.yaml") if path != SMALL}
    assert {name: values["model"]["language_model"]["base_model"] for name, values in found.items()} == BASES


@pytest.mark.parametrize("path", [CONFIGS / "quickstart.yaml", RECIPE, *LAYERS], ids=lambda path: path.stem)
def test_a_base_in_four_bits_is_named_as_it_is_stored(path: Path) -> None:
    """The mapper would take another name for it otherwise, and a reader of the YAML would expect that one."""
    language_model = parse(layered(path)).model.language_model
    if path in (SMALL, CONFIGS / "quickstart.yaml"):
        assert language_model.base_model == "builtin:smollm2-135m"  # no repository
        return
    assert language_model.load_in_4bit
    tables = unsloths_names()
    if path.stem in IN_16_BITS:
        assert language_model.base_model not in tables.FLOAT_TO_INT_MAPPER
        return
    assert language_model.base_model.endswith("-bnb-4bit")
    assert language_model.base_model in tables.INT_TO_FLOAT_MAPPER.keys() | tables.FLOAT_TO_INT_MAPPER.keys()


@pytest.mark.parametrize("name", BASES)
def test_another_base_changes_nothing_that_makes_results_comparable(recipe: Namespace, name: str) -> None:
    settings = parse((RECIPE, CONFIGS / "models" / f"{name}.yaml"))
    changed = {key for key, value in flat(settings.as_dict()).items() if flat(recipe.as_dict())[key] != value}
    sizes = {f"data.batching.{size}" for size in ("micro_batch_size", "eval_batch_size", "token_budget")}
    sizes.add("model.language_model.batch_tokens")
    assert changed - sizes == {"config", "model.language_model.base_model"}


def test_the_small_model_takes_the_recipes_notes_a_step_and_runs_without_a_gpu() -> None:
    settings = parse((RECIPE, SMALL))
    assert settings.trainer.accelerator == "auto"
    assert settings.model.language_model.base_model == "builtin:smollm2-135m"
    assert micro_batches_per_step(make_datamodule(settings).batching, 1) == 1, (
        "a GPU waits for the host that starts its kernels"
    )


def test_the_base_model_and_its_limit_reach_the_data() -> None:
    settings = parse(
        (RECIPE, CONFIGS / "models" / "mistral_7b.yaml"), "fit", "--model.language_model.max_length", "512"
    )
    assert make_datamodule(settings).tokenizer == Tokenizer("unsloth/mistral-7b-v0.3-bnb-4bit", None, 512)


def test_the_estimate_knows_the_tokens_of_a_micro_batch() -> None:
    offload = CONFIGS / "hardware" / "offload_24gb.yaml"
    assert parse((RECIPE, offload)).model.language_model.batch_tokens == 4096, "the token budget"
    assert parse((RECIPE,)).model.language_model.batch_tokens == 8192, "8 notes of half the greatest length"


def test_recipe_like_is_the_recipe_where_medlit_is_not() -> None:
    settings = parse((RECIPE, CONFIGS / "debug" / "recipe_like.yaml"))
    batching = settings.data.batching
    assert settings.data.mask_prompt is False
    assert (batching.eval_batch_size, batching.packing) == (1, False)
    assert batching.global_batch_size == 4 * batching.micro_batch_size == 32
    assert settings.model.language_model.gradient_checkpointing == "unsloth"
    assert settings.model.decoding.stop_early is False
    assert settings.val_every_steps == settings.trainer.max_steps


def test_zero_shot_is_the_bare_base_model() -> None:
    assert parse((RECIPE, CONFIGS / "debug" / "zero_shot.yaml"), "test").model.lora is None


def test_a_t4_computes_in_float16() -> None:
    settings = parse((RECIPE, CONFIGS / "hardware" / "t4_16gb.yaml"))
    assert (settings.trainer.precision, settings.model.language_model.dtype) == ("16-mixed", "float16")
    assert settings.data.batching.global_batch_size == 32


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("hardware/*.yaml")), ids=lambda path: path.stem)
def test_memory_decides_what_is_computed_again_on_every_card(path: Path) -> None:
    assert parse((RECIPE, path)).model.language_model.gradient_checkpointing == "auto"


@pytest.mark.parametrize("model", [path for path in LAYERS if "models" in path.parts and "batch" in path.read_text()])
@pytest.mark.parametrize("hardware", ["ddp", "gpu_80gb", "slurm"])
def test_a_large_machine_leaves_the_batches_of_a_model_alone(hardware: str, model: Path) -> None:
    """A 70B model with the batches of an 8B would run out of memory."""
    machine = CONFIGS / "hardware" / f"{hardware}.yaml"
    assert parse((RECIPE, model, machine)).data.batching == parse((RECIPE, model)).data.batching


@pytest.mark.parametrize("model", ["llama31_70b", "llama31_405b"])
@pytest.mark.parametrize("machine", ["gpu_80gb", "offload_24gb"])
def test_the_order_of_model_and_large_gpu_does_not_matter(machine: str, model: str) -> None:
    hardware, base = CONFIGS / "hardware" / f"{machine}.yaml", CONFIGS / "models" / f"{model}.yaml"
    one, other = (flat(parse(layers).as_dict()) for layers in ((RECIPE, hardware, base), (RECIPE, base, hardware)))
    assert one | {"config": None} == other | {"config": None}
    assert one["data.batching.micro_batch_size"] == 4


@pytest.mark.parametrize(("name", "processes"), [("ddp", None), ("slurm", 16)])
def test_ddp_configs_suit_reentrant_checkpointing(name: str, processes: int | None) -> None:
    settings = parse((RECIPE, CONFIGS / "hardware" / f"{name}.yaml"))
    strategy = settings.trainer.strategy
    assert strategy.class_path == "lightning.pytorch.strategies.DDPStrategy"
    assert strategy.init_args.find_unused_parameters is False
    assert strategy.init_args.broadcast_buffers is False
    if processes is not None:
        assert settings.trainer.num_nodes * settings.trainer.devices == processes
        assert settings.data.batching.global_batch_size % processes == 0


def test_no_config_holds_a_token() -> None:
    for path in CONFIGS.rglob("*.yaml"):
        text = path.read_text()
        assert not re.search(r"hf_[A-Za-z0-9]{10}|token\s*:", text), path
