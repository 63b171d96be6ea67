"""The words of `--help`: what each verb is for, and what Lightning's settings mean here.

Settings of medlit's own are told where they are declared, in docstrings. Lightning's are told here, in its place: of
its hundred those that a fine-tune of this kind changes, with medlit's defaults and units. The others work too, where
medlit does not make them itself, and `--print_config` shows them.
"""

from __future__ import annotations

_FIT = """
A flag beats a config, a later config beats an earlier one, and all of them beat a variable, which is named so:
MEDLIT_FIT__MODEL__LORA__R=32. Steps are optimizer steps and lengths are tokens, unless something else is said.
"""
_OTHERS = """
A flag beats a config, a later config beats an earlier one, and all of them beat a variable, which is named so:
MEDLIT_{verb}__DATA__SOURCE=notes.csv. The settings that decide nothing but a fit are accepted, so that one config
serves every verb, and not listed here.
"""

ABOUT = {
    "fit": """\
Fine-tune an adapter on labelled notes. It validates as it goes, writes the best and the last weights, the best adapter
and TensorBoard's curves to logs/<config>/version_N, and stops where a validation no longer improves.

examples:
  medlit fit --config configs/quickstart.yaml
  medlit fit --config configs/llama31_8b.yaml --config configs/hardware/gpu_80gb.yaml
  medlit fit --config configs/llama31_8b.yaml --data.source notes.csv --data.columns.label department
  medlit fit --config configs/llama31_8b.yaml --ckpt_path last      # go on after an interruption
"""
    + _FIT,
    "validate": """\
Measure a checkpoint or an adapter on the validation split. In a mode that gives probabilities it keeps the temperature
that calibrates them with the adapter, for later tests and predictions.

examples:
  medlit validate --config configs/llama31_8b.yaml --ckpt_path best
  medlit validate --config configs/llama31_8b.yaml --ckpt_path best --model.decoding.mode likelihood
"""
    + _OTHERS.format(verb="VALIDATE"),
    "test": """\
Measure a checkpoint or an adapter on the test split, and write the report: report.html in the run folder.

examples:
  medlit test --config configs/llama31_8b.yaml --ckpt_path best
  medlit test --config configs/quickstart.yaml --model.adapter logs/quickstart/version_0/adapter
  medlit test --config configs/quickstart.yaml --model.adapter none      # the bare base model
"""
    + _OTHERS.format(verb="TEST"),
    "predict": """\
File one note, a split or a table of notes. The answers to a table go to --output, one note goes to standard output,
with its probability, margin and runner-up, where the decoder gives them, on standard error.

examples:
  medlit predict --config configs/llama31_8b.yaml --ckpt_path best --data.predict.text 'CHIEF COMPLAINT: ...'
  medlit predict --config configs/llama31_8b.yaml --ckpt_path best --data.predict.text - < note.txt
  medlit predict --config configs/llama31_8b.yaml --ckpt_path best --data.predict.source new.csv \\
    --output filed.parquet --model.decoding.mode likelihood --model.decoding.abstain_below 0.7
"""
    + _OTHERS.format(verb="PREDICT"),
}

# Key of a group, or of the first setting of one that has no key -> its title.
TITLES = {
    "trainer": "trainer: the machine and the length of a run; Lightning's other settings are accepted too",
    "model": "model: what answers",
    "model.language_model": "model.language_model: the frozen base model",
    "model.lora": "model.lora: the adapter that is trained (Hu 2021, arXiv 2106.09685)",
    "model.optimizer": "model.optimizer: AdamW with 8-bit state (Dettmers 2021, arXiv 2110.02861)",
    "model.decoding": "model.decoding: how the model answers",
    "data": "data: the notes, their splits and their batches",
    "data.labels": "data.labels: the spelling of labels",
    "checkpoint": "checkpoint: which validation's weights are the best",
    "early_stopping": "early_stopping: when a fit ends before its last step",
    "ckpt_path": "weights",
}

_LIMIT = "of the {split} split: so many batches, or with a point (0.25) such a share of them; null: all"

