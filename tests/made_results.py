"""Results of made-up systems."""

from __future__ import annotations

import numpy as np

from medlit.evaluation.results import Results

NAMES = ("Bones", "Heart", "Nerves")


def make_results(
    truth: list[int],
    answer: list[int],
    probabilities: list[list[float]] | None = None,
    texts: list[str] | None = None,
    names: tuple[str, ...] = NAMES,
) -> Results:
    n = len(truth)
    return Results(
        names=names,
        rows=np.arange(n),
        ids=[f"note-{i}" for i in range(n)],
        text_hashes=texts or [f"{i:032x}" for i in range(n)],
        truth=np.array(truth),
        answer=np.array(answer),
        probabilities=None if probabilities is None else np.array(probabilities, dtype=float),
        tokens=np.full(n, 9),
        cut_tokens=np.zeros(n, dtype=np.int64),
        accepted=[[label] for label in truth],
    )


def random_results(n: int = 200, k: int = 5, seed: int = 0, signal: float = 2.0) -> Results:
    """Answers of a made-up system, some notes having one text."""
    draw = np.random.default_rng(seed)
    truth = draw.integers(0, k, n)
    scores = draw.normal(size=(n, k)) + signal * np.eye(k)[truth]
    p = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    texts = [f"text-{i}" for i in draw.integers(0, n, n)]
    names = tuple(f"specialty {i}" for i in range(k))
    return make_results(truth.tolist(), p.argmax(axis=1).tolist(), p.tolist(), texts, names)
