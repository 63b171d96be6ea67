"""The module under Lightning: exact steps and schedule, checkpoints that hold little and refuse a lot, resuming."""

from __future__ import annotations

import functools
import inspect
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import lightning as L
import numpy as np
import pytest
import torch
from fakes import BONE, BRAIN, HEART, notes, tiny_datamodule, write_csv
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from medlit.callbacks.adapter_folder import AdapterTemperature, BestCheckpoint, DataLink, write_adapter
from medlit.callbacks.last_checkpoint import ValidateLastStep
from medlit.callbacks.nonfinite import NonfiniteGuard
from medlit.callbacks.throughput import Throughput
from medlit.data.collate import Prompts
from medlit.data.datamodule import TranscriptionDataModule
from medlit.data.labels import LabelSet
from medlit.data.samplers import micro_batches_per_step
from medlit.errors import UserError
from medlit.evaluation.calibration import at_temperature, fit_temperature, log_loss, power_product
from medlit.evaluation.metrics import LOGGED
from medlit.evaluation.sets import calibrate, prediction_sets, score_sets
from medlit.model import language_model
from medlit.model import module as module_file
from medlit.model.adapter_metadata import METADATA_FILE, AdapterMetadata, decoding_key, write_fitted
from medlit.model.decoding import Answers, Decoder
from medlit.model.families import causal_lm
from medlit.model.module import SpecialtyClassifier
from medlit.model.prior import PRIOR_FILE, TokenPrior
from medlit.model.settings import Decoding, LanguageModel, Lora, Optimizer
from medlit.predictor import SpecialtyPredictor

Weights = dict[str, Tensor]

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        # Resuming is what is tested here.
        "You're resuming from a checkpoint that ended before the epoch ended",
        "Be aware that when using `ckpt_path`, callbacks used to create the checkpoint need to be provided",
        # https://github.com/Lightning-AI/pytorch-lightning/issues/21326
        r".*isinstance\(treespec, LeafSpec\)",
    )
]


class Watch(L.Callback):
    """Writes down what happens at every optimizer step."""

    def __init__(self) -> None:
        self.gradients: list[Weights] = []
        self.rates: list[float] = []
        self.losses: list[float] = []
        self.ready: list[bool] = []
        self.validated: list[int] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:  # noqa: ANN401
        model = pl_module.model
        layers = causal_lm(model).model.layers
        self.ready.append(model.training and all(layer.gradient_checkpointing for layer in layers))

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:  # noqa: ANN401
        self.gradients.append({n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None})
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:  # noqa: ANN401
        if len(self.losses) < len(self.gradients):
            self.losses.append(float(trainer.callback_metrics["train/loss"]))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.validated.append(trainer.global_step)


@pytest.fixture(scope="module")
def parts(llama: Path, notes_folder: Path) -> Callable[..., tuple[SpecialtyClassifier, TranscriptionDataModule]]:
    """A module and its data; settings of either override."""

    def parts(**given: Any) -> tuple[SpecialtyClassifier, TranscriptionDataModule]:  # noqa: ANN401
        names = ("lora", "adapter", "optimizer", "decoding")
        ours = {name: given.pop(name) for name in names if name in given}
        data = tiny_datamodule(notes_folder, llama, **given)
        model: dict[str, Any] = {"optimizer": Optimizer(2e-2), "decoding": Decoding(max_new_tokens=12), **ours}
        module = SpecialtyClassifier(
            LanguageModel(str(llama), max_length=256, gradient_checkpointing="unsloth"),
            instruction=data.instruction,
            mask_prompt=data.mask_prompt,
            max_response_tokens=data.max_response_tokens,
            **model,
        )
        return module, data

    return parts


Parts = Callable[..., tuple[SpecialtyClassifier, TranscriptionDataModule]]


def trainer(
    data: TranscriptionDataModule,
    *callbacks: L.Callback,
    val_every: int = 10**6,
    **settings: Any,  # noqa: ANN401 - Lightning's own
) -> L.Trainer:
    """A trainer as the command line sets it up: accumulation and validation follow from the optimizer step."""
    accumulate = micro_batches_per_step(data.batching, 1)
    quiet = {name: False for name in ("logger", "enable_progress_bar", "enable_model_summary")}
    return L.Trainer(
        accelerator="cpu",
        accumulate_grad_batches=accumulate,
        val_check_interval=val_every * accumulate,
        check_val_every_n_epoch=None,
        gradient_clip_val=1.0,
        use_distributed_sampler=False,
        inference_mode=False,
        callbacks=[DataLink(), *callbacks],
        **{"num_sanity_val_steps": 0, "enable_checkpointing": False, **quiet, **settings},
    )


def adapter(module: SpecialtyClassifier) -> Weights:
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def far(ours: Weights, theirs: Weights) -> float:
    """Largest relative difference of any weight's gradient, by its norm."""
    assert ours.keys() == theirs.keys()
    assert ours
    norms = {name: (theirs[name].norm().item(), (ours[name] - theirs[name]).norm().item()) for name in ours}
    largest = max(norm for norm, _ in norms.values())
    # Behind a B of zeros A has no gradient yet: what is all rounding is compared with the largest.
    return max(gap / max(norm, 1e-3 * largest) for norm, gap in norms.values())


