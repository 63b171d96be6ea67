"""`medlit doctor --config`: a fit up to its second optimizer step, by the code of `medlit fit`, that leaves no files.

`trainer.fast_dev_run` keeps Lightning from writing a run folder, logs or checkpoints.
"""

import itertools
import resource
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace

import numpy as np
import psutil
import torch
from lightning.pytorch.accelerators import CUDAAccelerator

from medlit.base_model import load_tokenizer, read_config, untried_family
from medlit.callbacks.throughput import TOKENS_PER_SECOND, Throughput
from medlit.cli.cli import MedlitCLI
from medlit.cli.environment import check_device
from medlit.data.collate import Batch, unnamed_rows
from medlit.data.datamodule import TranscriptionDataModule
from medlit.data.prompt import NotePrompt
from medlit.data.settings import Columns
from medlit.data.sources import read_tables
from medlit.errors import NotCachedError, UserError, WrongNumbersError
from medlit.model.families import REPLAY, causal_lm
from medlit.model.fit_memory import FitMemory, fit_memory
from medlit.model.language_model import dtype_for
from medlit.model.memory import GIB, SLACK, free_on
from medlit.model.packing import can_pack
from medlit.tools.doctor import CONFIG, EXAMPLE, SELF_CHECK, TRIAL, CheckResult

STEPS = 2  # the first one compiles
MAX_BATCHES = 256  # to look at; an epoch of a large table would take minutes


class DryRunCLI(MedlitCLI):
    """A fit of two steps and one validation batch in one process."""

    device_error: UserError | None = None
    processes = 1  # of the fit, on this host

    def before_instantiate_classes(self) -> None:
        """Use one of the requested devices, or the CPU if there are none, and write nothing."""
        config = self.config.fit
        trainer = config.trainer
        try:
            check_device(trainer.accelerator, trainer.devices)
        except UserError as error:
            self.device_error = error
            if not torch.cuda.is_available():
                trainer.accelerator = "cpu"
        devices = trainer.devices
        if torch.cuda.is_available() and trainer.accelerator != "cpu" and self.device_error is None:
            every = devices == "auto"
            self.processes = torch.cuda.device_count() if every else len(CUDAAccelerator.parse_devices(devices) or "1")
        trainer.devices = devices[:1] if isinstance(devices, list) and self.device_error is None else 1
        trainer.num_nodes, trainer.strategy, trainer.plugins = 1, "auto", None
        trainer.fast_dev_run, trainer.profiler = True, "simple"  # which times what `_measured` shows
        trainer.enable_progress_bar = trainer.enable_model_summary = trainer.logger = False
        config.ckpt_path = None
        super().before_instantiate_classes()

    def after_instantiate_classes(self) -> None:
        """Accumulate micro-batches as a fit does, but stop after the second step."""
        super().after_instantiate_classes()
        batches = STEPS * self.trainer.accumulate_grad_batches
        self.trainer.limit_train_batches = self.trainer.val_check_interval = batches
        self.trainer.fit_loop.epoch_loop.max_steps = STEPS
        self.datamodule.trainer = self.trainer

    def _run_subcommand(self, subcommand: str) -> None:
        return  # `dry_run` starts it, once memory and notes are checked


def dry_run(settings: list[str], show_notes: bool) -> Iterator[CheckResult]:
    """Check the fit of these `--config` files and flags before it starts; yields each result as it is found."""
    cli = DryRunCLI(["fit", *settings])
    data, language_model = cli.datamodule, cli.model.language_model
    files = ", ".join(str(path) for path in cli.config.fit.config or [])
    yield CheckResult(CONFIG, "ok", f"{files}: base model {language_model.base_model}, notes {data.source}")
    if cli.device_error is not None:
        result = _failure("devices", cli.device_error)
        yield replace(result, remedy=result.remedy.replace("run 'medlit doctor' to see why", "see the row of the GPU"))
    stage = "notes"
    try:
        data.read_splits()
        stage = "base model"
        load_tokenizer(language_model.base_model, language_model.revision)
        stage = "notes"
        tokens = yield from _check_notes(data, show_notes)
        stage = "memory"
        needed, memory = _check_fit_memory(cli, tokens)
        yield memory
        if needed.offload.layers:
            yield host_memory(needed, cli.processes)
        stage = TRIAL
        if memory.status == "fail" or cli.device_error is not None:
            found = "no training step was tried, since the fit cannot run here with these settings"
            yield CheckResult(TRIAL, "warn", found, "fix what fails above first")
        else:
            MedlitCLI._run_subcommand(cli, "fit")
            yield from _measured(cli, needed)
    except NotCachedError:  # a fit may fetch it, the doctor does not
        check, name = ("notes", data.source) if stage == "notes" else ("base model", language_model.base_model)
        text = f"{name} is not in this machine's cache, so what depends on it was not tried; the doctor fetches nothing"
        remedy = "a fit fetches it over a network; without one copy the cache folder here (make bundle)"
        yield CheckResult(check, "warn", text, f"{remedy}; what is gated needs HF_TOKEN")
    except WrongNumbersError as error:
        yield _failure(SELF_CHECK, error)
        return
    except UserError as error:
        yield _failure(stage, error)
    except Exception as error:  # anything that would end the fit is the finding
        text = (str(error).strip().splitlines() or ["no message"])[0]
        remedy = "run 'medlit fit' with the same settings to see the traceback; it may be a bug"
        yield CheckResult(stage, "fail", f"{type(error).__name__}: {text}", remedy)
    yield _self_check(cli)


