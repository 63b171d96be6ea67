"""What `SpecialtyPredictor` says of one note: a row of `medlit predict`'s table, without a name."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Prediction:
    """One note's answer; the names are those of the columns in `medlit.predictions.columns`.

    Attributes:
        specialty: where the note is to be filed; None: the answer is not on the list, or too doubtful (`abstained`).
        answer: what the model wrote.
        probability: of the answer, at the validation's temperature, 0 to 1; None in the mode 'generate', which weighs
            no labels.
        margin: how far the answer's probability lies above the runner-up's, in parts of 1; None as for `probability`.
        runner_up: the likeliest other specialty; None as for `probability`.
        abstained: whether the specialty is withheld because the probability is below `abstain_below`.
        cut_tokens: tokens of the note that did not fit, and that the model did not see.
    """

    specialty: str | None
    answer: str
    probability: float | None
    margin: float | None
    runner_up: str | None
    abstained: bool
    cut_tokens: int
