"""Eight layers of each family's real width in 4 bits: medlit's numbers beside plain transformers, and a short fit.

LLAMA_TOKENIZER=folder pytest -m gpu -s tests/gpu/test_eight_layers.py -k qwen3
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from compare import far, scalars
from interrupt import fit_until_sigterm, free_memory
from shapes import FAMILIES, family_config, write_model

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]

CONFIG = Path(__file__).parents[2] / "configs" / "llama31_8b.yaml"
STEPS, STOP = 4, 2
# Llama 3.1's tokens, and a window shorter than most notes, so that it shows; Nemo stands for a Mistral without one.
TOKENS = {"vocab_size": 128256, "bos_token_id": 128000, "eos_token_id": 128009, "pad_token_id": 128255}
CHANGES = {name: {**TOKENS, "sliding_window": None if name == "mistral_nemo" else 512} for name in FAMILIES}
# Two labels that share a token, after a short prompt, one around the window and one of nearly the greatest length; the
# prompts begin alike, as Alpaca's do.
HEAD, LENGTHS, LABELS = 52, (57, 510, 1900), [[1011, 1012, 1013, 128009], [1011, 1014, 128009], [1020, 128009]]
# Stock transformers and PEFT, in a process that Unsloth has not patched: log-likelihoods, and the gradient of the loss.
CONTROL = """
import json, sys
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
base, adapter, data, out = sys.argv[1:]
nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                         bnb_4bit_compute_dtype=torch.bfloat16)
model = AutoModelForCausalLM.from_pretrained(
    base, quantization_config=nf4, dtype=torch.bfloat16, device_map={"": "cuda"}, attn_implementation="eager")
