"""Write the notes of `data.source: builtin`, `src/medlit/data/builtin/`: invented, no real clinical text.

    python benchmarks/builtin_notes.py

A note is one invented case of a specialty (complaint, diagnosis, finding, procedure, plan) with a few lines that fit
any specialty (vital signs, consent, medical history), laid out under the headings of a clinic visit, an operation or a
report:

    CHIEF COMPLAINT: 52-year-old man seen today for glare while driving at night. VITAL SIGNS: P 71, R 14, BP 122/80.

Training, validation and test notes come from disjoint pools of phrases (`phrases.yaml`), so a model is scored on cases
that it never saw: "trabeculectomy" in training, "phacoemulsification" in the test.

The notes are the same on every machine and Python version: every draw is `random.Random.random`, whose sequence for a
seed the standard library guarantees.
"""

import csv
import functools
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from medlit.errors import UserError

FOLDER = Path(__file__).parents[1] / "src" / "medlit" / "data" / "builtin"
SIZES = {"train": 650, "validation": 39, "test": 130}  # notes that the package ships
PHRASES: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("phrases.yaml").read_text(encoding="utf-8"))
SPECIALTIES: tuple[str, ...] = tuple(PHRASES["specialties"])

_T = TypeVar("_T")
_SLOT = re.compile(r"\{([^{}]+)\}")
_ATTEMPTS = 200  # draws for one note before its pool counts as exhausted
# Characters of a note, about 25 to 110 tokens of SmolLM2: the quickstart trains at 250 tokens a second on two cores.
_LENGTHS = range(90, 341)


def builtin_notes(
    seed: int = 3407, train: int = 650, validation: int = 65, test: int = 143
) -> dict[str, list[dict[str, str]]]:
    """Generate so many labelled notes for each split, with specialties balanced to within one note.

    A split's first n notes do not depend on its size, nor on the size of the other splits. No transcription occurs
    twice: a UserError, if a size is larger than the pools allow.

    Returns:
        Split name (train, validation, test) -> rows with the columns id, transcription and medical_specialty.
    """
    seen: set[str] = set()
    sizes = {"train": train, "validation": validation, "test": test}
    return {split: _rows(seed, split, size, seen) for split, size in sizes.items()}


def _rows(seed: int, split: str, size: int, seen: set[str]) -> list[dict[str, str]]:
    if size < 0:
        raise UserError(f"data.source builtin: {split} asks for {size} notes; use a number of at least 0.")
    rng = random.Random(f"medlit/{seed}/{split}")
    rows: list[dict[str, str]] = []
    while len(rows) < size:
        keyed = sorted((rng.random(), place, name) for place, name in enumerate(SPECIALTIES))
        for _, _, specialty in keyed[: size - len(rows)]:
            drawn = (make_note(rng, specialty, split) for _ in range(_ATTEMPTS))
            text = next((text for text in drawn if len(text) in _LENGTHS and text not in seen), None)
            if text is None:
                fault = f"the {split} phrases give no more new notes; ask for fewer {split} notes"
                raise UserError(f"data.source builtin: {fault}.")
            seen.add(text)
            row_id = f"{split}-{len(rows):05d}"
            rows.append({"id": row_id, "transcription": text, "medical_specialty": specialty})
    return rows


def make_note(rng: random.Random, specialty: str, split: str) -> str:
    """An invented note."""
    cases, lines = _pool(specialty, split)
    case = _pick(rng, cases)
    sections = []
    # Part of the public transcriptions were exported with commas where their lines ended; so are some of these.
    after_heading, between = (": , ", ",") if rng.random() < 0.2 else (": ", " ")
    for section in PHRASES["layouts"][_pick(rng, PHRASES["specialties"][specialty]["layouts"])]:
        if rng.random() < section.get("chance", 1.0):
            slot = section["slot"]
            phrase = case[slot] if slot in case else _pick(rng, lines[slot])
            if slot == "opening":
                phrase = phrase.format(person=_pick(rng, lines["person"]), complaint=case["complaint"])
            text = _SLOT.sub(lambda match: _value(rng, match[1]), phrase)
            sections.append(f"{_pick(rng, section['headings'])}{after_heading}{text[0].upper()}{text[1:]}.")
    return between.join(sections)


@functools.cache
def _pool(specialty: str, split: str) -> tuple[list[dict[str, str]], dict[str, list[str]]]:
    """The phrases of one specialty in one split: whole cases, and the lines that fit any case."""
    entry = PHRASES["specialties"][specialty]
    table = entry[split].splitlines()
    cases = []
    for first, second, plan in zip(table[::3], table[1::3], table[2::3], strict=True):
        (complaint, diagnosis), (finding, procedure) = first.split("; "), second.split("; ")
        cases.append(dict(complaint=complaint, diagnosis=diagnosis, finding=finding, procedure=procedure, plan=plan))
    lines = dict(PHRASES["lines"][split])
    if entry.get("infant"):
        lines |= {"person": lines["infant"], "vitals": lines["infant_vitals"]}
    else:
        lines["person"] = [entry["person"]]
    return cases, lines


def _value(rng: random.Random, slot: str) -> str:
    """One of the choices of `{a|b}`, or a number in the range of `{low-high}`."""
    if "|" in slot:
        return _pick(rng, slot.split("|"))
    low, high = slot.split("-")
    if "." not in low:
        return str(int(low) + int(rng.random() * (int(high) - int(low) + 1)))
    # In tenths: integers round alike on every machine.
    tenths_low, tenths_high = (int(end.replace(".", "")) for end in (low, high))
    tenths = tenths_low + int(rng.random() * (tenths_high - tenths_low + 1))
    return f"{tenths // 10}.{tenths % 10}"


def _pick(rng: random.Random, items: Sequence[_T]) -> _T:
    return items[int(rng.random() * len(items))]


def write_notes(folder: Path) -> None:
    """Write one CSV file for each split."""
    for split, rows in builtin_notes(**SIZES).items():
        with (folder / f"{split}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    write_notes(FOLDER)
