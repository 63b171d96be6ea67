"""`medlit doctor --config`: a fit on the same road as `medlit fit`, as far as its second step, that leaves nothing.

The command line is parsed, the notes are read, the weights loaded and the Trainer run by the very code of a fit, told
to be a trial (`trainer.fast_dev_run`), which writes no run folder, log or checkpoint.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import resource
from collections.abc import Generator, Iterator
from dataclasses import replace

import psutil
import torch

from medlit.base_model import load_tokenizer, missing, resolve
from medlit.cli.cli import PARTS, MedlitCLI
from medlit.cli.environment import check_device
from medlit.cli.warnings import quiet
from medlit.data.collate import Batch
from medlit.data.datamodule import TranscriptionDataModule
from medlit.errors import NotCachedError, UserError
from medlit.model.memory import GIB
from medlit.model.module import TRAIN_LOSS
from medlit.model.language_model import dtype_for
from medlit.tools.doctor.check_result import CONFIG, EXAMPLE, TRIAL, Row, told
from medlit.tools.doctor.memory_fit import memory_row, need
from medlit.tools.doctor.show import Example
from medlit.tools.doctor.step_timer import STEPS, Stopwatch
from medlit.tools.doctor.tokens import example, invented, label_row, supervision_row

# Micro-batches that are looked through; an epoch of a large table would take minutes.
MOST_BATCHES = 256


class Trial(MedlitCLI):
    """A fit of two steps and one validation batch by one process, which runs when `go` is called."""

    no_device: UserError | None = None

    def before_instantiate_classes(self) -> None:
        """One device of those that are asked for, or the CPU, and no trace."""
        config = self.config.fit
        trainer = config.trainer
        try:
            check_device(trainer.accelerator, trainer.devices)
        except UserError as error:
            self.no_device = error
            if not torch.cuda.is_available():
                trainer.accelerator = "cpu"
        devices = trainer.devices
        trainer.devices = devices[:1] if isinstance(devices, list) and self.no_device is None else 1
        trainer.num_nodes, trainer.strategy, trainer.plugins = 1, "auto", None
        trainer.fast_dev_run = True
        trainer.enable_progress_bar = trainer.enable_model_summary = trainer.logger = False
        config.ckpt_path = None
        config.log_samples = 0
        super().before_instantiate_classes()

    def after_instantiate_classes(self) -> None:
        """Count as a fit does, then stop it after the second step."""
        super().after_instantiate_classes()
        batches = STEPS * self.trainer.accumulate_grad_batches
        self.trainer.limit_train_batches = self.trainer.val_check_interval = batches
        self.trainer.fit_loop.epoch_loop.max_steps = STEPS
        self.datamodule.trainer = self.trainer
        self.watch = Stopwatch()
        self.trainer.callbacks.append(self.watch)  # type: ignore[attr-defined]

    def _run_subcommand(self, subcommand: str) -> None:
        return

    def go(self) -> None:
        """Run it."""
        super()._run_subcommand("fit")


def parse(settings: list[str]) -> Trial:
    """Read the settings as `medlit fit` does.

    Raises:
        UserError: one is not understood, or does not go together with others.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return Trial(
                **PARTS,
                save_config_callback=None,
                seed_everything_default=3407,
                args=["fit", *settings],
            )
    except SystemExit as stop:
        raise UserError(said.getvalue().strip().removeprefix("medlit: ").rstrip(".") + ".") from stop


def rehearse(settings: list[str], show_notes: bool) -> Iterator[Row | Example]:
    """What there is to know about a fit before it is started, as it is found.

    Args:
        settings: `--config` files and flags.
        show_notes: take the example from the notes themselves.

    Raises:
        UserError: a setting is not understood.
    """
    quiet()
    cli = parse(settings)
    language_model = cli.model.language_model
    names = ", ".join(str(path) for path in cli.config.fit.config or [])
    yield Row(CONFIG, "ok", f"{names}: base model {language_model.base_model}, notes {cli.datamodule.source}")
    if cli.no_device is not None:
        row = told("devices", "fail", cli.no_device)
        yield replace(row, cure=row.cure.replace("run 'medlit doctor' to see why", "see the row of the GPU"))
    stage = "notes"
    try:
        cli.datamodule.split()
        stage = "base model"
        load_tokenizer(language_model.base_model, language_model.revision)
        stage = "notes"
        largest = yield from _look(cli.datamodule, show_notes)
        stage = "memory"
        fits = _memory(cli, largest)
        yield fits
        if fits.status == "fail" or cli.no_device is not None:
            why = "no training step was tried, since the fit cannot run here as it is set"
            yield Row(TRIAL, "warn", why, "mend what fails above")
            return
        stage = TRIAL
        cli.go()
        yield from _went(cli)
    except NotCachedError:  # nothing is fetched here, and a fit may well
        notes = stage == "notes"
        yield _not_cached(
            "notes" if notes else "base model", cli.datamodule.source if notes else language_model.base_model
        )
    except UserError as error:
        yield told(stage, "fail", error)
    except Exception as error:  # whatever would end the fit is the finding
        text = (str(error).strip().splitlines() or ["no message"])[0]
        cure = "run 'medlit fit' with the same settings to see where; it may be a bug"
        yield Row(stage, "fail", f"{type(error).__name__}: {text}", cure)