model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
prompts, labels = json.load(open(data))
def nats(prompt, label):
    ids = torch.tensor([prompt + label], device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        rows = model(input_ids=ids, use_cache=False).logits[0, -len(label) - 1 : -1].float().log_softmax(-1)
    return rows.gather(1, ids[0, -len(label):, None]).sum()
with torch.no_grad():
    found = torch.stack([torch.stack([nats(prompt, label) for label in labels]) for prompt in prompts])
for prompt in prompts:
    (-nats(prompt, labels[0])).backward()
gradient = {n: p.grad.float().cpu() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}
save_file({**gradient, "nats": found.float().cpu()}, out)
"""


def write_base(family: str, folder: Path, **changes: Any) -> Path:  # noqa: ANN401
    from medlit.unsloth_first import import_unsloth

    import_unsloth()
    return write_model(folder, family_config(family, **CHANGES[family] | changes))


@pytest.fixture(scope="module", params=[name for name in FAMILIES if name not in ("llama31_8b", "phi35_mini")])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(request.param, tmp_path_factory.mktemp(request.param))


def test_numbers_and_gradients_are_those_of_transformers_and_peft(base: Path, tmp_path: Path) -> None:
    import torch
    from lightning.fabric.utilities import move_data_to_device
    from safetensors.torch import load_file
    from tiny_families import left_padded

    from medlit.data.collate import Collator, unnamed_rows
    from medlit.data.prompt import Prompt
    from medlit.model.decoding.kv_cache import read_prompts
    from medlit.model.decoding.likelihood import LabelScorer
    from medlit.model.decoding.trie import TokenTrie
    from medlit.model.language_model import at_default_precision, inference_mode, loss_sum, train_mode
    from medlit.model.loading import load_model
    from medlit.model.packing import can_pack
    from medlit.model.settings import LanguageModel, Lora

    draw = torch.Generator().manual_seed(1)
    head = torch.randint(1100, 100_000, (HEAD,), generator=draw).tolist()
    prompts = [head + torch.randint(1100, 100_000, (length - HEAD,), generator=draw).tolist() for length in LENGTHS]
    device = torch.device("cuda", 0)
    language_model = LanguageModel(str(base), max_length=2048)
    model = load_model(language_model, Lora(), device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    (tmp_path / "data.json").write_text(json.dumps([prompts, LABELS]))
    command = [sys.executable, "-c", CONTROL, base, tmp_path / "adapter", tmp_path / "data.json", tmp_path / "control"]
    control = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True)
    with torch.no_grad(), at_default_precision(model):
        inference_mode(model)
        scorer = LabelScorer(model, TokenTrie.of(LABELS))
        ours = scorer.paths(scorer.edges(read_prompts(model, left_padded(prompts).on(device)))).float().cpu()
    train_mode(model, language_model)
    collator = Collator(lambda _: LABELS[0], pad_id=0)
    rows = unnamed_rows([Prompt(prompt, 0) for prompt in prompts])
    gradients = []
    for batch in (collator.train(rows, 1), collator.packed(rows, 1)):
        with at_default_precision(model):
            loss_sum(model, move_data_to_device(batch, device)).backward()
        gradients.append({n: p.grad.float().cpu() for n, p in model.named_parameters() if p.grad is not None})
        model.zero_grad(set_to_none=True)
    packs = can_pack(model)
    _, errors = control.communicate()
    assert control.returncode == 0, errors[-2000:]
    theirs = load_file(tmp_path / "control")
    plain = theirs.pop("nats")
    apart, rounding = (ours - plain).abs(), 0.25 + 0.02 * plain.abs()
    distances = [far(gradient, theirs) for gradient in gradients]
    apart_by = ", packed ".join(f"{distance:.1%}" for distance in distances)
    print(f"\n{base.name}: log-likelihoods apart {float(apart.max()):.3f} nats, gradients {apart_by}, packs: {packs}")
    del model
    free_memory()
    assert (apart <= rounding).all()
    assert packs
    assert max(distances) < 0.1


def test_a_fit_validates_with_each_decoder_and_resumes(
    base: Path, long_notes: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fit_validate_resume(base, long_notes, tmp_path, capfd)


def fit_validate_resume(
    base: Path, long_notes: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], *settings: str
) -> None:
    from medlit.cli.cli import main

    job = ["--config", CONFIG, "--model.language_model.base_model", base, "--data.source", long_notes]
    job += ["--trainer.max_steps", STEPS, "--val_every_steps", STEPS, *settings]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    flags = [str(flag) for flag in job]
    main(["fit", *flags, "--run_dir", str(whole)])
    free_memory()
    fit_until_sigterm(flags, stopped, STOP)
    resumed = tmp_path / "resumed"
    shutil.copytree(stopped, resumed)
    main(["fit", *flags, "--run_dir", str(resumed), "--ckpt_path", "last"])
    free_memory()
    assert "compile failed" not in "".join(capfd.readouterr()), "Unsloth then runs the layers without compiling them"
    before, after = scalars(whole, "train/loss"), scalars(resumed, "train/loss")
    print(f"\n{base.name}: losses {[round(x, 4) for x in before]}, resumed {[round(x, 4) for x in after]}")
    print(f"tokens/s {scalars(whole, 'train/tokens_per_second')}, peak GiB {max(scalars(whole, 'train/peak_gib')):.1f}")
    assert len(before) == len(after) == STEPS
    assert after[STOP:] == pytest.approx(before[STOP:], rel=0.02)
    fitted = json.loads((whole / "fit_metrics.json").read_text())
    for mode in ("constrained", "likelihood", "generate"):
        main(["validate", *flags, "--run_dir", str(whole), "--ckpt_path", "last", "--model.decoding.mode", mode])
        free_memory()
        scores = json.loads((whole / "validate_metrics.json").read_text())
        print(f"{base.name} {mode}: loss {scores['loss']:.4f} accuracy {scores['accuracy']:.3f}")
        assert scores["loss"] == pytest.approx(fitted["loss"], rel=0.002)


# --- frozen weights in FP8 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("outputs", "inputs"), [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)])
def test_a_product_in_fp8_is_that_of_the_rounded_numbers(outputs: int, inputs: int) -> None:
    from medlit.unsloth_first import import_unsloth

    import_unsloth()
    import torch
    from torch import nn

    from medlit.model.language_model import Fp8Linear

    draw = torch.Generator("cuda").manual_seed(0)
    layer = nn.Linear(inputs, outputs, bias=False, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    layer.weight.normal_(std=0.02, generator=draw)
    Fp8Linear.convert(layer)
    weight = layer.eval().weight.float()
    layer.train()
    for tokens in (40, 700, 7168):  # up to 64 Unsloth does not round the inputs
        hidden = torch.randn(1, tokens, inputs, device="cuda", dtype=torch.bfloat16, generator=draw).requires_grad_()
        out = layer(hidden)
        rounded = hidden.detach().float()
        if tokens > 64:
            scale = rounded.abs().amax(dim=-1, keepdim=True) / 448
            rounded = (rounded / scale).to(torch.float8_e4m3fn).float() * scale
        toward = torch.randn_like(out)
        out.backward(toward)
        expected = rounded @ weight.t(), toward.float() @ weight
        found = [
            far({"": ours.detach().float()}, {"": theirs})
            for ours, theirs in zip((out, hidden.grad), expected, strict=True)
        ]
        print(f"\n{outputs} x {inputs}, {tokens} tokens: output {found[0]:.2%}, gradient {found[1]:.2%} apart")
        assert max(found) < 0.01


@pytest.mark.parametrize("family", ["llama31_8b", "phi35_mini_fused", "qwen25_7b"])
def test_fp8_weights_train_closer_to_16_bits_than_nf4(family: str, tmp_path: Path) -> None:
    """Layers of Unsloth's own, of transformers', and with biases."""
    base = write_base(family, tmp_path / family)
    import torch
    from lightning.fabric.utilities import move_data_to_device
    from torch import nn

    from medlit.data.collate import Collator, unnamed_rows
    from medlit.data.prompt import Prompt
    from medlit.model.language_model import Fp8Linear, at_default_precision, inference_mode, loss_sum, train_mode
    from medlit.model.loading import load_model
    from medlit.model.settings import LanguageModel, Lora

    device, draw = torch.device("cuda", 0), torch.Generator().manual_seed(1)
    head = torch.randint(1100, 30_000, (HEAD,), generator=draw).tolist()
    prompts = [head + torch.randint(1100, 30_000, (length - HEAD,), generator=draw).tolist() for length in LENGTHS]
    collator = Collator(lambda _: LABELS[0], pad_id=0)
    batch = move_data_to_device(collator.packed(unnamed_rows([Prompt(prompt, 0) for prompt in prompts]), 1), device)

    def measure(model: nn.Module, settings: LanguageModel) -> tuple[float, float, dict[str, torch.Tensor]]:
        """The loss of an evaluation and of a training step, and the latter's gradient."""
        with torch.no_grad(), at_default_precision(model):
            inference_mode(model)
            answered = loss_sum(model, batch).item()
        train_mode(model, settings)
        with at_default_precision(model):
            trained = loss_sum(model, batch)
        trained.backward()
        gradient = {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return answered, trained.item(), gradient

    found = {}
    for name, bits in (("bf16", (False, False)), ("nf4", (True, False)), ("fp8", (False, True))):
        settings = LanguageModel(str(base), load_in_4bit=bits[0], load_in_fp8=bits[1])
        model = load_model(settings, Lora(), device)
        weights = torch.Generator().manual_seed(2)
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                parameter.data.copy_(0.01 * torch.randn(parameter.shape, generator=weights))
        found[name] = measure(model, settings)
        if name == "fp8":  # the rounded weights, with inputs as they are
            rounded = {n: part for n, part in model.named_modules() if isinstance(part, Fp8Linear)}
            assert len(rounded) == 8 * (4 if family == "phi35_mini_fused" else 7)
            for part_name, part in rounded.items():
                plain = nn.Linear(1, 1, device="meta")
                plain.weight, plain.bias = nn.Parameter(part.eval().weight, requires_grad=False), part.bias
                model.set_submodule(part_name, plain)
            found["expanded"] = measure(model, settings)
            del rounded, part
        del model
        free_memory()
    pairs = [("nf4", "bf16"), ("expanded", "bf16"), ("fp8", "bf16"), ("fp8", "expanded")]
    distance = {(a, b): far(found[a][2], found[b][2]) for a, b in pairs}
    print(f"\n{family}: losses { ({name: (round(e, 3), round(t, 3)) for name, (e, t, _) in found.items()}) }")
    print({f"{a} from {b}": f"{value:.1%}" for (a, b), value in distance.items()})
    assert found["fp8"][0] == pytest.approx(found["expanded"][0], rel=2e-3), "an evaluation rounds no inputs"
    assert found["fp8"][1] == pytest.approx(found["bf16"][1], rel=0.02)
    assert distance["fp8", "expanded"] < 0.3
    assert distance["fp8", "bf16"] < min(0.4, 0.7 * distance["nf4", "bf16"])


def test_a_fit_on_fp8_weights_validates_with_each_decoder_and_resumes(
    long_notes: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base, bits = write_base("llama31_8b", tmp_path / "llama31_8b"), "--model.language_model.load_in_"
    fit_validate_resume(base, long_notes, tmp_path, capfd, f"{bits}4bit", "false", f"{bits}fp8", "true")
    metadata = json.loads((tmp_path / "whole" / "adapter" / "medlit.json").read_text())
    assert metadata["inference"]["load_in_fp8"] is True


def test_a_fit_in_float32_validates_with_each_decoder_and_resumes(
    long_notes: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base, precision = write_base("llama31_8b", tmp_path / "base"), ("--trainer.precision", "32-true")
    fit_validate_resume(base, long_notes, tmp_path, capfd, "--model.language_model.dtype", "float32", *precision)


def test_a_fit_with_layers_in_host_memory_validates_with_each_decoder_and_resumes(
    long_notes: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from medlit.cli.cli import main

    base, run, table = write_base("llama31_8b", tmp_path / "base"), tmp_path / "whole", tmp_path / "answers.parquet"
    offload = "--model.language_model.offload", "4"
    fit_validate_resume(base, long_notes, tmp_path, capfd, *offload)
    notes = ["--data.predict.source", str(long_notes), "--output", str(table)]
    main(["predict", "--config", str(run / "config_fit.yaml"), "--run_dir", str(run), "--ckpt_path", "last", *notes])
    assert pq.read_metadata(table).num_rows == 400


def test_the_check_sees_a_pattern_that_unsloth_ignores(long_notes: Path, tmp_path: Path) -> None:
    """Unsloth lets every other layer of a Gemma 2 slide, whatever its config says."""
    pattern = ["full_attention"] * 4 + ["sliding_attention"] * 4
    base = write_base("gemma2_9b", tmp_path / "base", layer_types=pattern)
    job = [sys.executable, "-m", "medlit", "fit", "--config", CONFIG, "--model.language_model.base_model", base]
    job += ["--data.source", long_notes, "--run_dir", tmp_path / "run", "--trainer.max_steps", 1]
    environment = os.environ | {"TORCHDYNAMO_DISABLE": "1", "MEDLIT_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(list(map(str, job)), env=environment, capture_output=True, text=True, check=False)
    print(done.stderr[-2000:])
    assert done.returncode == 2
    assert "medlit does not reproduce the numbers of" in done.stderr
    assert "nats; choose another base model." in done.stderr
