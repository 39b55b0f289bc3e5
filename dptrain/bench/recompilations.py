"""Does a compiled step stay compiled while Poisson sampling changes who takes part?"""

from __future__ import annotations

from torch._dynamo.utils import compilation_time_metrics

from dptrain.bench.contestant import Contestant

#: physical steps that are taken
STEPS = 20


def recompilations(contestant: Contestant, batch_size: int) -> int | None:
    """Graphs that Inductor compiles in `STEPS` steps with other masks, after the contestant is warm.

    None where it takes no mask.
    """
    if contestant.clipped_sum is None:
        return None
    before = _compiled_so_far()
    for step in range(
        STEPS
    ):  # as in real training: many are full, the last of a logical step is nearly empty
        contestant.clipped_sum(1 + step * 7 % batch_size)
    return _compiled_so_far() - before


def _compiled_so_far() -> int:
    return len(compilation_time_metrics.get("compile_fx_inner", ()))