# Lightning's settings -> what they are; those that are not here are not listed.
TOLD = {
    "config": "a YAML file with any of the settings below; may be given several times, and a later file changes what it"
    " names and nothing else. The run folder has the files' names, less those in a folder 'hardware'",
    "print_config": "print all settings as this command would use them, and exit; =skip_default: only those that are"
    " not the defaults",
    "seed_everything": "seed of Python, NumPy and PyTorch; true: a random one",
    "trainer.accelerator": "'cpu', 'gpu', or 'auto': a GPU if there is one",
    "trainer.devices": "number of GPUs or processes of each machine, a list of GPUs such as [0,2], or 'auto': all GPUs",
    "trainer.num_nodes": "number of machines",
    "trainer.strategy": "'auto', or 'ddp' for several devices, as in configs/hardware/ddp.yaml",
    "trainer.precision": "number format of the trained computation: 'bf16-mixed', '16-mixed', '32-true'; null:"
    " bf16-mixed on a GPU from Ampere on, 16-mixed on an older one, 32-true on a CPU",
    "trainer.max_steps": "optimizer steps of the fit; -1: as many as max_epochs has",
    "trainer.max_epochs": "most passes over the training notes; null: max_steps alone decides",
    "trainer.max_time": "longest time of a fit, DD:HH:MM:SS; null: no limit",
    "trainer.gradient_clip_val": "norm to which gradients are clipped; null: they are not",
    "trainer.limit_val_batches": _LIMIT.format(split="validation"),
    "trainer.limit_test_batches": _LIMIT.format(split="test"),
    "trainer.limit_predict_batches": "of the notes to file: so many batches, or with a point (0.25) such a share of"
    " them; null: all",
    "trainer.num_sanity_val_steps": "validation batches before the first step, the longest first; -1: all, 0: none",
    "trainer.log_every_n_steps": "log the loss and the rates of every n-th step",
    "trainer.fast_dev_run": "try the verb on so many batches and leave nothing behind; true: on one",
    "trainer.logger": "where curves go: true or null: TensorBoard; false: nowhere; or loggers by class_path",
    "trainer.callbacks": "further callbacks by class_path, beside medlit's own; --trainer.callbacks+ adds one to a"
    " config's",
    "trainer.enable_progress_bar": "show a progress bar; null: yes",
    "trainer.enable_model_summary": "print the model's parts before the run; null: yes",
    "trainer.deterministic": "use deterministic kernels alone, and fail where there is none; 'warn': say so instead",
    "trainer.profiler": "'simple', 'advanced' or 'pytorch': where the time goes; null: do not look",
    "trainer.default_root_dir": "folder of the run folders",
    "checkpoint.monitor": "the metric that decides: val/f1_macro, val/f1_weighted, val/accuracy, val/invalid_rate or"
    " val/loss",
    "checkpoint.mode": "'max' where larger is better, 'min' where smaller is",
    "early_stopping.monitor": "the metric that is to improve, one of those of checkpoint.monitor",
    "early_stopping.mode": "'max' where larger is better, 'min' where smaller is",
    "early_stopping.patience": "end after so many validations in a row without improvement",
    "early_stopping.min_delta": "a change of at most this is no improvement",
    "early_stopping.stopping_threshold": "end once the metric is better than this; null: never",
    "early_stopping.divergence_threshold": "end once the metric is worse than this; null: never",
    "ckpt_path": "'best' or 'last' of the newest run of these configs (or of --run_dir), or the path of a checkpoint;"
    " null: the weights of model.adapter, or fresh ones",
    "verbose": "print the table of metrics at the end",
}
LIGHTNING = ("trainer.", "checkpoint.", "early_stopping.")
# Accepted, and of no use to anybody who asks what there is.
UNTOLD = ("weights_only", "return_predictions")

# Settings, or beginnings of them, that decide nothing but a fit.
FIT_ALONE = (
    "val_every_steps",
    "model.optimizer.",
    "model.language_model.gradient_checkpointing",
    "model.language_model.memory_budget_gib",
    "model.lora.dropout",
    "model.lora.seed",
    "data.batching.class_balance",
    "data.batching.global_batch_size",
    "data.batching.packing",
    "data.batching.seed",
    "trainer.max_",
    "trainer.gradient_clip_val",
    "trainer.num_sanity_val_steps",
    "trainer.log_every_n_steps",
    "checkpoint.",
    "early_stopping.",
)
# Settings -> the verbs that they decide something for, where that is neither all of them nor a fit alone.
VERBS = {
    "log_samples": ("fit", "validate", "test"),
    "data.predict.text": ("predict",),
    "data.predict.source": ("predict",),
    "model.decoding.abstain_below": ("predict",),
    "trainer.limit_predict_batches": ("predict",),
    "trainer.limit_test_batches": ("test",),
    "trainer.limit_val_batches": ("fit", "validate"),
}
