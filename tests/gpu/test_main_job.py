"""The recipe's config on the 8B shape: beside a bare Unsloth loop on the same batches, and again in a fresh process.

LLAMA_TOKENIZER=folder pytest -m gpu -s tests/gpu
"""

import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest
from compare import scalars

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(900)]

STEPS = 6


def bare_loop(llama: Path, batches: list, accumulate: int) -> tuple[list[float], float]:
    """What one would write with Unsloth alone, on medlit's batches."""
    import torch
    from bitsandbytes.optim import AdamW8bit
    from transformers import get_linear_schedule_with_warmup
    from unsloth import FastLanguageModel

    torch.cuda.reset_peak_memory_stats()
    model, _ = FastLanguageModel.from_pretrained(str(llama), max_seq_length=2048, load_in_4bit=True)
    model = FastLanguageModel.get_peft_model(
        model,
        r=16,
        lora_alpha=16,
        lora_dropout=0,
        bias="none",
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        use_gradient_checkpointing="unsloth",
        random_state=3407,
    )
    FastLanguageModel.for_training(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = AdamW8bit(trained, lr=2e-4, weight_decay=0.01)
    schedule = get_linear_schedule_with_warmup(optimizer, 5, STEPS)
    losses, total = [], 0.0
    for i, packed in enumerate(batches, start=1):
        batch = packed.padded()
        tokens = len(batch.targets)
        labels = torch.full_like(batch.input_ids, -100)
        labels.view(-1)[batch.places + 1] = batch.targets
        with torch.autocast("cuda", torch.bfloat16):
            out = model(
                input_ids=batch.input_ids.cuda(),
                attention_mask=torch.ones_like(batch.input_ids).cuda(),
                labels=labels.cuda(),
            )
        share = out.loss * (tokens / batch.step_tokens)
        share.backward()
        total += float(share)
        if i % accumulate == 0:
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(total)
            total = 0.0
    return losses, torch.cuda.max_memory_allocated() / 2**30


def test_main_job_of_the_8b_shape(
    llama_8b: Path, main_job: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medlit.unsloth_first import import_unsloth

    import_unsloth()
    import torch

    from medlit.cli.cli import main
    from medlit.model.memory import Recomputation

    monkeypatch.chdir(tmp_path)
    kept: list[int] = []
    prepare = Recomputation.prepare

    def recorded(self: Recomputation, tokens: int) -> int:
        kept.append(prepare(self, tokens))
        return kept[-1]

    monkeypatch.setattr(Recomputation, "prepare", recorded)
    torch.cuda.reset_peak_memory_stats()
    # An evaluation batch of the config, 64 notes, would take more than training does.
    budget = ["--model.language_model.memory_budget_gib", "10", "--data.batching.eval_batch_size", "8"]
    cli = main(["fit", *main_job, *budget, "--trainer.max_steps", str(STEPS), "--val_every_steps", "3"])
    peak = torch.cuda.max_memory_allocated() / 2**30
    run = cli.run_folder
    module = cli.model

    lora = {p.dtype for p in module.parameters() if p.requires_grad}
    assert lora == {torch.float32}
    # The second half of the steps comes after a validation; that the layers really computed again shows in the peak.
    assert max(kept) < 8, "10 GiB are not enough to keep much, before a validation and after it"
    size = (run / "checkpoints" / "last.ckpt").stat().st_size / 2**20
    assert size < 400

    losses = scalars(run, "train/loss")
    datamodule, accumulate = cli.datamodule, cli.trainer.accumulate_grad_batches
    loader = datamodule.train_dataloader()
    wanted = STEPS * accumulate
    batches: list = []
    epoch = 0
    while len(batches) < wanted:
        loader.sampler.set_epoch(epoch)
        batches += list(loader)
        epoch += 1
    fit_scores = json.loads((run / "fit_metrics.json").read_text())
    del cli, module
    gc.collect()
    torch.cuda.empty_cache()
    bare, bare_peak = bare_loop(llama_8b, batches[:wanted], accumulate)
    gc.collect()
    torch.cuda.empty_cache()

    fresh = subprocess.run(
        [sys.executable, "-m", "medlit", "validate", *main_job, "--ckpt_path", "last"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert fresh.returncode == 0, fresh.stderr[-2000:]
    scores = json.loads((run / "validate_metrics.json").read_text())
    print(f"\nlosses medlit {[round(x, 4) for x in losses]}\nlosses bare   {[round(x, 4) for x in bare]}")
    print(f"layers kept {min(kept)} to {max(kept)} of 32 in {len(kept)} micro-batches")
    print(f"peak GiB medlit (with validation) {peak:.2f}, bare loop {bare_peak:.2f}; checkpoint {size:.0f} MiB")
    for name, numbers in (("fit", fit_scores), ("validate", scores)):
        print(f"{name:<9} loss {numbers['loss']:.5f} accuracy {numbers['accuracy']:.4f}")
    assert len(losses) == STEPS
    assert losses == pytest.approx(bare, rel=0.02)
    # 10 GiB are less than these micro-batches take at the least: medlit does what it can, and says so.
    assert peak <= 1.15 * bare_peak
    assert scores["loss"] == pytest.approx(fit_scores["loss"], rel=0.002)
    assert scores["confusion"] == fit_scores["confusion"]
