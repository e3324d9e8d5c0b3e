"""Tests of reinforcement learning share what those of training do."""

from tests.train.conftest import no_pictures, one_thread, pictures

__all__ = ["no_pictures", "one_thread", "pictures"]
