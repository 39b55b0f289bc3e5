"""What the engine says when it will not go on."""


class Refused(RuntimeError):
    """A loss, a batch or a request for which an exact private gradient cannot be promised.

    Raised while the step is traced: nothing has been computed, no privacy budget is spent.
    """
