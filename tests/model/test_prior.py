"""The TF-IDF prior: its scores are ridge regression's, its power is chosen by validation, its file holds no text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from safetensors import safe_open
from safetensors.numpy import save_file

from medlit.data.collate import Collator, unnamed_rows
from medlit.data.labels import LabelSet
from medlit.errors import UserError
from medlit.evaluation.results import FloatArray, IntArray, Results
from medlit.model.decoding.likelihood import Answers, apply_prior, apply_temperature
from medlit.model.prior import TokenPrior

LABELS = LabelSet(("Cardiology", "Neurology", "Urology"))


def notes(n: int = 60, k: int = 3, seed: int = 0) -> Dataset:
    """N notes of 8 to 30 tokens after an instruction of two; each label has tokens that are frequent in its notes."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % k
    words = [rng.integers(10, 60, rng.integers(8, 30)) for _ in labels]
    texts = [np.where(rng.random(len(w)) < 0.3, 100 + 7 * label, w) for w, label in zip(words, labels, strict=True)]
    names = [LABELS.names[label] for label in labels]
    return Dataset.from_dict(
        {
            "input_ids": [[1, 2, *text.tolist()] for text in texts],
            "specialty": names,
            "specialties": [[name] for name in names],
        }
    )


def truth_of(rows: Dataset) -> IntArray:
    return np.array([LABELS.names.index(name) for name in rows["specialty"]])


def fitted(rows: Dataset, labels: LabelSet = LABELS) -> TokenPrior:
    prior = TokenPrior.fit(rows, labels)
    assert prior is not None
    return prior


def results(probabilities: FloatArray, truth: IntArray) -> Results:
    n, zeros = len(truth), np.zeros(len(truth), dtype=np.int64)
    ids = [str(i) for i in range(n)]
    answer, own = probabilities.argmax(1), truth[:, None].tolist()
    return Results(LABELS.names, np.arange(n), ids, ids, truth, answer, probabilities, zeros, zeros, own)


@pytest.mark.parametrize("k", [2, 3])
def test_scores_are_those_of_ridge_regression(k: int) -> None:
    train, new = notes(60, k), notes(20, k, seed=1)
    train = train.select([*range(60), *range(0, 60, k)])  # one label has twice the notes
    prior = fitted(train)

    def table(rows: Dataset) -> FloatArray:
        """TF-IDF by counting in dictionaries."""
        column = {feature: i for i, feature in enumerate(prior.features.tolist())}
        x = np.zeros((len(rows), len(column)))
        for i, tokens in enumerate(rows["input_ids"]):
            for feature in [*tokens[2:], *(-1 - token for token in tokens[2:32])]:
                if feature in column:
                    x[i, column[feature]] += 1
        x[x > 0] = 1 + np.log(x[x > 0])
        x *= prior.idf
        return x / np.linalg.norm(x, axis=1, keepdims=True)  # type: ignore[no-any-return]

    # Minimise sum over notes of w |x W + b - y|^2 + 0.3 |W|^2, labels having equal weight: the normal equations.
    truth = truth_of(train)
    w = (len(truth) / k / np.bincount(truth))[truth]
    x = np.hstack([table(train), np.ones((len(train), 1))])
    penalty = 0.3 * np.diag([*np.ones(x.shape[1] - 1), 0])
    solution = np.linalg.solve(x.T @ (w[:, None] * x) + penalty, x.T @ (w[:, None] * np.eye(3)[truth]))
    wanted = 10 * np.hstack([table(new), np.ones((20, 1))]) @ solution
    ours = prior.of_rows(new)
    assert ours[:, :k] - ours[:, :1] == pytest.approx(wanted[:, :k] - wanted[:, :1], abs=0.05)
    assert np.exp(ours[:, k:]).max(initial=0) < 1e-4, "a label without training notes is all but excluded"
    assert np.exp(ours).sum(axis=1) == pytest.approx(np.ones(20))


def test_prompts_get_the_probabilities_of_their_rows() -> None:
    prior, rows = fitted(notes()), notes(7, seed=1)
    prompts = unnamed_rows([(ids, 0) for ids in rows["input_ids"]])  # type: ignore[arg-type]
    batch = Collator(lambda name: [0], pad_id=0).prompts(prompts)
    assert prior.of_prompts(batch) == pytest.approx(prior.of_rows(rows))


def test_features_are_in_several_notes_but_not_in_all() -> None:
    """So no word that only one patient's note has is in the file."""
    ids = [[1, 2, 5, 6, 4], [1, 2, 5, 7, 4], [1, 2, 8, 9, 4], [1, 2, 8, 10, 4]]
    names = ["Cardiology", "Cardiology", "Urology", "Urology"]
    rows = Dataset.from_dict({"input_ids": ids, "specialty": names, "specialties": [[name] for name in names]})
    assert fitted(rows).features.tolist() == [-9, -6, 5, 8]


