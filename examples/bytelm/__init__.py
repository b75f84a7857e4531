"""A byte-level language model, alike but for its attention: what language.py and locking.py train."""
