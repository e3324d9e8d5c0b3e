"""Measures of labels: how far they agree with humans, with intervals and baselines."""
