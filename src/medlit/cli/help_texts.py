"""The texts of `--help`: what each verb does, and what Lightning's settings mean here.

medlit's own settings are documented where they are declared, in docstrings. Of Lightning's hundred settings, those that
matter to a fine-tuning run are documented here, with medlit's defaults and units. The others work too, unless medlit
sets them itself, and `--print_config` shows them.
"""

from __future__ import annotations

_PRECEDENCE = """
A flag overrides a config, a later config overrides an earlier one, and both override environment variables, which are
named like this: MEDLIT_{}.
"""
_FIT = (
    _PRECEDENCE.format("FIT__MODEL__LORA__R=32")
    + """\
Steps are optimizer steps and lengths are tokens, unless stated otherwise.
"""
)
_OTHERS = (
    _PRECEDENCE
    + """\
Settings that only affect a fit are accepted but not listed here, so that one config serves every verb.
"""
)

ABOUT = {
    "fit": """\
Fine-tune an adapter on labelled notes. A fit validates at intervals, stops when validations no longer improve, and
writes the best and the last weights, the best adapter and TensorBoard's curves to logs/<config>/version_N.

examples:
  medlit fit --config configs/quickstart.yaml
  medlit fit --config configs/llama31_8b.yaml --config configs/hardware/gpu_80gb.yaml
  medlit fit --config configs/llama31_8b.yaml --data.source notes.csv --data.columns.label department
  medlit fit --config configs/llama31_8b.yaml --ckpt_path last      # resume after an interruption
"""
    + _FIT,
    "validate": """\
Evaluate a checkpoint or an adapter on the validation split. In a mode that gives probabilities, it also fits the
temperature that calibrates them, and stores it with the adapter for later tests and predictions.

examples:
  medlit validate --config configs/llama31_8b.yaml --ckpt_path best
  medlit validate --config configs/llama31_8b.yaml --ckpt_path best --model.decoding.mode likelihood
"""
    + _OTHERS.format("VALIDATE__DATA__SOURCE=notes.csv"),
    "test": """\
Evaluate a checkpoint or an adapter on the test split, and write report.html to the run folder.

examples:
  medlit test --config configs/llama31_8b.yaml --ckpt_path best
  medlit test --config configs/quickstart.yaml --model.adapter logs/quickstart/version_0/adapter
  medlit test --config configs/quickstart.yaml --model.lora null      # the bare base model
"""
    + _OTHERS.format("TEST__DATA__SOURCE=notes.csv"),
    "predict": """\
Classify one note, a split or a table of notes. The answers for a table go to --output. The answer for one note goes to
standard output; its probability, margin and runner-up, in a mode that gives probabilities, go to standard error.

examples:
  medlit predict --config configs/llama31_8b.yaml --ckpt_path best --data.predict.text 'CHIEF COMPLAINT: ...'
  medlit predict --config configs/llama31_8b.yaml --ckpt_path best --data.predict.text - < note.txt
  medlit predict --config configs/llama31_8b.yaml --ckpt_path best --data.predict.source new.csv \\
    --output specialties.parquet --model.decoding.mode likelihood --model.decoding.abstain_below 0.7
"""
    + _OTHERS.format("PREDICT__DATA__SOURCE=notes.csv"),
}

# Group, or first setting of a group without a name -> the group's title.
TITLES = {
    "trainer": "trainer: the machine and the length of a run; Lightning's other settings are accepted too",
    "model": "model: the language model and its adapter",
    "model.language_model": "model.language_model: the frozen base model",
    "model.lora": "model.lora: the trained adapter (Hu 2021, arXiv 2106.09685)",
    "model.optimizer": "model.optimizer: AdamW with 8-bit state (Dettmers 2021, arXiv 2110.02861)",
    "model.decoding": "model.decoding: how the model answers",
    "data": "data: the notes",
    "data.columns": "data.columns: names of the table's columns",
    "data.labels": "data.labels: how labels are spelled and which are used, applied in this order",
    "data.split": "data.split: how notes are divided into train, validation and test",
    "data.batching": "data.batching: how notes are put into batches",
    "data.predict": "data.predict: what to classify",
    "checkpoint": "checkpoint: which weights are the best",
    "early_stopping": "early_stopping: when a fit stops before its last step",
    "ckpt_path": "weights",
}

_LIMIT = "number of {what} batches, or with a decimal point (0.25) the share of them; null: all"