def _self_check(cli: DryRunCLI) -> CheckResult:
    """What loading found out about the base model's numbers; it refuses a model that fails."""
    if (model := cli.model.model) is None:
        why = "not checked: the weights are not here, or were not loaded"
        return CheckResult(SELF_CHECK, "warn", why, "first fix what the rows above name")
    again = vars(inner := causal_lm(model))[REPLAY]
    how = "each label computes the prompt again, which is slower" if again else "labels share a prompt's computation"
    found = "losses and log-likelihoods are those of the model's own forward pass"
    return CheckResult(SELF_CHECK, "ok", "; ".join(filter(None, [found, how, untried_family(inner.config)])))


def _failure(check: str, error: UserError) -> CheckResult:
    """A failure from a user's mistake, whose sentence has the remedy after a semicolon."""
    found, _, remedy = str(error).rstrip(".").partition("; ")
    return CheckResult(check, "fail", found, remedy or "change the setting that the message names")


def _check_notes(data: TranscriptionDataModule, show_notes: bool) -> Generator[CheckResult, None, int]:
    """The notes as the model sees them; returns the padded tokens of the largest micro-batch."""
    data.setup("fit")
    tables = {name: data.rows(name) for name in data.read_splits().notes}
    longest = max(max(table["length"][:]) for table in tables.values())
    cut = sum(tokens > 0 for table in tables.values() for tokens in table["cut_tokens"][:])
    share = cut / sum(map(len, tables.values()))
    counts = ", ".join(f"{name} {len(table):,}" for name, table in tables.items())
    room = f"{longest:,} of at most {data.tokenizer.max_length:,} tokens"
    yield CheckResult("notes", "ok", f"{counts}; the longest prompt has {room}; {share:.1%} of the notes are cut")
    if data.label_set is not None:
        yield check_labels(data.prompt, data.label_set.names)
    loader = data.train_dataloader()  # without its worker processes
    batches = [loader.dataset[batch] for batch in itertools.islice(loader.sampler, MAX_BATCHES)]
    if show_notes:
        kind, example = "one of your notes", batches[0]
    else:
        note = read_tables("builtin", None, Columns())["train"][0].rows[0]
        (row,) = unnamed_rows([data.prompt.prompt(note["transcription"])])
        row["specialty"] = note["medical_specialty"]
        kind, example = "an invented note", data.collator.train([row], data.collator.supervised(row))
    text, supervised = _mark_supervised(example, data.prompt)
    kind += f", {example.lengths[0]} tokens of which {supervised} are supervised"
    yield CheckResult(EXAMPLE, "ok", f"{kind}: {text}")
    return max(batch.input_ids.numel() for batch in batches)


def _mark_supervised(batch: Batch, prompt: NotePrompt) -> tuple[str, int]:
    """A batch's first note as text, with `[[` and `]]` around tokens that carry loss, and how many those are."""
    padded = batch.padded()
    ids = padded.input_ids[0, : padded.lengths[0]].tolist()
    supervised = {place + 1 for place in padded.places.tolist() if place < padded.input_ids.shape[1]}
    text = ""
    for learned, run in itertools.groupby(range(len(ids)), supervised.__contains__):
        part = prompt.tokenizer.decode([ids[at] for at in run], clean_up_tokenization_spaces=False)
        text += f"[[{part}]]" if learned else str(part)
    return text, len(supervised)


def check_labels(prompt: NotePrompt, names: Sequence[str]) -> CheckResult:
    """Whether K labels differ as token ids."""
    alike: dict[tuple[int, ...], list[str]] = {}
    for name in sorted(names):
        alike.setdefault(tuple(prompt.response(name)), []).append(name)
    if same := [" and ".join(map(repr, group)) for group in alike.values() if len(group) > 1]:
        found = f"the same tokens stand for {', '.join(same[:3])}, so that no answer can tell them apart"
        return CheckResult("labels", "fail", found, "spell them differently with data.labels.aliases")
    sizes, first = list(map(len, alike)), len({ids[0] for ids in alike})
    found = f"{len(names)} of {min(sizes)} to {max(sizes)} tokens with EOS, {first} different first tokens"
    return CheckResult("labels", "ok", found)


