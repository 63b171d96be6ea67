"""Train a model split over several GPUs in a plain loop, with Unsloth alone: the peers of `offload.py`.

    python benchmarks/offload_peers.py balanced MODEL BATCHES.json OUT.json --gib 24
    UNSLOTH_FSDP2=native torchrun --nproc-per-node 2 benchmarks/offload_peers.py fsdp2 ...

`balanced` is `device_map="unsloth_balanced"`: each GPU holds a share of the layers, and they work in turn. `fsdp2` is
Unsloth's `shard_model`: each GPU holds a part of every layer and gathers a layer when it is needed.

BATCHES.json is a list of optimizer steps, each a list of the tokens of its micro-batches; with several processes each
takes every so many of them. A micro-batch is one row of random tokens, whose notes are not kept apart, so the peers do
without what packing costs. Settings are the recipe's: LoRA r 16 in all projections, Unsloth's checkpointing.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

GIB = 2**30
SYSTEMS = ("balanced", "fsdp2")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SUPERVISED = 16  # tokens of a row: the answers of some notes


def main() -> None:
    """Train and write what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", choices=SYSTEMS)
    parser.add_argument("model", type=Path)
    parser.add_argument("batches", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--gib", type=float, required=True, help="of each GPU's memory")
    options = parser.parse_args()
    os.environ["UNSLOTH_FSDP2_LAYOUT"] = "sharded"  # the GPU of the benchmark may hold more than --gib
    from unsloth import FastLanguageModel  # isort: skip - before torch
    import torch

    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    cuda, local = torch.cuda.is_available(), int(os.environ.get("LOCAL_RANK", "0"))
    balanced = options.system == "balanced"
    used = range(torch.cuda.device_count()) if balanced else [local]
    found: dict[str, Any] = {"how": options.system, "gpus": ranks if not balanced else max(1, len(used))}
    where: dict[str, Any] = {"device_map": {"": local if cuda else "cpu"}}
    if balanced and cuda:
        most = {gpu: int(options.gib * GIB) for gpu in used}
        where = {"device_map": "unsloth_balanced", "device_map_planner_kwargs": {"max_memory": most}}
        limit(used, options.gib)
    began = time.perf_counter()
    model, _ = FastLanguageModel.from_pretrained(
        str(options.model),
        use_exact_model_name=True,
        max_seq_length=8192 if cuda else 512,
        dtype=torch.bfloat16 if cuda else torch.float32,
        load_in_4bit=True,
        use_gradient_checkpointing="unsloth",
        **where,
    )
    model = FastLanguageModel.get_peft_model(
        model, r=16, lora_alpha=16, target_modules=TARGETS, use_gradient_checkpointing="unsloth", random_state=3407
    )
    if balanced and cuda:
        join_last_layer_and_norm(model.get_base_model().model)
    found["loading_seconds"] = round(time.perf_counter() - began, 1)
    found["loading_gib"] = peaks(used) if cuda else []
    if not balanced:
        from unsloth.models.fsdp2_native import shard_model

        model = shard_model(model)
        if cuda:  # loading is whole, whatever the limit; training is not
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            limit(used, options.gib)
    found |= train(model, json.loads(options.batches.read_text()), rank, ranks)
    found["peak_gib"] = peaks(used) if cuda else []
    if rank == 0:
        options.output.write_text(json.dumps(found), encoding="utf-8")


def join_last_layer_and_norm(body: Any) -> None:  # noqa: ANN401 - of transformers
    """Have the last layer's output and the final norm on one GPU; Unsloth calls that norm without accelerate's hook."""
    device = next(body.layers[-1].parameters()).device
    print(f"last layer on {device}, final norm on {body.norm.weight.device}", flush=True)
    body.norm.to(device)

    def move(_layer: Any, _inputs: Any, output: Any) -> Any:  # noqa: ANN401 - of the layer
        return (output[0].to(device), *output[1:]) if isinstance(output, tuple) else output.to(device)

    body.layers[-1].register_forward_hook(move)


def limit(gpus: Any, gib: float) -> None:  # noqa: ANN401 - numbers
    """Let this process allocate no more on each of these GPUs."""
    import torch

    for gpu in gpus:
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib * GIB / torch.cuda.mem_get_info(gpu)[1]), gpu)


def peaks(gpus: Any) -> list[float]:  # noqa: ANN401 - numbers
    """Most GiB in use on each GPU."""
    import torch

    return [round(torch.cuda.max_memory_allocated(gpu) / GIB, 2) for gpu in gpus]


def train(model: Any, steps: list[list[int]], rank: int, ranks: int) -> dict[str, Any]:  # noqa: ANN401 - of PEFT
    """Time the steps, each ended by all GPUs."""
    import torch

    model.train()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=2e-4)
    device = next(p.device for p in model.get_input_embeddings().parameters())
    draw = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    seconds, losses = [], []
    for step in steps:
        begin = time.perf_counter()
        rows = [torch.randint(vocabulary // 2, (1, tokens), generator=draw) for tokens in step]
        mine, loss_sum = rows[rank::ranks], 0.0
        for place, row in enumerate(mine):
            ids = row.to(device)
            labels = torch.full_like(ids, -100)
            labels[:, -SUPERVISED:] = ids[:, -SUPERVISED:]
            if ranks > 1:  # gradients are exchanged once a step
                model.set_requires_gradient_sync(place == len(mine) - 1)
            with torch.autocast(device.type, torch.bfloat16):
                loss = model(input_ids=ids, labels=labels).loss / len(mine)
            loss.backward()
            loss_sum += float(loss.detach())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for gpu in range(torch.cuda.device_count()):
            torch.cuda.synchronize(gpu)
        seconds.append(round(time.perf_counter() - begin, 3))
        losses.append(round(loss_sum, 4))
        print(f"{seconds[-1]:.2f} s, loss {losses[-1]}", flush=True)
    return {"seconds": seconds, "losses": losses, "tokens": [sum(step) for step in steps]}


if __name__ == "__main__":
    main()
