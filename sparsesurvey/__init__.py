"""Sparsity structures for the MLP of a language model: defined, stored, multiplied, pruned with, trained with, measured."""

__version__ = "0.1.0"
