"""The one error of this package."""


class DataError(RuntimeError):
    """Data is missing or broken. One line: what was expected, what was found, what to do."""
