"""Whether two runs ended alike: weights, optimizer, schedule and sampler to the bit, and every point of every curve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

Weights = dict[str, torch.Tensor]
PARTS = ("state_dict", "optimizer_states", "lr_schedulers", "TranscriptionDataModule", "global_step", "epoch")
# How fast a run was, by means over the last steps of this process, is no part of how it ended.
CLOCKED = {"train/tokens_per_second", "train/notes_per_second", "train/padding"}
ADAPTER = ("adapter_model.safetensors", "adapter_config.json", "medlit.json")


def last_checkpoint(run: Path) -> dict[str, Any]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def differences(ours: Path, theirs: Path) -> list[str]:
    """What differs between two run folders, by name; nothing where one is as good as the other."""
    left, right = last_checkpoint(ours), last_checkpoint(theirs)
    found = [f"{part}{name}" for part in PARTS for name in _unequal(_flat(left[part]), _flat(right[part]))]
    stopping = next(key for key in left["callbacks"] if key.startswith("EarlyStopping"))
    found += _unequal(_flat(left["callbacks"][stopping]), _flat(right["callbacks"].get(stopping)))
    found += _unequal(curves(ours), curves(theirs))
    return found + [
        name for name in ADAPTER if (ours / "adapter" / name).read_bytes() != (theirs / "adapter" / name).read_bytes()
    ]


def curves(run: Path) -> dict[str, object]:
    """`tag/step` -> its value; a step that was trained again has to have come out the same."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    points: dict[str, object] = {}
    for file in sorted(run.glob("events.out.tfevents.*")):
        events = EventAccumulator(str(file))
        events.Reload()
        for tag in set(events.Tags()["scalars"]) - CLOCKED:
            for event in events.Scalars(tag):
                name = f"{tag}/{event.step}"
                points[name] = event.value if points.get(name, event.value) == event.value else "not always the same"
    return points


def scalars(run: Path, tag: str) -> list[float]:
    """One curve, in the order of its steps; of a step that was trained again the last point."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    points: dict[int, float] = {}
    for file in sorted(run.glob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime_ns):
        events = EventAccumulator(str(file))
        events.Reload()
        points |= {event.step: event.value for event in events.Scalars(tag)} if tag in events.Tags()["scalars"] else {}
    return [points[step] for step in sorted(points)]


def _flat(value: object, name: str = "") -> dict[str, object]:
    """Every leaf by its path."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else None
    if items is None:
        return {name: value}
    return {path: leaf for key, part in items for path, leaf in _flat(part, f"{name}/{key}").items()}


def _unequal(ours: dict[str, object], theirs: dict[str, object]) -> list[str]:
    def same(one: object, other: object) -> bool:
        return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other  # type: ignore[arg-type]

    return sorted(name for name in ours.keys() | theirs.keys() if not same(ours.get(name), theirs.get(name)))


def far(ours: Weights, theirs: Weights) -> float:
    """Distance of two gradients, relative to their length."""
    assert ours.keys() == theirs.keys()
    length = torch.cat([value.flatten() for value in theirs.values()]).norm()
    return float(torch.cat([(ours[name] - theirs[name]).flatten() for name in ours]).norm() / length)