def test_the_module_reads_nothing_of_the_datamodule() -> None:
    assert "datamodule" not in inspect.getsource(module_file).lower()


# --- one optimizer step -----------------------------------------------------------------------------------------------


@pytest.fixture
def forty(tmp_path: Path) -> str:
    """All forty notes as a training split, with labels of unlike length."""
    rows = [row for split in notes().values() for row in split]
    for split, part in (("train", rows), ("validation", rows[:4])):
        write_csv(tmp_path / f"{split}.csv", part)
    return str(tmp_path)


@pytest.mark.parametrize("mask_prompt", [True, False])
def test_a_step_of_8_by_4_is_a_step_of_32_by_1(parts: Parts, forty: str, mask_prompt: bool) -> None:
    watches = []
    for micro_batch_size, packing in ((32, False), (8, False), (3, False), (8, True)):
        batching = {"global_batch_size": 32, "micro_batch_size": micro_batch_size, "packing": packing}
        module, data = parts(source=forty, split={"kind": "official"}, batching=batching, mask_prompt=mask_prompt)
        watches.append(Watch())
        trainer(data, watches[-1], max_steps=2).fit(module, data)
        assert len(watches[-1].gradients) == 2
    for watch in watches[1:]:
        assert far(watch.gradients[0], watches[0].gradients[0]) < 1e-4
        assert watch.losses == pytest.approx(watches[0].losses, rel=1e-4)


def test_two_ranks_make_the_step_of_one(parts: Parts, forty: str) -> None:
    """The arithmetic alone: DDP's mean over ranks and Lightning's over micro-batches undo the step's factor."""
    module, _ = parts()
    module.trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cpu")))  # type: ignore[assignment]
    module.configure_model()
    module.on_fit_start()
    found = []
    for world_size in (1, 2, 4):
        module.zero_grad()
        for rank in range(world_size):
            batching = {"global_batch_size": 32, "micro_batch_size": 8}
            _, data = parts(source=forty, split={"kind": "official"}, batching=batching)
            strategy = SimpleNamespace(root_device=torch.device("cpu"))
            micro_batches = micro_batches_per_step(data.batching, world_size)
            data.trainer = module.trainer = SimpleNamespace(  # type: ignore[assignment]
                global_rank=rank, world_size=world_size, strategy=strategy, accumulate_grad_batches=micro_batches
            )
            data.setup("fit")
            for i, batch in enumerate(data.train_dataloader()):
                (module.training_step(batch, i) / micro_batches / world_size).backward()
        found.append({n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None})
    assert far(found[1], found[0]) < 1e-4
    assert far(found[2], found[0]) < 1e-4


# --- the fit ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [{"max_steps": 10}, {"max_epochs": 3}], ids=["steps", "epochs"])
def test_the_rate_rises_then_falls_to_zero_by_optimizer_steps(parts: Parts, length: dict[str, int]) -> None:
    module, data = parts(optimizer=Optimizer(learning_rate=1e-3, warmup_steps=4))
    watch = Watch()
    fit = trainer(data, watch, **length)
    fit.fit(module, data)
    total = length.get("max_steps", 9)  # 24 notes make 3 steps an epoch
    wanted = [1e-3 * min(step / 4, (total - step) / (total - 4)) for step in range(total)]
    assert watch.rates == pytest.approx(wanted)
    assert fit.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)
    assert len(watch.ready) == 2 * total


