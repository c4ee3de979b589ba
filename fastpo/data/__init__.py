"""Reading, checking and tokenising training data for the trainers."""

from fastpo.data.records import DataError

__all__ = ["DataError"]
