"""What a table of predictions says of a note.

    id           text    the note's name in its table
    specialty    text    where it is to be filed; null: the answer is not on the list, or too doubtful (`abstained`)
    answer       text    what the model wrote
    probability  number  of the answer, at the validation's temperature, 0 to 1
    margin       number  how far the answer's probability lies above the runner-up's, in parts of 1
    runner_up    text    the likeliest other specialty
    abstained    truth   whether the specialty is withheld because the probability is below `abstain_below`
    cut_tokens   number  tokens of the note that the model did not see

Probability, margin and runner-up are null where the decoder weighs no labels, and for an answer that is no label. The
margin of a `constrained` answer can be below 0: token by token it need not find the likeliest label.
"""

from __future__ import annotations

from typing import Any

from medlit.data.collate import Prompts
from medlit.data.labels import LabelSet
from medlit.model.decoding import Answers

COLUMNS = ("id", "specialty", "answer", "probability", "margin", "runner_up", "abstained", "cut_tokens")
_DIGITS = 6  # of a probability: float32 has seven

Row = dict[str, Any]


def rows(prompts: Prompts, answers: Answers, label_set: LabelSet, abstain_below: float | None) -> list[Row]:
    """A batch's rows: the columns above, and before them `row`, the note's place in its table.

    Args:
        prompts: the B notes.
        answers: to them.
        label_set: the K labels.
        abstain_below: least probability of an answer that is filed; None files every one that is on the list.
    """
    found = []
    for place, label in enumerate(answers.label_ids.tolist()):
        listed = label < label_set.invalid
        probability, margin, runner_up = _sureness(answers, place, label, label_set) if listed else (None, None, None)
        abstained = abstain_below is not None and probability is not None and probability < abstain_below
        found.append(
            {
                "row": prompts.rows[place],
                "id": prompts.ids[place],
                "specialty": label_set.names[label] if listed and not abstained else None,
                "answer": answers.texts[place],
                "probability": None if probability is None else round(probability, _DIGITS),
                "margin": None if margin is None else round(margin, _DIGITS),
                "runner_up": runner_up,
                "abstained": abstained,
                "cut_tokens": prompts.cut_tokens[place],
            }
        )
    return found


def _sureness(
    answers: Answers, place: int, label: int, label_set: LabelSet
) -> tuple[float | None, float | None, str | None]:
    """Probability of a listed answer, its margin, and the runner-up."""
    if answers.probabilities is None:
        return None, None, None
    given = answers.probabilities[place].tolist()
    second = max((other for other in range(len(given)) if other != label), key=given.__getitem__)
    return given[label], given[label] - given[second], label_set.names[second]
