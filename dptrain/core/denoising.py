"""DiSK: a simplified Kalman filter over private gradients, in formulas.

Zhang, Bu, Balle, Hong, Razaviyayn, Mirrokni 2024, "DiSK: Differentially Private Optimizer with Simplified
Kalman Filter for Noise Reduction", arXiv 2410.03883, in the form that needs one gradient a step. x_t are the
weights before step t = 1, 2, ..., kappa in (0, 1] the filter's gain, gamma = (1 - kappa) / kappa:

    y_t = x_t + gamma (x_t - x_(t-1))               the look-ahead point; x_0 = x_1
    p_t = private gradient at y_t                   sum of gradients clipped to C, plus noise, over L
    g_t = (1 - kappa) g_(t-1) + kappa p_t           the estimate; g_1 = p_1
    x_(t+1) = any optimizer's step from x_t with g_t

While the gradient changes linearly with the weights, by H d for a move d, its expectation at y_t is
grad f(x_t) + gamma H d_t, and kappa gamma = 1 - kappa, so

    g_t = (1 - kappa) (g_(t-1) + H d_t) + kappa (grad f(x_t) + noise):

the old estimate, moved to where the weights are now, and corrected by a measurement, with neither a second
gradient nor a Hessian. Noise is averaged over about 1 / kappa steps as by momentum, but what is averaged is
not out of date.

Privacy: y_t is made of weights that were released before, so it is as public as x_t. Each example's gradient
there is clipped to C, and neighbouring data sets' sums differ by at most C at any public point; the rest is
post-processing. The mechanism and its accounting stay as they are.
"""

from typing import Any

from dptrain.core import checks


def gain(kappa: float) -> float:
    """`kappa` if it is a gain, in (0, 1]; 1 filters nothing.

    Raises:
        TypeError, ValueError: it is none.
    """
    kappa = checks.number("the gain of the denoising filter", kappa)
    if not 0 < kappa <= 1:
        raise ValueError(
            f"the gain of the denoising filter is {kappa:g}: give a number above 0 and up to 1, which "
            "filters nothing."
        )
    return kappa


def filtered_variance(before: Any, measured: Any, kappa: Any) -> Any:
    """Of the noise of g_t in each coordinate: that of g_(t-1) and of p_t is independent.

    (1 - kappa)^2 `before` + kappa^2 `measured`, of numbers or arrays.
    """
    return (1 - kappa) ** 2 * before + kappa**2 * measured
