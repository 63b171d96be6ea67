"""Two losses for notes with several labels, compared with a linear model over TF-IDF, in seconds a fold.

    python benchmarks/several_labels.py --source a.csv b.csv --name "13 specialties"

`draw` is what a fit minimises on average when it trains on one of a note's labels at a time, drawn at random: the mean
of the labels' negative log-probabilities. `any` is the negative log of the sum of their probabilities. Five folds of
texts, each with all labels that it has in the tables, and two strengths of regularisation. Any-of accuracy: the most
probable label is one of the note's. Micro F1 of sets: of the labels above one threshold, the best one for each loss.

Adds to `results/several_labels.json`.
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.model_selection import KFold

RESULTS = Path(__file__).parent / "results" / "several_labels.json"
STRENGTHS = (30.0, 100.0)
THRESHOLDS = np.linspace(0.05, 0.6, 23)


def main() -> None:
    """Fit and score both losses; the table is printed as Markdown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--source", type=Path, nargs="+", required=True, help="CSV or Parquet tables")
    parser.add_argument("--name", required=True, help="of the tables in the results")
    parser.add_argument("--text", default="transcription")
    parser.add_argument("--label", default="medical_specialty")
    options = parser.parse_args()
    readers: dict[str, Any] = {".csv": pd.read_csv, ".parquet": pd.read_parquet}
    table = pd.concat([readers[path.suffix](path) for path in options.source]).dropna(subset=[options.text])
    labels = pd.get_dummies(table[options.label].str.strip()).groupby(table[options.text]).max()
    texts, truth = labels.index.to_numpy(), labels.to_numpy(dtype=np.float64)
    rows = [score(texts, truth, strength, loss) for strength in STRENGTHS for loss in ("draw", "any")]
    print("| C | loss | any-of accuracy | micro F1 of sets |\n| --- | --- | --- | --- |")
    for row in rows:
        print(f"| {row['c']:g} | `{row['loss']}` | {row['any_of']:.1%} | {row['set_f1_micro']:.3f} |")
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    results[options.name] = {"date": datetime.date.today().isoformat(), "texts": len(texts), "rows": rows}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def score(texts: np.ndarray, truth: np.ndarray, strength: float, loss: str) -> dict[str, Any]:
    """Scores of one loss over all folds."""
    found = np.zeros_like(truth)
    order = np.random.default_rng(0).permutation(len(texts))
    for train, test in KFold(5).split(order):
        found[order[test]] = answer(texts[order[train]], truth[order[train]], texts[order[test]], strength, loss)
    first = truth[np.arange(len(truth)), found.argmax(axis=1)]
    f1 = [2 * truth[found > t].sum() / ((found > t).sum() + truth.sum()) for t in THRESHOLDS]
    return {"c": strength, "loss": loss, "any_of": round(float(first.mean()), 4), "set_f1_micro": round(max(f1), 4)}


def answer(texts: np.ndarray, truth: np.ndarray, answered: np.ndarray, strength: float, loss: str) -> np.ndarray:
    """Probabilities of the labels, (answered, K), by a model that is fitted in the span of its notes."""
    vectorizer = TfidfVectorizer(sublinear_tf=True, min_df=2, ngram_range=(1, 2), max_features=60_000)
    known = vectorizer.fit_transform(texts)
    values, vectors = torch.linalg.eigh(torch.from_numpy((known @ known.T).toarray()))
    vectors, roots = vectors[:, values > 1e-9], values[values > 1e-9].sqrt()
    among = torch.from_numpy((vectorizer.transform(answered) @ known.T).toarray()) @ vectors / roots
    labels, features = torch.from_numpy(truth), vectors * roots
    weights = torch.zeros(len(roots), labels.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(labels.shape[1], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights, bias], max_iter=120, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        nats = (features @ weights + bias).log_softmax(dim=1)
        each = nats.masked_fill(labels == 0, -torch.inf).logsumexp(1)
        if loss == "draw":
            each = (nats * labels).sum(dim=1) / labels.sum(dim=1)
        total = 0.5 * (weights**2).sum() - strength * each.sum()
        total.backward()
        return float(total.detach())

    optimizer.step(closure)
    with torch.no_grad():
        return (among @ weights + bias).softmax(dim=1).numpy()


if __name__ == "__main__":
    main()