def _check_fit_memory(cli: DryRunCLI, tokens: int) -> tuple[FitMemory, CheckResult]:
    data, language_model = cli.datamodule, cli.model.language_model
    device = cli.trainer.strategy.root_device
    config = read_config(language_model.base_model, language_model.revision)
    lengths, answer = np.array(data.rows("validation")["length"][:]), cli.model.decoding.max_new_tokens
    eval_tokens = max(len(rows) * (int(lengths[rows].max()) + answer) for rows in data.val_dataloader().sampler)
    dtype = dtype_for(device, language_model.dtype)
    needed = fit_memory(config, language_model, cli.model.lora, tokens, eval_tokens, device, dtype)
    free, place = free_on(device), "the GPU"
    if device.type == "cpu":  # the estimate includes what this process took for its imports
        free, place = free + psutil.Process().memory_info().rss, "this machine"
    return needed, memory_result(needed, free, place, tokens)


def host_memory(needed: FitMemory, processes: int) -> CheckResult:
    """Compare the layers that stay in host memory, once for each process of a fit, with what is free of it."""
    size, free = processes * needed.offload.host / GIB, free_on(torch.device("cpu")) / GIB
    copies = f"{needed.offload.layers} of {needed.layers} layers in {processes} process{'es' * (processes > 1)}"
    found = f"{copies}, {size:.1f} of {free:.1f} GiB that are free"
    remedy = "set fewer trainer.devices or choose a smaller base model"
    return CheckResult("host memory", "ok" if size < free else "fail", found, remedy)


def memory_result(needed: FitMemory, free: int, place: str, tokens: int) -> CheckResult:
    """Compare the estimate for micro-batches of T tokens with the free bytes of a place: the GPU or this machine."""
    found = (
        f"about {needed.total / GIB:.1f} of {free / GIB:.1f} GiB that are free on {place}: weights"
        f" {needed.weights / GIB:.1f}, adapter and optimizer {needed.adapter / GIB:.1f}, a training micro-batch of"
        f" {tokens:,} tokens {needed.training / GIB:.1f} ({needed.layers_kept} of {needed.layers} layers kept),"
        f" evaluation {needed.evaluation / GIB:.1f}"
    )
    larger = "eval_batch_size" if needed.evaluation > needed.training else "micro_batch_size"
    remedy = f"set data.batching.{larger} or model.language_model.max_length lower, or choose a smaller base model"
    if needed.evaluation <= needed.training and needed.layers_kept > 1:
        remedy = f"set model.language_model.gradient_checkpointing to 'unsloth', or {remedy}"
    if needed.total <= 0.9 * free:
        return CheckResult("memory", "ok", found)
    is_close = needed.total <= SLACK * free
    return CheckResult("memory", "warn" if is_close else "fail", found + "; that is close" * is_close, remedy)


def _measured(cli: DryRunCLI, needed: FitMemory) -> Iterator[CheckResult]:
    """What the profiler and the callbacks of the fit measured; a step and a batch end when the GPU is done."""
    times = {name.rpartition(".")[2]: each for name, each in cli.trainer.profiler.recorded_durations.items()}  # type: ignore[attr-defined]
    seconds = sum(times["run_training_batch"][-cli.trainer.accumulate_grad_batches :])
    (rates,) = (each.rates or {} for each in cli.trainer.callbacks if isinstance(each, Throughput))  # type: ignore[attr-defined]
    loss = float(cli.trainer.callback_metrics["train/loss"])
    how = "packed" if cli.datamodule.batching.packing is not False and can_pack(cli.model.model) else "padded"
    found = (
        f"{seconds:.2f} s: {cli.datamodule.batching.global_batch_size} notes, {how}, {rates[TOKENS_PER_SECOND]:,.0f}"
        f" tokens/s, loss {loss:.3f} nats per supervised token"
    )
    yield CheckResult("training step", "ok", found)
    longest = len(next(iter(cli.datamodule.val_dataloader().sampler)))
    found = f"{times['validation_step'][0]:.1f} s for the longest {longest} notes ({cli.model.decoding.mode})"
    yield CheckResult("validation step", "ok", found)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if (device := cli.trainer.strategy.root_device).type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    found = f"peak of {peak / GIB:.1f} GiB in these steps, estimated {needed.total / GIB:.1f}"
    yield CheckResult("memory, measured", "ok", found)
