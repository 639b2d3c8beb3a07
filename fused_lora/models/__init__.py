"""Whole models: which layers get adapters, which are active, what is merged, and what a model looks like."""
