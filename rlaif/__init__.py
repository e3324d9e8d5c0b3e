"""rlaif: reinforcement learning from AI feedback and constitutional AI."""

__version__ = "0.1.0"
