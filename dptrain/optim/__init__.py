"""Post-processing of private gradients: optimizers, schedules and averages.

Nothing here sees an example, so nothing here changes the guarantee.
"""

from dptrain.optim.averaging import average_of
from dptrain.optim.build import OPTIMIZERS, build_optimizer
from dptrain.optim.schedule import SCHEDULES, build_schedule

__all__ = ["OPTIMIZERS", "SCHEDULES", "average_of", "build_optimizer", "build_schedule"]