def test_between_micro_batches_nothing_waits_for_the_device(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    module, data = parts()
    places, fetches, training_step = ["before"], list[str](), module.training_step

    def step(*args: Any) -> Tensor:  # noqa: ANN401
        places.append("forward pass")  # where a CPU looks at the batch
        loss = training_step(*args)
        places.append(f"after {places.count('forward pass')}")
        return loss

    class Fetches(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
            if func is torch.ops.aten._local_scalar_dense.default:  # what `item` and `float` call
                fetches.append(places[-1])
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(module, "training_step", step)
    fit = trainer(data, NonfiniteGuard("stop"), Throughput(), max_steps=3)
    with Fetches():
        fit.fit(module, data)
    assert fit.accumulate_grad_batches == 2
    assert {place for place in fetches if place.startswith("after")} == {"after 2", "after 4", "after 6"}
    assert fit.progress_bar_metrics["train/loss"] == pytest.approx(float(fit.callback_metrics["train/loss"]))


def test_a_resumed_fit_counts_whole_steps(parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    rates = Throughput.mean_rates
    monkeypatch.setattr(
        Throughput, "mean_rates", lambda self, fit, device: steps.append(fit.global_step) or rates(self, fit, device)
    )
    for most in (2, 4):
        module, data = parts()
        fit = trainer(data, Throughput(), max_steps=most)
        assert fit.accumulate_grad_batches == 2
        fit.fit(module, data, ckpt_path=str(tmp_path / "saved.ckpt") if most > 2 else None)
        fit.save_checkpoint(tmp_path / "saved.ckpt")
    assert steps == [1, 2, 3, 4]


def test_it_learns_and_stays_ready_to_train_through_every_validation(
    parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    from unsloth import FastLanguageModel

    def for_inference(model: Any) -> None:  # noqa: ANN401 - as on a GPU, where it leaves checkpointing off
        model.eval()
        for layer in causal_lm(model).model.layers:
            layer.gradient_checkpointing = False

    monkeypatch.setattr(FastLanguageModel, "for_inference", for_inference)
    module, data = parts()
    watch = Watch()
    trainer(data, watch, max_steps=12, val_every=2, num_sanity_val_steps=1).fit(module, data)
    assert all(watch.ready), "training mode and gradient checkpointing, in every micro-batch"
    assert sum(watch.losses[-3:]) < 0.5 * sum(watch.losses[:3])
    assert module.scores is not None
    assert module.scores["n"] == 8
    assert all(parameter.dtype == torch.float32 for parameter in adapter(module).values())


def test_the_optimizer_holds_the_adapter_and_eight_bit_states(parts: Parts) -> None:
    from bitsandbytes.optim import AdamW8bit

    module, data = parts(lora=Lora(r=64))
    fit = trainer(data, max_steps=1)
    fit.fit(module, data)
    assert isinstance(fit.optimizers[0], AdamW8bit)
    held = [id(p) for group in fit.optimizers[0].param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in module.parameters() if p.requires_grad)
    states = {
        name: fit.optimizers[0].state[p]["state1"].dtype for name, p in module.named_parameters() if p.requires_grad
    }
    assert states["model.base_model.model.model.layers.0.mlp.up_proj.lora_B.default.weight"] == torch.uint8


# --- what a validation says -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fitted(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float], Weights]:
    """A checkpoint, the numbers of the validation that it was saved at, and its adapter."""
    module, data = parts()
    fit = trainer(data, max_steps=8, val_every=8)
    fit.fit(module, data)
    path = tmp_path_factory.mktemp("fitted") / "saved.ckpt"
    fit.save_checkpoint(path)
    numbers = {name: float(value) for name, value in fit.callback_metrics.items() if name.startswith("val/")}
    return path, numbers, adapter(module)


Fitted = tuple[Path, dict[str, float], Weights]


def validated(run: L.Trainer) -> dict[str, float]:
    """The metrics of a validation alone, under the tags that they have in a fit."""
    return {name.replace("validate/", "val/"): float(value) for name, value in run.callback_metrics.items()}


def test_a_checkpoint_reproduces_its_validation_in_a_fresh_model(parts: Parts, fitted: Fitted) -> None:
    path, numbers, weights = fitted
    module, data = parts(lora=Lora(seed=9))
    run = trainer(data)
    run.validate(module, data, ckpt_path=str(path), weights_only=True, verbose=False)
    assert validated(run) == pytest.approx(numbers, rel=1e-6)
    assert numbers.keys() == {f"val/{name}" for name in LOGGED}
    assert all(torch.equal(value, weights[name]) for name, value in adapter(module).items())


def test_test_and_predict_answer_as_validate_does(parts: Parts, fitted: Fitted) -> None:
    module, data = parts(batching={"eval_batch_size": 1})
    run = trainer(data)
    run.test(module, data, ckpt_path=str(fitted[0]), weights_only=True, verbose=False)
    tested, scores = dict(run.callback_metrics), deepcopy(module.scores)
    other, data = parts(batching={"eval_batch_size": 8})
    answers = trainer(data).predict(other, data, ckpt_path=str(fitted[0]), weights_only=True)
    data.setup("test")
    truth = {row["id"]: row["specialty"] for row in data.rows("test")}
    pairs = [
        (truth[i], label)
        for batch, answer in zip(data.predict_dataloader(), answers, strict=True)  # type: ignore[arg-type]
        for i, label in zip(batch.ids, answer.label_ids.tolist(), strict=True)
    ]
    right = sum(other.label_set.index(name) == label for name, label in pairs)
    assert tested["test/accuracy"] == pytest.approx(right / len(pairs))
    assert scores is not None
    assert scores["n"] == len(pairs) == 8
    assert scores["confusion"] == [
        [sum(pair == (name, label) for pair in pairs) for label in range(len(other.label_set) + 1)]
        for name in other.label_set
    ]


def test_the_loss_is_the_mean_over_tokens_whatever_the_batches(parts: Parts, fitted: Fitted) -> None:
    losses = []
    for size in (1, 3, 8):
        module, data = parts(batching={"eval_batch_size": size})
        run = trainer(data)
        run.validate(module, data, ckpt_path=str(fitted[0]), weights_only=True, verbose=False)
        losses.append(float(run.callback_metrics["validate/loss"]))
    assert losses == pytest.approx([fitted[1]["val/loss"]] * 3, rel=1e-5)


@pytest.mark.parametrize("mode", ["generate", "constrained", "likelihood"])
def test_the_loss_comes_with_the_answers(
    parts: Parts, fitted: Fitted, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No second pass over the notes, and the number that one would give."""
    module, data = parts(decoding=Decoding(mode))  # type: ignore[arg-type]
    run = trainer(data)
    with monkeypatch.context() as patch:
        patch.setattr(module_file, "loss_sum", lambda *_: pytest.fail("a second pass"))
        run.validate(module, data, ckpt_path=str(fitted[0]), weights_only=True, verbose=False)
    assert float(run.callback_metrics["validate/loss"]) == pytest.approx(second_pass(module, data), rel=1e-4)


def second_pass(module: SpecialtyClassifier, data: TranscriptionDataModule) -> float:
    """The validation's loss, read from the notes with their answers as the table spells them."""
    with torch.no_grad():
        nats = [(language_model.loss_sum(module.model, b.loss), b.loss.step_tokens) for b in data.val_dataloader()]  # type: ignore[arg-type]
    return float(sum(loss for loss, _ in nats)) / sum(tokens for _, tokens in nats)


@pytest.mark.parametrize("mode", ["generate", "constrained", "likelihood"])
def test_the_loss_is_of_the_table_s_spelling(parts: Parts, fitted: Fitted, tmp_path: Path, mode: str) -> None:
    """Whatever the weights call the same labels: another spelling has other tokens, and another number of them."""
    checkpoint = torch.load(fitted[0], weights_only=True)
    checkpoint["medlit"]["labels"] = [name.upper() for name in checkpoint["medlit"]["labels"]]
    torch.save(checkpoint, tmp_path / "upper.ckpt")
    module, data = parts(decoding=Decoding(mode), max_response_tokens=32)  # type: ignore[arg-type]
    run = trainer(data)
    run.validate(module, data, ckpt_path=str(tmp_path / "upper.ckpt"), weights_only=True, verbose=False)
    assert module.label_set.names != data.label_set.names  # type: ignore[union-attr]
    assert float(run.callback_metrics["validate/loss"]) == pytest.approx(second_pass(module, data), rel=1e-4)


# --- temperature ------------------------------------------------------------------------------------------------------


@pytest.fixture
def too_sure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers with probabilities: very sure of one label, and wrong every third time."""

    def make_decoder(settings: Decoding, model: Any, prompt: Any, label_set: LabelSet, prior: None) -> Decoder:  # noqa: ANN401
        def answer(prompts: Prompts) -> Answers:
            labels = torch.tensor([(row + (row % 3 == 0)) % 3 for row in prompts.rows])
            scores = 6.0 * torch.nn.functional.one_hot(labels, len(label_set)).float()
            return Answers(labels, ["" for _ in prompts.rows], scores.softmax(dim=1), scores)

        return answer

    monkeypatch.setattr(module_file, "make_decoder", make_decoder)


@pytest.fixture
def run(parts: Parts, fitted: Fitted, tmp_path: Path) -> Path:
    """A run folder whose adapter everybody may read and has a temperature for another decoding mode."""
    module, data = parts()
    trainer(data).validate(module, data, ckpt_path=str(fitted[0]), weights_only=True, verbose=False)
    write_adapter(module, tmp_path / "adapter", data.fingerprint)
    file = tmp_path / "adapter" / METADATA_FILE
    write_fitted(file, Decoding("likelihood"), 1.5, {})
    file.chmod(0o644)
    (tmp_path / "checkpoints").mkdir()
    for name in ("best", "last"):
        shutil.copy(fitted[0], tmp_path / "checkpoints" / f"{name}.ckpt")
    return tmp_path


@pytest.mark.usefixtures("too_sure")
def test_a_fit_has_no_temperature(parts: Parts, run: Path) -> None:
    """Not even that of the adapter that it starts from: the weights change."""
    write_fitted(run / "adapter" / METADATA_FILE, Decoding(), 3.0, {})
    module, data = parts(adapter=str(run / "adapter"))
    fit = trainer(data, max_steps=2, val_every=1, num_sanity_val_steps=1)
    fit.fit(module, data)
    assert module.results is not None
    assert module.results.probabilities is not None
    assert module.temperature is None
    fit.save_checkpoint(run / "saved.ckpt")
    assert torch.load(run / "saved.ckpt", weights_only=True)["medlit"]["temperatures"] == {}


@pytest.mark.usefixtures("too_sure")
@pytest.mark.parametrize("starts_from_adapter", [False, True])
def test_a_fit_forgets_what_was_fitted_to_earlier_weights(parts: Parts, run: Path, starts_from_adapter: bool) -> None:
    """As in a notebook that validates, trains on and tests."""
    module, data = parts(adapter=str(run / "adapter")) if starts_from_adapter else parts()
    trainer(data).validate(module, data, verbose=False)
    assert module.temperature is not None
    module.prior = cast("TokenPrior", object())
    trainer(data, max_steps=1).fit(module, data)
    assert (module.temperature, module.thresholds, module.prior) == (None, {}, None)
    trainer(data).test(module, data, verbose=False)
    assert module.results is not None
    assert module.results.probabilities is not None
    assert module.results.probabilities.max() == pytest.approx(np.exp(6) / (np.exp(6) + 2), abs=1e-6)


@pytest.mark.usefixtures("too_sure")
@pytest.mark.parametrize("weights", ["adapter", "best"])
def test_a_validation_s_temperature_is_kept_with_the_adapter_and_tempers_tests_and_predictions(
    parts: Parts, run: Path, weights: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings: dict[str, Any] = {"adapter": str(run / "adapter")} if weights == "adapter" else {}
    loading: dict[str, Any] = {"weights_only": True}
    if weights == "best":
        loading["ckpt_path"] = str(run / "checkpoints" / "best.ckpt")
    file = run / "adapter" / METADATA_FILE
    module, data = parts(**settings)
    trainer(data, AdapterTemperature()).validate(module, data, verbose=False, **loading)
    validated = module.results
    assert validated is not None
    assert validated.probabilities is not None
    assert f" fitted to {len(validated)} notes for '{module.decoding.mode}' and stored in " in capsys.readouterr().err
    assert module.temperature == pytest.approx(fit_temperature(validated.probabilities, validated.truth))
    assert module.temperature > 2
    kept = AdapterMetadata.read(file).temperatures
    assert kept == {"mode=likelihood": 1.5, decoding_key(module.decoding): pytest.approx(module.temperature)}
    assert file.stat().st_mode & 0o777 == 0o644

    other, data = parts(**settings)
    trainer(data).test(other, data, verbose=False, **loading)
    tested = other.results
    assert other.temperature == pytest.approx(module.temperature)
    assert tested is not None
    assert tested.probabilities is not None
    sure = np.exp(6) / (np.exp(6) + 2)
    rest = (1 - sure) / 2
    wanted = at_temperature(np.array([[sure, rest, rest]]), module.temperature)[0]
    assert np.sort(tested.probabilities)[:, ::-1] == pytest.approx(np.tile(wanted, (len(tested), 1)), abs=1e-6)
    raw = np.where(tested.probabilities == tested.probabilities.max(axis=1, keepdims=True), sure, rest)
    assert log_loss(tested.probabilities, tested.truth) < log_loss(raw, tested.truth)
    again, data = parts(**settings)
    answers = trainer(data).predict(again, data, **loading)
    assert answers is not None
    assert answers[0].probabilities.max(dim=1).values.numpy() == pytest.approx(wanted[0], abs=1e-6)


def test_last_weights_have_no_temperature(parts: Parts, run: Path) -> None:
    """The adapter folder holds the best ones, whatever adapter the config names."""
    write_fitted(run / "adapter" / METADATA_FILE, Decoding(), 3.0, {})
    last = str(run / "checkpoints" / "last.ckpt")
    for settings in ({}, {"adapter": str(run / "adapter")}):
        module, data = parts(**settings)
        trainer(data).test(module, data, ckpt_path=last, weights_only=True, verbose=False)
        assert module.temperature is None


@pytest.mark.usefixtures("too_sure")
def test_sets_are_fitted_to_the_validation_notes_alone_and_kept_with_the_adapter(parts: Parts, run: Path) -> None:
    file, sets = run / "adapter" / METADATA_FILE, Decoding("likelihood", coverage=0.6)
    module, data = parts(adapter=str(run / "adapter"), decoding=sets)
    trainer(data, AdapterTemperature()).validate(module, data, verbose=False)
    assert module.results is not None
    temperature, thresholds = calibrate(module.results, 0.6)
    kept = AdapterMetadata.read(file)
    assert kept.temperatures["mode=likelihood"] == pytest.approx(temperature)
    assert kept.thresholds == {"mode=likelihood": pytest.approx(thresholds)}

    other, data = parts(adapter=str(run / "adapter"), decoding=sets)
    testing = trainer(data)
    testing.test(other, data, verbose=False)
    tested = other.results
    assert tested is not None
    assert tested.probabilities is not None
    found = prediction_sets(tested.probabilities, thresholds["0.6"])
    expected = score_sets(found, tested.label_mask, tested.groups)
    assert {name: other.sets[name] for name in expected} == expected
    assert testing.callback_metrics["test/set_mean_size"] == pytest.approx(expected["mean_size"])

    plain, data = parts(adapter=str(run / "adapter"), decoding=Decoding("likelihood"))
    testing = trainer(data)
    testing.test(plain, data, verbose=False)
    assert plain.sets == {}
    assert not [name for name in testing.callback_metrics if "set_" in name]
    assert plain.scores == other.scores


@pytest.mark.usefixtures("too_sure")
@pytest.mark.parametrize(("limit", "is_kept"), [(1.0, True), (1, False)])
def test_a_fit_that_makes_sets_keeps_their_thresholds_with_the_best_adapter(
    parts: Parts, tmp_path: Path, limit: float, is_kept: bool
) -> None:
    module, data = parts(decoding=Decoding("likelihood", answer="set"))
    best = BestCheckpoint(tmp_path / "checkpoints", "best", monitor="val/accuracy", mode="max")
    settings: dict[str, Any] = {"enable_checkpointing": True, "default_root_dir": str(tmp_path)}
    fit = trainer(data, best, max_steps=1, val_every=1, limit_val_batches=limit, **settings)
    fit.fit(module, data)
    assert module.sets["key"] == "set"
    kept = AdapterMetadata.read(tmp_path / "adapter" / METADATA_FILE)
    assert kept.thresholds == ({"mode=likelihood": pytest.approx(module.thresholds)} if is_kept else {})
    assert kept.temperatures == ({"mode=likelihood": pytest.approx(module.temperature)} if is_kept else {})
    saved = torch.load(tmp_path / "checkpoints" / "best.ckpt", weights_only=True)["medlit"]
    assert (saved["temperatures"], saved["thresholds"]) == ({}, {})


@pytest.mark.usefixtures("too_sure")
@pytest.mark.parametrize(
    ("other", "says"),
    [
        ("a trial", ""),
        ("a part", "only a part of the validation split"),
        ("notes", "comes from other validation notes"),
    ],
)
def test_a_partial_validation_leaves_the_adapter_alone(
    parts: Parts, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], other: str, says: str
) -> None:
    source = tmp_path / "notes"
    source.mkdir()
    for split, rows in notes().items():
        write_csv(source / f"{split}.csv", rows[1:] if split == "validation" and other == "notes" else rows)
    settings = {"a trial": {"fast_dev_run": True}, "a part": {"limit_val_batches": 1}}.get(other, {})
    file = run / "adapter" / METADATA_FILE
    before = file.read_bytes()
    module, data = parts(adapter=str(file.parent), source=str(source))
    trainer(data, AdapterTemperature(), **settings).validate(module, data, verbose=False)
    assert file.read_bytes() == before
    told = [line for line in capsys.readouterr().err.splitlines() if "is not kept with the adapter: " in line]
    assert len(told) == (other != "a trial")
    assert all(says in line for line in told)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_a_checkpoint_holds_the_adapter_and_its_metadata_and_no_code(fitted: Fitted) -> None:
    checkpoint = torch.load(fitted[0], weights_only=True)
    assert checkpoint["state_dict"].keys() == fitted[2].keys()
    assert all("lora_" in name for name in checkpoint["state_dict"])
    assert checkpoint["medlit"]["labels"] == [HEART, BRAIN, BONE]
    assert "hyper_parameters" not in checkpoint
    assert "datamodule_hyper_parameters" not in checkpoint


def test_a_checkpoint_with_more_labels_than_the_data_counts_by_its_own_ids(
    parts: Parts, fitted: Fitted, tmp_path: Path
) -> None:
    checkpoint = torch.load(fitted[0], weights_only=True)
    more = ["Allergy", HEART, BRAIN, "Nephrology", BONE, "Urology"]
    checkpoint["medlit"]["labels"] = more
    torch.save(checkpoint, tmp_path / "more.ckpt")
    module, data = parts(decoding=Decoding("likelihood"), max_response_tokens=32)
    run = trainer(data)
    run.validate(module, data, ckpt_path=str(tmp_path / "more.ckpt"), weights_only=True, verbose=False)
    assert module.label_set.names == tuple(more)
    assert module.results is not None
    assert module.scores is not None
    assert module.results.names == tuple(more)
    wanted = {row["id"]: row["medical_specialty"] for row in notes()["validation"]}
    pairs = zip(module.results.ids, module.results.truth, strict=True)
    assert {identity: more[label] for identity, label in pairs} == wanted
    supports = {name: score["support"] for name, score in module.scores["per_class"].items()}
    assert supports == {name: list(wanted.values()).count(name) for name in more}
    assert module.scores["n"] == 8
    assert float(run.callback_metrics["validate/accuracy"]) == pytest.approx(float(module.results.correct.mean()))
    assert float(run.callback_metrics["validate/loss"]) == pytest.approx(second_pass(module, data), rel=1e-4)


def drop_a_weight(checkpoint: dict[str, Any]) -> None:
    checkpoint["state_dict"].popitem()


def rename_a_weight(checkpoint: dict[str, Any]) -> None:
    name, weight = checkpoint["state_dict"].popitem()
    checkpoint["state_dict"][f"{name}.old"] = weight


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (drop_a_weight, r"ckpt_path: the checkpoint's \d+ weights are not this model's"),
        (rename_a_weight, r"ckpt_path: the checkpoint's \d+ weights are not this model's"),
        (lambda c: c["medlit"].update(base_model="owner/other"), "model.language_model.base_model: .* 'owner/other'"),
        (lambda c: c["medlit"]["lora"].update(r=8), "model.lora.r: .* trained with 8"),
        (lambda c: c["medlit"].update(labels=[BRAIN, BONE]), "data.columns.label: .*'Cardiovascular / Pulmonary'"),
        (lambda c: c["medlit"].update(prompt="alpaca-0"), "prompt 'alpaca-0'"),
        (lambda c: c.pop("medlit"), "ckpt_path: the file was not written by this version of medlit"),
    ],
    ids=["a weight less", "a weight renamed", "base model", "rank", "labels", "prompt", "not medlit's"],
)
def test_another_model_s_checkpoint_is_refused(
    parts: Parts, fitted: Fitted, tmp_path: Path, spoil: Callable[[dict[str, Any]], object], says: str
) -> None:
    checkpoint = torch.load(fitted[0], weights_only=True)
    spoil(checkpoint)
    torch.save(checkpoint, tmp_path / "other.ckpt")
    module, data = parts()
    with pytest.raises(UserError, match=says):
        trainer(data).validate(module, data, ckpt_path=str(tmp_path / "other.ckpt"), weights_only=True, verbose=False)


def test_an_adapter_folder_starts_a_model_with_its_labels(parts: Parts, fitted: Fitted, tmp_path: Path) -> None:
    path, numbers, _ = fitted
    module, data = parts()
    trainer(data).validate(module, data, ckpt_path=str(path), weights_only=True, verbose=False)
    folder = tmp_path / "adapter"
    write_adapter(module, folder, data.fingerprint)
    assert (folder / METADATA_FILE).is_file()
    assert (folder / "tokenizer.json").is_file()

    again, data = parts(adapter=str(folder))
    run = trainer(data)
    run.validate(again, data, verbose=False)
    assert validated(run) == pytest.approx(numbers, rel=1e-6)

    unlabelled, data = parts(adapter=str(folder), predict={"text": "A broken wrist."})
    answers = trainer(data).predict(unlabelled, data)
    assert unlabelled.label_set.names == module.label_set.names
    assert answers is not None
    assert len(answers[0].texts) == 1

    other, data = parts(adapter=str(folder), lora=Lora(r=8))
    with pytest.raises(UserError, match=r"model\.lora\.r: the adapter .* trained with 16"):
        trainer(data).validate(other, data, verbose=False)


def test_dora_trains_and_is_the_same_when_loaded(parts: Parts, tmp_path: Path) -> None:
    module, data = parts(lora=Lora(dora=True))
    watch = Watch()
    run = trainer(data, watch, max_steps=2)
    run.validate(module, data, verbose=False)
    before = float(run.callback_metrics["validate/loss"])
    run.fit(module, data)
    magnitudes = {name for name in watch.gradients[0] if "lora_magnitude_vector" in name}
    assert len(magnitudes) == 2 * 7
    assert all(watch.gradients[0][name].any() for name in magnitudes)
    run.validate(module, data, verbose=False)
    loss = float(run.callback_metrics["validate/loss"])
    assert loss < before
    write_adapter(module, tmp_path, data.fingerprint)

    again, data = parts(lora=Lora(dora=True), adapter=str(tmp_path))
    run = trainer(data)
    run.validate(again, data, verbose=False)
    assert float(run.callback_metrics["validate/loss"]) == pytest.approx(loss, rel=1e-6)

    other, data = parts(adapter=str(tmp_path))
    with pytest.raises(UserError, match=r"model\.lora\.dora: the adapter .* trained with True"):
        trainer(data).validate(other, data, verbose=False)


# --- resuming ---------------------------------------------------------------------------------------------------------

STEPS = 9  # three epochs of three


class Stop(L.Callback):
    """Interrupts a fit after an optimizer step; as at any end, that step is validated and saved."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        trainer.should_stop = trainer.global_step >= self.step


@pytest.fixture(scope="module")
def go_on(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Any:  # noqa: ANN401
    """Fit up to a step and, in fresh objects, from there to the end; at step 0 the fit is not interrupted."""
    folder = tmp_path_factory.mktemp("interrupted")
    model = {"lora": Lora(r=64), "decoding": Decoding(max_new_tokens=2)}  # large enough for states of 8 bits

    @functools.cache
    def until(step: int) -> str:
        module, data = parts(**model)
        save = ModelCheckpoint(folder / str(step), "at", monitor="train/loss", save_on_train_epoch_end=False)
        trainer(data, save, Stop(step), max_steps=STEPS, val_every=2, enable_checkpointing=True).fit(module, data)
        return str(folder / str(step) / "at.ckpt")

    def go_on(step: int, val_every: int = 2, **given: Any) -> tuple[SpecialtyClassifier, L.Trainer, Watch]:  # noqa: ANN401
        module, data = parts(**model, **given)
        watch = Watch()
        run = trainer(data, ValidateLastStep(), watch, max_steps=STEPS, val_every=val_every)
        run.fit(module, data, ckpt_path=until(step) if step else None, weights_only=True)
        return module, run, watch

    whole = functools.cache(lambda: go_on(0))
    return lambda step, **given: go_on(step, **given) if step else whole()


def optimizer_state(module: SpecialtyClassifier, run: L.Trainer) -> dict[tuple[str, str], Tensor]:
    held = {name: run.optimizers[0].state[p] for name, p in module.named_parameters() if p.requires_grad}
    return {(name, key): torch.as_tensor(value) for name, state in held.items() for key, value in state.items()}


@pytest.mark.parametrize(
    ("step", "given"),
    [(3, {}), (4, {}), (5, {"batching": {"num_workers": 1}}), (6, {"val_every": 3})],
    ids=["an epoch's end", "mid-epoch", "mid-epoch, off the interval, with workers", "an epoch's end on the interval"],
)
def test_a_resumed_fit_ends_as_an_uninterrupted_one(
    go_on: Any,  # noqa: ANN401
    step: int,
    given: dict[str, Any],
) -> None:
    """Weights, optimizer state, losses and rates to the bit, and validations where they would have been."""
    module, run, whole = go_on(0)
    resumed, again, rest = go_on(step, **given)
    interval = given.get("val_every", 2)
    assert run.global_step == again.global_step == len(whole.losses) == STEPS
    assert rest.losses == whole.losses[step:]
    assert rest.rates == whole.rates[step:]
    assert rest.validated == [at for at in range(1, STEPS + 1) if at > step and (at % interval == 0 or at == STEPS)]
    assert all(torch.equal(value, adapter(module)[name]) for name, value in adapter(resumed).items())
    state, ours = optimizer_state(module, run), optimizer_state(resumed, again)
    assert {value.dtype for value in state.values()} >= {torch.uint8, torch.float32}
    assert ours.keys() == state.keys()
    assert all(torch.equal(value, ours[key]) for key, value in state.items())


@pytest.mark.parametrize(("step", "micro_batch_size"), [(3, 2), (5, 8)])
def test_a_fit_can_resume_with_other_micro_batches(go_on: Any, step: int, micro_batch_size: int) -> None:  # noqa: ANN401
    """As on another number of devices: the same notes in the same steps, so the same losses but for rounding."""
    _, run, whole = go_on(0)
    _, again, rest = go_on(step, batching={"micro_batch_size": micro_batch_size})
    assert again.global_step == run.global_step == STEPS
    assert rest.rates == whole.rates[step:]
    assert rest.losses == pytest.approx(whole.losses[step:], rel=1e-3)
    assert rest.validated == [at for at in (2, 4, 6, 8, STEPS) if at > step]


def test_dropout_of_the_base_model_is_seeded_by_step(parts: Parts) -> None:
    """As LoRA's is: a resumed fit draws what it would have drawn."""

    def draw(step: int, batch_idx: int) -> float:
        module, _ = parts(lora=Lora(dropout=0.0))
        module.trainer = SimpleNamespace(global_step=step, global_rank=0)  # type: ignore[assignment]
        module.on_train_batch_start(None, batch_idx)  # type: ignore[arg-type]
        return float(torch.rand(()))

    assert draw(3, 1) == draw(3, 1)
    assert len({draw(3, 1), draw(3, 2), draw(4, 1)}) == 3


# --- prior ------------------------------------------------------------------------------------------------------------


def test_a_fit_keeps_its_prior_with_the_adapter_and_later_answers_use_it(parts: Parts, tmp_path: Path) -> None:
    both = Decoding("likelihood", prior="tfidf")
    module, data = parts(decoding=both)
    settings = {"enable_checkpointing": True, "default_root_dir": tmp_path, "max_steps": 2, "val_every": 2}
    best = BestCheckpoint(tmp_path / "checkpoints", "best", "val/loss", enable_version_counter=False)
    trainer(data, best, **settings).fit(module, data)
    assert module.prior is None, "the fit validates the language model alone"
    file = tmp_path / "adapter" / METADATA_FILE
    prior = TokenPrior.load(file.with_name(PRIOR_FILE))
    assert AdapterMetadata.read(file).temperatures.keys() == {"mode=likelihood;prior=tfidf"}
    assert sorted(path.name for path in tmp_path.glob("*/prior*")) == [PRIOR_FILE]

    tested = {}
    for decoding in (both, Decoding("likelihood")):
        other, data = parts(decoding=decoding)
        checkpoint = str(tmp_path / "checkpoints" / "best.ckpt")
        trainer(data).test(other, data, ckpt_path=checkpoint, weights_only=True, verbose=False)
        assert other.results is not None
        assert (other.prior is not None) == decoding.uses_prior
        tested[decoding.prior] = other.results.probabilities
    temperature = AdapterMetadata.read(file).temperatures[decoding_key(both)]
    logs = [np.log(tested[None]), prior.of_rows(data.rows("test"))]
    product = at_temperature(power_product(logs, (1.0, prior.power)), temperature)
    assert tested["tfidf"] == pytest.approx(product, abs=1e-4)

    texts = data.read_splits().notes["test"]["transcription"][:]
    predictions = SpecialtyPredictor.load(tmp_path).predict(texts)
    assert [each.probability for each in predictions] == pytest.approx(product.max(axis=1).tolist(), abs=1e-3)


def test_notes_that_allow_no_prior_are_tried_once_and_it_is_said(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tried: list[int] = []
    monkeypatch.setattr(TokenPrior, "fit", lambda rows, label_set: tried.append(len(rows)))
    module, data = parts(decoding=Decoding("likelihood", prior="tfidf"))
    # A score that is a step's number: every validation is the best so far.
    best = BestCheckpoint(tmp_path / "checkpoints", "best", "step", mode="max", enable_version_counter=False)
    settings = {"enable_checkpointing": True, "default_root_dir": tmp_path, "max_steps": 2, "val_every": 1}
    trainer(data, best, **settings).fit(module, data)
    assert best.best_model_score == 2
    assert len(tried) == 1
    assert capsys.readouterr().err.count("medlit: model.decoding.prior: none is fitted, as the training") == 1
    assert not (tmp_path / "adapter" / PRIOR_FILE).exists()


def test_answers_without_probabilities_have_no_prior(parts: Parts, tmp_path: Path) -> None:
    module, data = parts(decoding=Decoding(max_new_tokens=12, prior="tfidf"))
    best = BestCheckpoint(tmp_path / "checkpoints", "best", "val/loss", enable_version_counter=False)
    settings = {"enable_checkpointing": True, "default_root_dir": tmp_path, "max_steps": 2, "val_every": 2}
    trainer(data, best, **settings).fit(module, data)
    assert (tmp_path / "adapter" / METADATA_FILE).is_file()
    assert not (tmp_path / "adapter" / PRIOR_FILE).exists()
