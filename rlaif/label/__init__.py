"""Labelers: methods that turn one comparison into a preference, as async functions over one row."""
