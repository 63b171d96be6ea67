"""The command line: its verbs, their settings and help, the checks before a run, and how a run ends."""

from __future__ import annotations

# Verb -> what it does, for `medlit --help`. `__main__` reads these before it imports anything else.
MODEL_VERBS = {
    "fit": "fine-tune an adapter on labelled notes",
    "validate": "evaluate a checkpoint or an adapter on the validation split",
    "test": "evaluate a checkpoint or an adapter on the test split, and write the report",
    "predict": "classify one note, a split or a table of notes",
}
TOOLS = {
    "doctor": "check this machine and, with --config, whether a fit will run on it",
    "audit": "check the notes: duplicates, conflicting labels, leakage, lengths",
    "baseline": "evaluate simpler classifiers on the same test notes, and compare them with the fine-tuned model",
    "export": "write an adapter, a merged model or GGUF files, and check that they give the same answers",
}
