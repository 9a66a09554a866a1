"""Adam: steps whose size does not depend on that of the gradient; pulls to the start and to 0."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgelora.gradient.weights import Array

_TINY = 1e-12


@dataclass(frozen=True)
class Adam:
    """How far a step goes.

    Attributes:
        step: about what a value moves by in one step.
        momentum: the share of the last steps' mean gradient that is kept (beta 1).
        memory: the same of their squares (beta 2).
        penalty: the pull towards the start, as a share of the way back for each unit of `step`.
        sparsity: the pull of an L1 penalty towards 0, where values stay, for each unit of `step`.
        averaging: the share of the running average of the values that a step keeps (the start has
            none); 0: the average is the values. Steps on few examples are noisy, averages less so.
    """

    step: float
    momentum: float = 0.9
    memory: float = 0.999
    penalty: float = 0.0
    sparsity: float = 0.0
    averaging: float = 0.0


@dataclass(frozen=True, eq=False)
class Track:
    """The values after `n_steps` steps, with the running means of gradients and their squares.

    `average` is that of the values: what a descent returns, while slopes are taken at `values`.
    """

    values: Array
    mean: Array
    square: Array
    average: Array
    n_steps: int


def begin(start: Array) -> Track:
    """A track before its first step."""
    return Track(start, np.zeros_like(start), np.zeros_like(start), start, 0)


def advance(track: Track, gradient: Array, start: Array, adam: Adam) -> Track:
    """One step; `track` stays as it is.

        m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2
        w = w - step ((m / (1 - b1^t)) / sqrt(v / (1 - b2^t)) + penalty (w - start))
        w = sign(w) max(0, |w| - step sparsity)
        average = average + (1 - b3) / (1 - b3^t) (w - average)

    Adam (arXiv:1412.6980, algorithm 1) with a decoupled pull (arXiv:1711.05101, algorithm 2), here
    towards the start in place of zero, the proximal step of an L1 penalty, and the exponential
    form of Polyak's average (doi:10.1137/0330046). A value whose gradient was always 0 only follows
    the pulls.

    Args:
        gradient, start: of the shape and dtype of the track's values.
    """
    n = track.n_steps + 1
    kind = track.values.dtype.type
    mean = kind(adam.momentum) * track.mean + kind(1 - adam.momentum) * gradient
    square = kind(adam.memory) * track.square + kind(1 - adam.memory) * gradient * gradient
    scale = kind(np.sqrt(1 - adam.memory**n) / (1 - adam.momentum**n))
    move = scale * mean / (np.sqrt(square) + kind(_TINY))
    if adam.penalty:
        move += kind(adam.penalty) * (track.values - start)
    values = track.values - kind(adam.step) * move
    if adam.sparsity:
        values = np.sign(values) * np.maximum(np.abs(values) - kind(adam.step * adam.sparsity), 0)
    share = (1 - adam.averaging) / (1 - adam.averaging**n)
    average = kind(1 - share) * track.average + kind(share) * values
    return Track(values, mean, square, average, n)
