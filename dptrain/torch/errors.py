"""What the engine says when it will not go on."""


class Refused(RuntimeError):
    """A model, a batch or a request for which an exact private gradient cannot be promised.

    Raised before anything is released: no privacy budget is spent, no parameter has changed.
    """


class Unforeseen(Refused):
    """A gradient came where the probe saw none but zeros."""


class Misfit(Refused):
    """The examples of a use are not where the probe had them; ``pattern`` tells its like."""

    def __init__(self, message: str, pattern: tuple):
        super().__init__(message)
        self.pattern = pattern
