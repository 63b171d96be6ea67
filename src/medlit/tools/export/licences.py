"""Licences of the base models that medlit has configs for, as the Hub's metadata spells them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Licence:
    """A base model's licence, which binds its adapters too.

    Attributes:
        id: of the Hub's list.
        title: for people.
        name: for the Hub where the id is 'other'.
        link: to its text, where the id does not say it.
    """

    id: str
    title: str
    name: str | None = None
    link: str | None = None


# The beginning of a model's name, without its owner and in lower case.
_BY_NAME = {
    "smollm2": Licence("apache-2.0", "Apache License 2.0"),
    "meta-llama-3.1": Licence("llama3.1", "Llama 3.1 Community License"),
    "llama-3.1": Licence("llama3.1", "Llama 3.1 Community License"),
    "mistral-nemo": Licence("apache-2.0", "Apache License 2.0"),
    "mistral-7b": Licence("apache-2.0", "Apache License 2.0"),
    "phi-3": Licence("mit", "MIT License"),
    "gemma-2": Licence("gemma", "Gemma Terms of Use"),
}


def licence_of(base_model: str) -> Licence | None:
    """The licence of a base model, or None for one that is not known here."""
    name = base_model.rpartition("/")[2].removeprefix("builtin:").lower()
    return next((licence for start, licence in _BY_NAME.items() if name.startswith(start)), None)
