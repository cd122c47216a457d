"""A cache inside other trainers: its data, its collator and its losses (docs/trainers.md)."""
