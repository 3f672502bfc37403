"""Solvers that others learned and published as tables, run as they are: rivals without a fit."""

import torch

from foreseer.evaluation.learned_solver import LinearSolver

NEURAL_SOLVER: dict[int, tuple[list[float], list[list[float]]]] = {
    5: (
        [0.0521, 0.1475, 0.2114, 0.2797, 0.3092],
        [[], [-1.26], [1.38, -2.26], [0, 0, -0.92], [0, 0, 0, -0.7]],
    ),
    6: (
        [0.0391, 0.0924, 0.165, 0.2015, 0.2511, 0.2511],
        [
            [],
            [-1.22],
            [1.12, -2],
            [-0.3, 0.9, -1.56],
            [0, 0, 0, -0.74],
            [0, 0, 0, 0, -0.62],
        ],
    ),
    7: (
        [0.0387, 0.0748, 0.103, 0.1537, 0.184, 0.234, 0.2117],
        [
            [],
            [-1.11],
            [1.03, -1.99],
            [0.07, 0.43, -1.57],
            [-0.21, -0.15, 1.53, -2.29],
            [-0.05, 0.07, -0.23, 0.61, -1.33],
            [-0.17, 0.31, -0.41, 0.17, 0.59, -1.31],
        ],
    ),
    8: (
        [0.0071, 0.0613, 0.078, 0.1163, 0.1421, 0.188, 0.2077, 0.1996],
        [
            [],
            [-2.43],
            [0.61, -1.55],
            [0.99, -0.11, -2.07],
            [0.05, -0.49, 1.33, -1.93],
            [0.05, -0.33, 0.23, 0.73, -1.71],
            [-0.09, 0.25, -0.29, 0.05, 0.61, -1.45],
            [-0.23, 0.21, -0.01, -0.25, 0.25, 0.41, -1.25],
        ],
    ),
    9: (
        [0.0017, 0.051, 0.0636, 0.0911, 0.1007, 0.1443, 0.1694, 0.191, 0.1872],
        [
            [],
            [-6.19],
            [-0.11, -0.81],
            [0.73, -0.17, -1.37],
            [0.31, -0.05, 0.19, -1.45],
            [0.03, -0.23, 0.29, 0.35, -1.35],
            [-0.19, 0.05, 0.01, 0.21, 0.25, -1.23],
            [-0.23, 0.21, -0.13, 0.17, 0.09, 0.09, -1.09],
            [-0.17, 0.15, 0.11, -0.19, 0.03, 0.23, 0.17, -1.21],
        ],
    ),
    10: (
        [0.0016, 0.0538, 0.0347, 0.0853, 0.0853, 0.1198, 0.1351, 0.165, 0.1788, 0.1406],
        [
            [],
            [-7.8801],
            [-0.4, -0.74],
            [0.48, -0.18, -0.86],
            [0.26, -0.04, -0.04, -1.28],
            [0, -0.06, 0.26, 0.26, -1.42],
            [-0.1, -0.06, 0.08, 0.2, 0.22, -1.24],
            [-0.18, 0.14, -0.08, 0.1, 0.08, 0.14, -1.06],
            [-0.12, 0.16, -0.1, 0.04, 0.08, 0.06, 0.08, -1.02],
            [-0.16, 0.02, 0.14, 0, -0.14, 0.08, 0.14, 0.34, -1.38],
        ],
    ),
}
"""Steps and weights of earlier outputs by number of evaluations (arXiv 2505.21114, its repository).

Searched on FlowDCN and SiT for ImageNet 256 and moved to FLUX and SD3 by its authors.
"""


def neural_solver(num_steps: int) -> LinearSolver:
    """The published NeuralSolver: the newest output has what the earlier weights leave of 1.

    Args:
        num_steps: network evaluations, 5 to 10.

    Raises:
        ValueError: no table of so many was published.
    """
    if num_steps not in NEURAL_SOLVER:
        raise ValueError(
            f"NeuralSolver has no table of {num_steps} evaluations, expected one of "
            f"{', '.join(map(str, NEURAL_SOLVER))}."
        )
    steps, earlier = NEURAL_SOLVER[num_steps]
    widths = torch.tensor(steps, dtype=torch.float64)
    widths = widths / widths.sum()  # as printed they sum to 1 within rounding
    times = 1 - torch.cat([widths.new_zeros(1), widths.cumsum(0)[:-1]])
    weights = torch.zeros(num_steps, num_steps, dtype=torch.float64)
    for i, row in enumerate(earlier):
        weights[i, :i] = torch.tensor(row, dtype=torch.float64)
        weights[i, i] = 1 - sum(row)
    return LinearSolver(times, torch.zeros_like(times), -widths[:, None] * weights)
