"""From a table of notes to batches of token ids."""
