"""What medlit adds to Lightning's settings: arguments of its own, other defaults, and links between model and data."""

from __future__ import annotations

from jsonargparse.typing import NonNegativeInt
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser

MONITOR = "val/f1_macro"
TRAINER_DEFAULTS = {
    "default_root_dir": "logs",
    "max_steps": 60,
    "gradient_clip_val": 1.0,
    "log_every_n_steps": 1,
    # One batch, the longest: enough to fail before the fit rather than after its first 20 steps.
    "num_sanity_val_steps": 1,
    # The samplers deal notes to processes themselves; Lightning would shuffle and repeat some.
    "use_distributed_sampler": False,
    # Tensors made under inference mode must not enter a later backward pass through a cache.
    "inference_mode": False,
}


def add_arguments(parser: LightningArgumentParser) -> None:
    """Add what is neither the trainer's, the model's nor the data's."""
    parser.add_argument(
        "--val_every_steps",
        type=int,
        default=20,
        help="Validate after so many optimizer steps, and after the last.",
    )
    parser.add_argument(
        "--log_samples",
        type=NonNegativeInt,
        default=0,
        help="Write so many notes of every validation and test, with their answers, to samples.jsonl in the run"
        " folder. The file holds patients' text.",
    )
    parser.add_argument(
        "--run_dir", type=str | None, default=None, help="Run folder to look for 'best' and 'last' in, and to write to."
    )
    parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
    parser.add_lightning_class_args(EarlyStopping, "early_stopping")
    parser.set_defaults(
        {
            "checkpoint.monitor": MONITOR,
            "checkpoint.mode": "max",
            "checkpoint.filename": "best",
            # LastCheckpoint writes last.ckpt.
            "checkpoint.save_last": False,
            "checkpoint.enable_version_counter": False,
            "checkpoint.auto_insert_metric_name": False,
            "early_stopping.monitor": MONITOR,
            "early_stopping.mode": "max",
            "early_stopping.patience": 10,
            "early_stopping.check_on_train_epoch_end": False,
        }
    )


def link_arguments(parser: LightningArgumentParser) -> None:
    """Link what model and data share: said once, known to both."""
    parser.link_arguments("model.language_model.base_model", "data.tokenizer.base_model")
    parser.link_arguments("model.language_model.revision", "data.tokenizer.revision")
    parser.link_arguments("model.language_model.max_length", "data.tokenizer.max_length")
    parser.link_arguments("data.instruction", "model.instruction")
    parser.link_arguments("data.mask_prompt", "model.mask_prompt")
    parser.link_arguments("data.max_response_tokens", "model.max_response_tokens")