# Lightning's setting -> its help; a setting that is not here is not listed.
LIGHTNING_HELP = {
    "config": "YAML file with any of the settings below; may be given several times, and a later file overrides only"
    " what it sets. The run folder is named after the files, except those in a folder 'hardware'",
    "print_config": "print all settings as this command would use them, and exit; =skip_default: only those that differ"
    " from the defaults",
    "seed_everything": "seed of Python, NumPy and PyTorch; true: a random one",
    "trainer.accelerator": "'cpu', 'gpu', or 'auto': a GPU if there is one",
    "trainer.devices": "number of GPUs or processes of each machine, a list of GPUs such as [0,2], or 'auto': all GPUs",
    "trainer.num_nodes": "number of machines",
    "trainer.strategy": "'auto', or 'ddp' for several devices, as in configs/hardware/ddp.yaml",
    "trainer.precision": "number format of the trained computation: 'bf16-mixed', '16-mixed' or '32-true'; null:"
    " bf16-mixed on a GPU from Ampere on, 16-mixed on an older one, 32-true on a CPU",
    "trainer.max_steps": "optimizer steps of the fit; -1: as many as max_epochs has",
    "trainer.max_epochs": "most passes over the training notes; null: only max_steps limits the fit",
    "trainer.max_time": "longest time of a fit, DD:HH:MM:SS; null: no limit",
    "trainer.gradient_clip_val": "norm to which gradients are clipped; null: no clipping",
    "trainer.limit_val_batches": _LIMIT.format(what="validation"),
    "trainer.limit_test_batches": _LIMIT.format(what="test"),
    "trainer.limit_predict_batches": _LIMIT.format(what="prediction"),
    "trainer.num_sanity_val_steps": "validation batches before the first step, the longest first; -1: all, 0: none",
    "trainer.log_every_n_steps": "interval, in steps, at which the loss and the learning rate are logged",
    "trainer.fast_dev_run": "run this number of batches and write no files; true: one batch",
    "trainer.logger": "where curves are logged; true or null: TensorBoard, false: nowhere; or loggers by class_path",
    "trainer.callbacks": "callbacks by class_path, in addition to medlit's own; --trainer.callbacks+ adds one to those"
    " of a config",
    "trainer.enable_progress_bar": "show a progress bar; null: yes",
    "trainer.enable_model_summary": "print a summary of the model before the run; null: yes",
    "trainer.deterministic": "use only deterministic kernels, and fail where there is none; 'warn': warn instead",
    "trainer.profiler": "'simple', 'advanced' or 'pytorch'; null: no profiler",
    "trainer.default_root_dir": "folder that holds the run folders",
    "checkpoint.monitor": "the metric that decides: val/f1_macro, val/f1_weighted, val/accuracy, val/invalid_rate or"
    " val/loss",
    "checkpoint.mode": "'max' if higher is better, 'min' if lower is",
    "early_stopping.monitor": "the metric that has to improve, one of those of checkpoint.monitor",
    "early_stopping.mode": "'max' if higher is better, 'min' if lower is",
    "early_stopping.patience": "stop after this number of validations in a row without improvement",
    "early_stopping.min_delta": "smallest change that counts as an improvement",
    "early_stopping.stopping_threshold": "stop once the metric is better than this; null: never",
    "early_stopping.divergence_threshold": "stop once the metric is worse than this; null: never",
    "ckpt_path": "'best' or 'last' of the newest run of these configs (or of --run_dir), or the path of a checkpoint;"
    " null: the weights of model.adapter, or a new adapter",
    "verbose": "print the table of metrics at the end",
}
LIGHTNING = ("trainer.", "checkpoint.", "early_stopping.")
# Accepted, but of no use on a command line.
HIDDEN = ("weights_only", "return_predictions")

# Settings, or prefixes of them, that only affect a fit.
FIT_ONLY = (
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
# Settings -> the verbs that they affect, if that is neither all of them nor only fit.
VERBS = {
    "log_samples": ("fit", "validate", "test"),
    "data.mask_prompt": ("fit", "validate", "test"),
    "data.predict.text": ("predict",),
    "data.predict.source": ("predict",),
    "model.decoding.abstain_below": ("predict",),
    "trainer.limit_predict_batches": ("predict",),
    "trainer.limit_test_batches": ("test",),
    "trainer.limit_val_batches": ("fit", "validate"),
}
