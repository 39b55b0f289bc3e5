"""The error that models raise."""


class ModelError(ValueError):
    """The model cannot be built, loaded or selected from. The message says what to do."""
