"""The error of data that cannot be trained on, in a module that needs no library."""


class DataError(ValueError):
    """A row that cannot be trained on; the message names the file and the line."""
