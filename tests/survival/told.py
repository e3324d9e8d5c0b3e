"""How a refusal must look."""

from __future__ import annotations


def one_line(error: Exception, *names: str) -> str:
    """What an error says, which must be one line that names one of these."""
    said = str(error)
    assert any(name in said for name in names), said
    assert "\n" not in said, said
    return said
