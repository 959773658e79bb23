"""Evaluations: a model and held-out pairs in, rows with sample counts and intervals out."""
