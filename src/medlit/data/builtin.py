"""The invented notes behind the quickstart: a seeded generator, no real clinical text.

A note is one invented case of a specialty (complaint, diagnosis, finding, procedure, plan) with a few lines that any
specialty may dictate (vital signs, consent, another illness in the history), laid out under the headings of a clinic
visit, an operation or a report:

    CHIEF COMPLAINT: 52-year-old man seen today for glare while driving at night. VITAL SIGNS: P 71, R 14, BP 122/80.

Training, validation and test notes come from disjoint pools of phrases (`builtin_phrases.py`), so a model is scored on
cases that it never saw: "trabeculectomy" in training, "phacoemulsification" in the test. What carries over is the
vocabulary of the field, which bag-of-words counts know in part and a pretrained language model knows better.

The notes are the same on every machine and Python version: only `random.Random.random` draws, whose sequence for a
seed the standard library guarantees.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from medlit.data.builtin_phrases import CASES, GENERIC
from medlit.errors import UserError

SPECIALTIES: tuple[str, ...] = tuple(CASES)

_T = TypeVar("_T")
_SLOT = re.compile(r"\{([^{}]+)\}")
_ATTEMPTS = 200  # draws for one note before its pool counts as used up
# Characters of a note, about 25 to 110 tokens of SmolLM2: the quickstart trains at 250 tokens a second on two cores.
_LENGTHS = range(90, 341)


@dataclass(frozen=True)
class _Section:
    """One section of a layout: it is dictated with probability `chance` under one of its headings."""

    headings: tuple[str, ...]
    slot: str
    chance: float = 1.0


_ALLERGIES = _Section(("ALLERGIES",), "allergies", 0.2)
_HISTORY = _Section(("PAST MEDICAL HISTORY", "FAMILY HISTORY", "PAST HISTORY"), "history", 0.4)
_RELATIVES = _Section(("FAMILY HISTORY",), "history", 0.4)
_PLANNED = _Section(("PROCEDURE PLANNED", "PROCEDURE"), "procedure", 0.2)
_TREATMENT = _Section(("TREATMENT", "SERVICES"), "procedure", 0.2)
_PLAN = _Section(("PLAN", "RECOMMENDATIONS", "DISPOSITION"), "plan", 0.45)


def _clinic(history: tuple[_Section, ...], procedure: _Section) -> tuple[_Section, ...]:
    """The layout of a visit; what was asked of the past and what is done about it differ by specialty."""
    return (
        _Section(("CHIEF COMPLAINT", "HISTORY OF PRESENT ILLNESS", "SUBJECTIVE", "REASON FOR VISIT"), "opening"),
        *history,
        _Section(("VITAL SIGNS", "VITALS"), "vitals", 0.4),
        _Section(("OBJECTIVE", "PERTINENT FINDINGS", "EXAMINATION"), "finding"),
        _Section(("ASSESSMENT", "IMPRESSION", "DIAGNOSIS"), "diagnosis", 0.3),
        procedure,
        _PLAN,
    )


_OPERATION = (
    _Section(("PREOPERATIVE DIAGNOSIS", "POSTOPERATIVE DIAGNOSIS", "DIAGNOSIS"), "diagnosis"),
    _Section(("PROCEDURE PERFORMED", "OPERATION", "PROCEDURE"), "procedure"),
    _Section(("ANESTHESIA",), "anesthesia", 0.4),
    _Section(("INDICATION", "BRIEF HISTORY"), "opening", 0.3),
    _HISTORY,
    _Section(("FINDINGS", "PERTINENT FINDINGS"), "finding", 0.8),
    _Section(("CONSENT", "DESCRIPTION"), "consent", 0.2),
    _Section(("ESTIMATED BLOOD LOSS",), "blood_loss", 0.35),
    _Section(("COMPLICATIONS",), "complications", 0.4),
    _Section(("DISPOSITION", "PLAN"), "plan", 0.4),
)
_REPORT = (
    _Section(("INDICATION", "CLINICAL HISTORY", "REASON FOR STUDY"), "opening"),
    _Section(("EXAMINATION", "PROCEDURE", "STUDY"), "procedure"),
    _Section(("COMPARISON",), "comparison", 0.4),
    _HISTORY,
    _Section(("FINDINGS", "INTERPRETATION"), "finding"),
    _Section(("IMPRESSION", "CONCLUSION"), "diagnosis", 0.4),
    _PLAN,
)

# A talk with a psychiatrist has no blood loss, a chest film no vital signs, an infant only its relatives' illnesses.
_INFANTS = "Pediatrics - Neonatal"
_LAYOUTS: dict[str, tuple[tuple[_Section, ...], ...]] = {
    name: (_clinic((_HISTORY, _ALLERGIES), _PLANNED), _OPERATION) for name in SPECIALTIES
} | {
    "Neurology": (_clinic((_HISTORY, _ALLERGIES), _TREATMENT), _REPORT),
    "Psychiatry / Psychology": (_clinic((_HISTORY, _ALLERGIES), _TREATMENT),),
    _INFANTS: (_clinic((_RELATIVES,), _TREATMENT),),
    "Radiology": (_REPORT,),
}
_PEOPLE: dict[str, str] = dict.fromkeys(SPECIALTIES, "{34-79}-year-old {man|woman}") | {
    "Obstetrics / Gynecology": "{20-44}-year-old woman",
    "Psychiatry / Psychology": "{20-59}-year-old {man|woman}",
}


@dataclass(frozen=True)
class _Pool:
    """The phrases of one specialty in one split: whole cases, and the lines that any case may take."""

    cases: tuple[dict[str, str], ...]
    lines: dict[str, tuple[str, ...]]


def builtin_notes(
    seed: int = 3407, train: int = 650, validation: int = 65, test: int = 143
) -> dict[str, list[dict[str, str]]]:
    """Invent labelled notes; the same arguments give the same notes on every machine.

    A split's first n notes do not depend on how many more are asked for, nor on the size of the other splits.

    Args:
        seed: any whole number.
        train: notes in the training split; specialties are balanced to within one note, here and in the other two.
        validation: notes in the validation split.
        test: notes in the test split.

    Returns:
        Split name (train, validation, test) -> rows with the columns id, transcription and medical_specialty. No
        transcription occurs twice.

    Raises:
        UserError: a size is negative, or larger than the number of different notes that the pools hold.
    """
    seen: set[str] = set()
    sizes = {"train": train, "validation": validation, "test": test}
    return {split: _rows(seed, split, size, seen) for split, size in sizes.items()}


def _rows(seed: int, split: str, size: int, seen: set[str]) -> list[dict[str, str]]:
    if size < 0:
        raise UserError(f"data.source builtin: {split} asks for {size} notes; give a number of at least 0.")
    rng = random.Random(f"medlit/{seed}/{split}")
    rows: list[dict[str, str]] = []
    while len(rows) < size:
        for specialty in _shuffled(rng, SPECIALTIES)[: size - len(rows)]:
            text = _unseen_note(rng, specialty, split, seen)
            row_id = f"{split}-{len(rows):05d}"
            rows.append({"id": row_id, "transcription": text, "medical_specialty": specialty})
    return rows


def _unseen_note(rng: random.Random, specialty: str, split: str, seen: set[str]) -> str:
    for _ in range(_ATTEMPTS):
        text = _note(rng, specialty, split)
        if len(text) in _LENGTHS and text not in seen:
            seen.add(text)
            return text
    raise UserError(f"data.source builtin: the {split} phrases give no more new notes; ask for fewer {split} notes.")


def _note(rng: random.Random, specialty: str, split: str) -> str:
    pool = _pool(specialty, split)
    case = _pick(rng, pool.cases)
    sections = []
    # Part of the public transcriptions were exported with commas where their lines ended; so are some of these.
    after_heading, between = (": , ", ",") if rng.random() < 0.2 else (": ", " ")
    for section in _pick(rng, _LAYOUTS[specialty]):
        if rng.random() < section.chance:
            phrase = case[section.slot] if section.slot in case else _pick(rng, pool.lines[section.slot])
            if section.slot == "opening":
                phrase = phrase.format(person=_pick(rng, pool.lines["person"]), complaint=case["complaint"])
            text = _fill(rng, phrase)
            sections.append(f"{_pick(rng, section.headings)}{after_heading}{text[0].upper()}{text[1:]}.")
    return between.join(sections)


@functools.cache
def _pool(specialty: str, split: str) -> _Pool:
    """Parse the phrases of one specialty and split out of their tables."""
    table = [line.strip() for line in CASES[specialty][split].strip().splitlines()]
    cases = []
    for first, second, plan in zip(table[::3], table[1::3], table[2::3], strict=True):
        (complaint, diagnosis), (finding, procedure) = first.split("; "), second.split("; ")
        cases.append(dict(complaint=complaint, diagnosis=diagnosis, finding=finding, procedure=procedure, plan=plan))
    generic, infants = GENERIC[split], specialty == _INFANTS
    people = generic["infant"] if infants else (_PEOPLE[specialty],)
    vitals = generic["infant_vitals" if infants else "vitals"]
    return _Pool(tuple(cases), generic | {"person": people, "vitals": vitals})


def _fill(rng: random.Random, phrase: str) -> str:
    """Replace every `{a|b}` by one of its choices and every `{low-high}` by a number of that range."""
    return _SLOT.sub(lambda match: _value(rng, match[1]), phrase)


def _value(rng: random.Random, slot: str) -> str:
    if "|" in slot:
        return _pick(rng, slot.split("|"))
    low, high = slot.split("-")
    if "." not in low:
        return str(int(low) + int(rng.random() * (int(high) - int(low) + 1)))
    # Counted in tenths: whole numbers round alike everywhere.
    tenths_low, tenths_high = (int(end.replace(".", "")) for end in (low, high))
    tenths = tenths_low + int(rng.random() * (tenths_high - tenths_low + 1))
    return f"{tenths // 10}.{tenths % 10}"


def _pick(rng: random.Random, items: Sequence[_T]) -> _T:
    return items[int(rng.random() * len(items))]


def _shuffled(rng: random.Random, items: Sequence[_T]) -> list[_T]:
    keyed = [(rng.random(), position) for position in range(len(items))]
    return [items[position] for _, position in sorted(keyed)]
