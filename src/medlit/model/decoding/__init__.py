"""How the model answers a batch of prompts: one interface, `Answers`, whatever the way."""

from medlit.model.decoding.answers import Answers
from medlit.model.decoding.generate import eos_ids, generate

__all__ = ["Answers", "eos_ids", "generate"]
