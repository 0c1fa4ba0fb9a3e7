"""Kilter: from a base language model and preferences to an aligned model, with the evidence that it is aligned."""

__version__ = "0.1.0"
