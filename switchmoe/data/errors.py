"""What every file of this package raises when a corpus or a vocabulary cannot be used."""


class DataError(ValueError):
    """One line: the config field, its value, what is wrong, and what would be accepted."""
