"""What a user can put right."""

from __future__ import annotations


class CalibrationError(ValueError):
    """What was asked for cannot be had from these texts; the message is one line that says why, and what would help."""
