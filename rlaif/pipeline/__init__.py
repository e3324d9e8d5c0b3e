"""Pipelines: whole systems as one file of steps, each a command line of `rlaif`, that run, resume and keep their lineage."""