def test_the_beginning_of_a_note_counts_for_itself() -> None:
    """Two kinds of note with the same tokens, which one begins with and the other ends with; no instruction counts."""
    filler = list(range(50, 90))
    title, end = [[7, 3], filler], [filler, [7, 3]]
    ids = [[7, 2, *(token for part in (title, end)[i % 2] for token in part), 100 + i // 4] for i in range(16)]
    names = [LABELS.names[i % 2] for i in range(16)]
    rows = Dataset.from_dict({"input_ids": ids, "specialty": names, "specialties": [[name] for name in names]})
    prior = fitted(rows)
    assert {~7, ~3} <= set(prior.features.tolist())
    assert prior.start == 2
    assert prior.of_rows(rows).argmax(axis=1).tolist() == truth_of(rows).tolist()


def test_a_note_with_several_labels_is_an_answer_for_each() -> None:
    rows = notes(30)
    both = rows.to_dict()
    both["specialties"] = [[*names, "Urology"] if "Cardiology" in names else names for names in both["specialties"]]
    assert fitted(rows).of_rows(rows)[0, 2] < fitted(Dataset.from_dict(both)).of_rows(rows)[0, 2]


def test_one_label_needs_no_prior() -> None:
    assert TokenPrior.fit(notes(12, k=1), LABELS) is None


@pytest.mark.parametrize("last", [5, 6], ids=["equal", "nothing in common"])
def test_notes_that_no_word_tells_apart_need_no_prior(last: int) -> None:
    names = ["Cardiology", "Urology"]
    rows = {"input_ids": [[1, 2, 5], [1, 2, last]], "specialty": names, "specialties": [[name] for name in names]}
    assert TokenPrior.fit(Dataset.from_dict(rows), LABELS) is None


def test_tokens_of_a_single_text_are_left_out_even_if_it_occurs_twice() -> None:
    rows = notes()
    own, twice = 777, {**rows[0], "input_ids": [*rows[0]["input_ids"], 777]}
    prior = fitted(concatenate_datasets([rows, Dataset.from_list([twice, twice], features=rows.features)]))
    assert own not in prior.features
    again = {**rows[1], "input_ids": [*rows[1]["input_ids"], own]}
    prior = fitted(concatenate_datasets([rows, Dataset.from_list([twice, again], features=rows.features)]))
    assert own in prior.features


def test_a_saved_prior_is_the_same_and_holds_no_text(tmp_path: Path) -> None:
    rows = notes()
    prior = fitted(rows)
    prior, _ = prior.with_power(results(np.full((60, 3), 1 / 3), truth_of(rows)), prior.of_rows(rows))
    prior.save(tmp_path / "prior.safetensors")
    loaded = TokenPrior.load(tmp_path / "prior.safetensors")
    assert loaded.power == prior.power
    with safe_open(tmp_path / "prior.safetensors", "np") as file:
        assert set(file.keys()) == {"features", "idf", "weights", "bias"}
    assert np.array_equal(loaded.of_rows(rows), prior.of_rows(rows))


@pytest.mark.parametrize("kind", ["damaged", "earlier"])
def test_another_file_is_refused(tmp_path: Path, kind: str) -> None:
    """Earlier priors had hashed pairs of tokens."""
    path = tmp_path / "prior.safetensors"
    path.write_bytes(b"other")
    if kind == "earlier":
        names = ("buckets", "idf", "weights", "bias")
        save_file({name: np.zeros((1, 1)) for name in names}, path, metadata={"power": "1.0"})
    with pytest.raises(UserError, match="is damaged or outdated; copy it again, or fit again"):
        TokenPrior.load(path)


def test_validation_chooses_how_much_the_prior_counts() -> None:
    rows = notes(90, seed=2)
    truth, prior = truth_of(rows), fitted(notes())
    knows = 0.8 * np.eye(3)[truth] + 0.2 / 3
    knows[::7] = knows[::7][:, [1, 2, 0]]  # and is sometimes wrong, as sure as ever
    guesses = np.random.default_rng(0).dirichlet(np.ones(3), 90)
    trusted, mixed = prior.with_power(results(guesses, truth), prior.of_rows(rows))
    assert trusted.power > 5
    assert mixed.correct.mean() == pytest.approx((prior.of_rows(rows).argmax(axis=1) == truth).mean(), abs=0.05)
    shuffled = rows.select(np.random.default_rng(0).permutation(90))
    doubted, _ = prior.with_power(results(knows, truth), prior.of_rows(shuffled))
    assert doubted.power < 0.3


def test_answers_follow_the_product() -> None:
    nats = torch.tensor([[-1.0, -2.0, -9.0], [-1.0, -2.0, -9.0]])
    answers = Answers(torch.tensor([0, 0]), ["Cardiology"] * 2, nats.softmax(1), nats, nats)
    prior = np.array([[0.0, 0.5, 0.0], [0.0, 3.0, 0.0]])
    product = apply_prior(answers, prior, LABELS.names)
    assert product.label_ids.tolist() == [0, 1]
    assert product.texts == ["Cardiology", "Neurology"]
    assert product.probabilities is not None
    assert torch.allclose(product.probabilities, (nats + torch.tensor(prior)).softmax(1).float())
    assert product.label_nats is nats, "the loss is the language model's own"


def test_a_temperature_undoes_the_power_of_a_prior() -> None:
    """At a power of 30 the second label's share, e^-3 of the prior, is e^-90: 0 in float32, and 0.05 at 30."""
    nats, prior = torch.zeros(1, 3), np.array([[0.0, -3.0, -12.0]])
    product = apply_prior(
        Answers(torch.tensor([0]), ["Cardiology"], nats.softmax(1), nats, nats), 30 * prior, LABELS.names
    )
    wanted = torch.from_numpy(prior).softmax(1)
    found = apply_temperature(product, 30.0)
    torch.testing.assert_close(found.probabilities, wanted.float())
