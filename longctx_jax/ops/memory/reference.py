"""The associative memory, token by token and number by number: what the tests compare with."""

import numpy as np

from longctx_jax.ops.memory.associative import EPS


def dpfp(x: np.ndarray, nu: int) -> np.ndarray:
    """Returns the features of one vector [width], float64."""
    r = np.array([max(u, 0.0) for u in x] + [max(-u, 0.0) for u in x])
    return np.array([r[i] * r[(i - j) % len(r)] for j in range(1, nu + 1) for i in range(len(r))])


def read(
    features: np.ndarray, matrix: np.ndarray, normalizer: np.ndarray, eps: float = EPS
) -> np.ndarray:
    """Returns what one query's features [features] recall, [value]."""
    above = np.zeros(matrix.shape[1])
    below = eps
    for f, row, z in zip(features, matrix, normalizer, strict=True):
        above, below = above + f * row, below + f * z
    return above / below


def write(features, value, beta, matrix, normalizer, *, is_empty: bool, correction=True, eps=EPS):
    """Returns (matrix, normalizer, gamma [tokens]) after writing rows [tokens, ...] at once."""
    new_matrix, new_normalizer, gammas = matrix.copy(), normalizer.copy(), []
    for f, v, b in zip(features, value, beta, strict=True):
        gamma = 1.0
        recalled = np.zeros_like(v)
        if not is_empty:
            recalled = read(f, matrix, normalizer, eps)
            if correction:
                gamma = 1 - (f @ normalizer + eps) / (f @ f + eps)
                gamma = min(max(gamma, 0.0), 1.0)
        new_matrix = new_matrix + b * np.outer(f, v - recalled)
        new_normalizer = new_normalizer + gamma * f
        gammas.append(gamma)
    return new_matrix, new_normalizer, np.array(gammas)
