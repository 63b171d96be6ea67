"""Labels that may be wrong: confident learning (Northcutt et al., 2021, arXiv:1911.00068) with a quick TF-IDF model.

The model scores each text without having seen it or its near duplicates. A label's threshold is its mean probability
over its own texts; a text is placed under the most probable of the labels that reach theirs. If it does not carry that
label, it is probably mislabelled. Two labels that get many of each other's texts are hard to tell apart.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import SGDClassifier
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.multiclass import OneVsRestClassifier

from medlit.errors import report_if_slow
from medlit.evaluation.results import BoolArray, FloatArray, IntArray

FEWEST = 3  # texts of a label, and for each label of a table on average
MOST_PAIRS = 400_000  # texts x labels, in half a minute; of a larger table evenly spaced texts are checked
LABELS_CHECKED = int((MOST_PAIRS // FEWEST) ** 0.5)  # more would have under `FEWEST` texts each in `MOST_PAIRS`
_CONFUSED, _MIXED = 0.25, 5  # least share and number of two labels' texts under the other one; 0.5 is chance


def label_errors(notes: pd.DataFrame, transcriptions: Sequence[str], ids: Sequence[str]) -> dict[str, Any] | None:
    """Check N notes, given the number of each one's `text` and of its group of `near` duplicates, and its `own` labels.

    Returns the number of `texts` checked, `agreement`, the share whose most probable label is one of theirs, the
    `confused` pairs of labels, and the `mislabelled` notes, the likeliest first; None if the texts are too few.
    """
    notes = notes.loc[notes["own"].astype(bool), ["text", "near", "own"]].reset_index(names="row")
    labels, texts = notes["own"].explode().nunique(), notes["text"].unique()
    checked = np.linspace(0, len(texts) - 1, min(len(texts), MOST_PAIRS // max(labels, 1))).astype(np.int64)
    notes = notes[notes["text"].isin(texts[checked])]
    carried = notes.explode("own").groupby(["text", "own"]).size().unstack(fill_value=0) > 0  # texts x labels
    carried = carried.loc[:, carried.sum() >= FEWEST]
    first = notes.drop_duplicates("text").set_index("text").loc[carried.index]
    if carried.shape[1] < 2 or first["near"].nunique() < FEWEST * labels:
        return None
    own, names = carried.to_numpy(), carried.columns.tolist()
    with report_if_slow(f"looking for label errors in {len(first):,} texts"):
        scores = cross_fit([transcriptions[row] for row in first["row"].tolist()], own, first["near"].to_numpy())
    placed, counts = confident_joint(scores, own)

    mixed = np.triu(counts + counts.T, 1)  # texts of one of two labels under the other one
    share = mixed / np.maximum(1, mixed + counts.diagonal() + counts.diagonal()[:, None])
    alike = (mixed >= _MIXED) & (share >= _CONFUSED)
    pairs = sorted(np.argwhere(alike).tolist(), key=lambda pair: -share[*pair])
    confused = [{"labels": [names[a], names[b]], "texts": int(mixed[a, b]), "share": share[a, b]} for a, b in pairs]

    # Of confused labels the pair is the finding, not its texts.
    wrong = own.any(axis=1) & placed.any(axis=1) & ~(placed & (own | (own @ (alike | alike.T)))).any(axis=1)
    found, positions = [], carried.index.get_indexer(pd.Index(notes["text"]))
    for row, i, given in zip(notes["row"].tolist(), positions, notes["own"], strict=True):
        if wrong[i]:
            label, likely = placed[i].argmax(), [scores[i, names.index(name)] for name in given if name in names]
            note = {"id": ids[row], "given": [*given], "p_given": float(max(likely, default=0))}
            found.append(note | {"suggested": names[label], "p_suggested": float(scores[i, label])})
    found.sort(key=lambda note: note["p_given"] - note["p_suggested"])
    agreement = float(own[np.arange(len(own)), scores.argmax(axis=1)].mean())
    return {"texts": len(own), "agreement": agreement, "confused": confused, "mislabelled": found}


def cross_fit(texts: Sequence[str], own: BoolArray, groups: IntArray) -> FloatArray:
    """Probabilities of each label, (N, K), by models that were fitted without a text's group; one for each label."""
    # Signs are words too, so that no text is without any.
    words = TfidfVectorizer(token_pattern=r"\w+|[^\w\s]+", sublinear_tf=True, max_features=50_000).fit_transform(texts)
    model = OneVsRestClassifier(SGDClassifier(loss="log_loss", class_weight="balanced", random_state=0))
    folds = GroupKFold(5, shuffle=True, random_state=0).split(own, groups=groups)
    with warnings.catch_warnings(action="ignore"):  # a label that a fold's training texts lack has probability 0 there
        return np.asarray(cross_val_predict(model, words, own.astype(int), cv=folds, method="predict_proba"))


def confident_joint(scores: FloatArray, own: BoolArray) -> tuple[BoolArray, IntArray]:
    """The label that each text is placed under, if any, one-hot (N, K); counts of given x placed labels, (K, K)."""
    reached = np.where(scores >= (scores * own).sum(axis=0) / own.sum(axis=0), scores, -1.0)
    placed = (reached >= 0) & (np.arange(own.shape[1]) == reached.argmax(axis=1)[:, None])
    # A text that is placed under one of its labels counts for that one only.
    return placed, np.where((placed & own).any(axis=1, keepdims=True), placed, own).astype(np.int64).T @ placed
