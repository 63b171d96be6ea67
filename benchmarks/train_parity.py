"""Does the fast way compute the same? Loss and adapter gradients of six notes, computed in several ways.

The plain way is padded notes in Unsloth's layers, uncompiled. How far apart two ways may be that are equally right is
seen from the plain way itself, given the six notes one at a time.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from medlit.data.datamodule import TranscriptionDataModule
from medlit.model import backbone as language_model
from medlit.model.memory import Recomputation, footprint
from medlit.model.settings import Backbone

SWITCH = "UNSLOTH_BLOCK_COMPILE"
NOTES = 6


def compare(model: nn.Module, backbone: Backbone, data: TranscriptionDataModule) -> list[dict[str, Any]]:
    """Relative differences from the plain way, of the loss and of all gradients together (by their norm).

    The adapter's B, which begins at 0 and would leave A without gradient, is random meanwhile.
    """
    rows = [dict(data.rows("train")[i], row=i) for i in range(NOTES)]
    tokens = sum(map(data.collator.supervised, rows))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    device = next(iter(trained.values())).device
    inner = language_model.causal_lm(model)
    takes = footprint(inner.config, 0, 0)
    draw = torch.Generator(device).manual_seed(0)
    for name, p in trained.items():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.01, generator=draw)
    language_model.train_mode(model, backbone)

    def run(parts: list[list[Any]], *, packed: bool, again: bool = False) -> tuple[float, list[Tensor]]:
        os.environ[SWITCH] = "1" if packed else "0"
        loss = 0.0
        for part in parts:
            batch = (data.collator.packed if packed else data.collator.train)(part, tokens)
            moved = {name: x.to(device) for name, x in batch._asdict().items() if isinstance(x, Tensor)}
            batch = batch._replace(**moved)
            kept = 1 if again else takes.layers
            choice = Recomputation(inner.model.layers, takes, takes.peak(batch.input_ids.numel(), kept))
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                share = language_model.loss_sum(model, batch, choice) / tokens
            share.backward()
            loss += float(share.detach())
        found = [p.grad.float().clone() for p in trained.values() if p.grad is not None]
        model.zero_grad(set_to_none=True)
        return loss, found

    loss, plain = run([rows], packed=False)
    norm = sum(float((g**2).sum()) for g in plain) ** 0.5
    table = []
    for way, (other, found) in {
        "plain, again": run([rows], packed=False),
        "plain, one note at a time": run([[row] for row in rows], packed=False),
        "packed and compiled": run([rows], packed=True),
        "packed and compiled, computed again": run([rows], packed=True, again=True),
    }.items():
        error = sum(float(((ours - theirs) ** 2).sum()) for ours, theirs in zip(found, plain, strict=True)) ** 0.5
        table.append({"way": way, "loss": other / loss - 1, "gradient": error / norm})
    os.environ[SWITCH] = "1"
    with torch.no_grad():
        for name, p in trained.items():
            p.copy_(before[name])
    return table
