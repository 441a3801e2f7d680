"""How uncertain a reward that is linear in known features is about pairs, and which batch of pairs to ask about.

With V = reg I + sum h h^T over the pairs h asked about so far, |phi|_{V^-1} is (up to a factor) the width of the
confidence interval for the reward difference of a pair with features phi. No D x D matrix is ever made: by Woodbury

    phi_i^T V^-1 phi_j = (phi_i . phi_j) / reg - w_i . w_j        w_i = C^-1 H phi_i / sqrt(reg),  C C^T = reg I + H H^T

and a pair that is picked adds one more entry to every w.

Shapes: R responses    P pairs to choose from    M pairs asked about before    D features    W entries of w.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.linalg import cholesky, solve_triangular

NORMALIZE = ("response", "pair", "none")


def unit_rows(rows_RD: np.ndarray) -> np.ndarray:
    """Each row divided by its length; a row of zeros stays one.

    >>> unit_rows(np.array([[3.0, 4.0], [0.0, 0.0]]))
    array([[0.6, 0.8],
           [0. , 0. ]])
    """
    lengths_R = np.linalg.norm(rows_RD, axis=1, keepdims=True)
    return np.divide(rows_RD, lengths_R, out=np.zeros_like(rows_RD), where=lengths_R > 0)


def pair_features(
    gradients_RD: np.ndarray, first_P: Sequence[int], second_P: Sequence[int], normalize: str = "response"
) -> np.ndarray:
    """Features phi of pairs, `P x D`: differences of the gradients of their responses (ActiveDPO, section 3.2).

    `normalize` says what is brought to unit length: each `response`'s gradient, then they are subtracted (section 3.3:
    short responses have long gradients); the `pair`'s difference; or `none`. The same response twice is 0 in all.
    """
    if normalize == "response":
        gradients_RD = unit_rows(gradients_RD)
    difference_PD = gradients_RD[np.asarray(first_P, dtype=int)] - gradients_RD[np.asarray(second_P, dtype=int)]
    return unit_rows(difference_PD) if normalize == "pair" else difference_PD


def uncertainty(features_PD: np.ndarray, asked_MD: np.ndarray, reg: float) -> np.ndarray:
    """`|phi|_{V^-1}^2` of each pair, `P` in float64 (ActiveDPO, eq. 3, squared). In [0, |phi|^2 / reg]: what was asked
    about before, in any combination, lowers it, and nothing raises it.

    A pair that was asked about n times is left with |phi|^2 / (reg + n |phi|^2):

    >>> phi = np.array([[1.0, 0.0], [0.0, 1.0]])
    >>> uncertainty(phi, asked_MD=np.array([[1.0, 0.0]] * 3), reg=1.0)
    array([0.25, 1.  ])
    """
    return _left(features_PD, explained(features_PD, asked_MD, reg), reg)


def greedy_batch(
    features_PD: np.ndarray, asked_MD: np.ndarray, reg: float, count: int
) -> tuple[list[int], list[float]]:
    """`count` pairs one after the other: the most uncertain one, then V gains it (ActiveDPO, eqs. 3 and 4).

    Returns indices and each one's `|phi|_{V^-1}` when it was picked. Nothing is picked twice; ties to the lowest index.
    One product of the features with one of them a pick: O(count P (D + M + count)) time, and the features are the
    largest array.
    """
    count = min(count, len(features_PD))
    before_WP = explained(features_PD, asked_MD, reg)
    explained_WP = np.concatenate([before_WP, np.empty((count, len(features_PD)))])
    left_P = _left(features_PD, before_WP, reg)
    open_P = np.ones(len(features_PD), dtype=bool)
    picks: list[int] = []
    values: list[float] = []
    for known in range(len(before_WP), len(explained_WP)):
        pick = int(np.argmax(np.where(open_P, left_P, -1.0)))
        picks.append(pick)
        values.append(float(left_P[pick]) ** 0.5)
        open_P[pick] = False
        # V^-1 - u u^T / (1 + phi . u) with u = V^-1 phi (Sherman and Morrison): with `along`, what each phi has of u
        along_P = features_PD @ features_PD[pick] / reg - explained_WP[:known, pick] @ explained_WP[:known]
        explained_WP[known] = along_P / np.sqrt(1 + left_P[pick])
        left_P = np.maximum(left_P - explained_WP[known] ** 2, 0.0)
    return picks, values


def explained(features_PD: np.ndarray, asked_MD: np.ndarray, reg: float) -> np.ndarray:
    """`w`, `W x P` in float64: what the pairs asked about so far tell about each pair."""
    if not len(asked_MD):
        return np.zeros((0, len(features_PD)))
    if len(asked_MD) > asked_MD.shape[1]:
        _, asked_MD = np.linalg.qr(asked_MD)  # D rows with the same H^T H
    overlap_MP = (asked_MD @ features_PD.T).astype(np.float64)
    gram_MM = (asked_MD @ asked_MD.T).astype(np.float64)
    root_MM = cholesky(gram_MM + reg * np.eye(len(gram_MM)), lower=True)
    return solve_triangular(root_MM, overlap_MP, lower=True) / reg**0.5


def _left(features_PD: np.ndarray, explained_WP: np.ndarray, reg: float) -> np.ndarray:
    squared_P = np.einsum("pd,pd->p", features_PD, features_PD).astype(np.float64)
    return np.maximum(squared_P / reg - np.einsum("wp,wp->p", explained_WP, explained_WP), 0.0)
