"""The verbs and what each is for; nothing is imported, so that anybody may ask."""

from __future__ import annotations

MODEL_VERBS = {
    "fit": "fine-tune an adapter on labelled notes",
    "validate": "measure a checkpoint or adapter on the validation split",
    "test": "measure a checkpoint or adapter on the test split",
    "predict": "file one note, a split or a table of notes",
}
TOOLS = {
    "doctor": "check this machine, and with --config whether a fit will run on it",
    "audit": "check the notes: duplicates, conflicts, leakage, lengths",
    "baseline": "what simpler systems reach on the same test notes, and whether the model is better",
    "export": "write an adapter, a merged model or GGUF files, proved to answer alike",
}