def _not_cached(check: str, name: str) -> Row:
    """What a machine without the weights or notes cannot tell."""
    found = f"{name} is not in this machine's cache, so what depends on it was not tried; the doctor fetches nothing"
    cure = "a fit fetches it where there is a network; where there is none bring the cache folder along (make bundle)"
    return Row(check, "warn", found, f"{cure}; a gated model needs HF_TOKEN" if check != "notes" else cure)


def _look(data: TranscriptionDataModule, show_notes: bool) -> Generator[Row | Example, None, int]:
    """The notes as the model will see them.

    Returns:
        Tokens of the largest micro-batch that was looked through, padding included.

    Raises:
        UserError: they cannot be used as they are.
    """
    data.setup("fit")
    tables = {name: data.rows(name) for name in data.split().notes}
    longest = max(max(table["length"][:]) for table in tables.values())
    cut = sum(tokens > 0 for table in tables.values() for tokens in table["cut_tokens"][:])
    share = cut / sum(map(len, tables.values()))
    counts = ", ".join(f"{name} {len(table):,}" for name, table in tables.items())
    yield Row(
        "notes",
        "ok",
        f"{counts}; the longest prompt has {longest:,} of at most {data.max_length:,} tokens; {share:.1%} of the notes"
        " are cut",
    )
    if data.label_set is not None:
        yield label_row(data.prompt, data.label_set.names)
    batches = list(itertools.islice(_micro_batches(data), MOST_BATCHES + 1))
    shown = batches[0] if show_notes else invented(data)
    runs = example(shown, data.prompt)
    whose = "a note of your own" if show_notes else "an invented note"
    supervised = sum(place < shown.padded().input_ids.shape[1] for place in shown.padded().places.tolist())
    yield Row(EXAMPLE, "ok", f"{whose}, {shown.lengths[0]} tokens of which {supervised} are taught")
    yield runs
    looked = batches[:MOST_BATCHES]
    yield supervision_row(looked, whole=len(batches) <= MOST_BATCHES)
    return max(batch.input_ids.numel() for batch in looked)


def _micro_batches(data: TranscriptionDataModule) -> Iterator[Batch]:
    """An epoch's, without the loader's worker processes."""
    loader = data.train_dataloader()
    return (loader.dataset[batch] for batch in loader.sampler)


def _memory(cli: Trial, tokens: int) -> Row:
    """Whether it will fit.

    Args:
        cli: the fit.
        tokens: of its largest micro-batch.

    Raises:
        UserError: the base model's configuration is not to be had.
    """
    from transformers import AutoConfig

    data, language_model = cli.datamodule, cli.model.language_model
    device = cli.trainer.strategy.root_device
    try:
        config = AutoConfig.from_pretrained(
            resolve(language_model.base_model), revision=language_model.revision, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise missing(language_model.base_model, language_model.revision) from error
    lengths = data.rows("validation")["length"][:]
    room = cli.model.decoding.max_new_tokens
    answering = max(len(rows) * (max(lengths[row] for row in rows) + room) for rows in data.val_dataloader().sampler)
    takes = need(
        config, language_model, cli.model.lora, tokens, answering, device, dtype_for(device, language_model.dtype)
    )
    if device.type == "cuda":
        free, where = torch.cuda.mem_get_info(device)[0], "the GPU"
    else:
        # What this process took for its imports is part of the estimate.
        free, where = psutil.virtual_memory().available + psutil.Process().memory_info().rss, "this machine"
    return memory_row(takes, free, where, tokens)


def _went(cli: Trial) -> Iterator[Row]:
    """What the steps took."""
    watch = cli.watch
    first, *later = watch.steps
    loss = float(cli.trainer.callback_metrics[TRAIN_LOSS])
    took = f"{later[-1]:.2f} s, after a first of {first:.1f} s" if later else f"{first:.1f} s, the first"
    speed = watch.tokens / (later or [first])[-1]
    yield Row(
        "training step",
        "ok",
        f"{took}: {watch.notes} notes, {speed:,.0f} tokens/s, loss {loss:.3f} nats a taught token; the weights were"
        f" loaded in {watch.loading:.0f} s",
    )
    yield Row(
        "validation step",
        "ok",
        f"{watch.validation:.1f} s for the longest {watch.answered} notes ({cli.model.decoding.mode})",
    )
    device = cli.trainer.strategy.root_device
    if device.type == "cuda":
        peak, where = torch.cuda.max_memory_allocated(device), "the GPU"
    else:
        peak, where = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "this machine"
    yield Row("memory, measured", "ok", f"{peak / GIB:.1f} GiB at the most on {where} in these steps")
