"""The table of predictions: its rows and file formats, the shards it grows in, and what resuming it requires."""
