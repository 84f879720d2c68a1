"""Accuracy, tokens per forward, tokens per second and AUP of a model with a decoder on a task."""
