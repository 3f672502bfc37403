"""Which of two guidance branches is the conditional one, read off what the scheduler was given.

Guidance gives it v = u + s (c - u) with s > 1 (Ho & Salimans, arXiv 2207.12598): v's coefficients
on the branches' outputs, s and 1 - s, have opposite signs, and the conditional one's is the larger,
also where v is rescaled or negated afterwards.
"""

import torch
from torch import Tensor

ALIKE = 1e-9
"""Relative determinant of the branches' Gram below which they do not differ."""


def first_branch(v: Tensor, first: Tensor, second: Tensor) -> str:
    """The kind of the first branch: `conditional`, `unconditional`, or empty where v does not tell.

    Args:
        v: what the scheduler was given.
        first: output of the branch that the pipeline runs first.
        second: output of the other.
    """
    if not v.numel() == first.numel() == second.numel():
        return ""
    branches = torch.stack([first.flatten(), second.flatten()]).double()
    products = branches @ branches.T
    if torch.linalg.det(products) <= ALIKE * products[0, 0] * products[1, 1]:
        return ""
    one, other = torch.linalg.solve(products, branches @ v.flatten().double()).tolist()
    if one * other >= 0:
        return ""
    return "conditional" if abs(one) > abs(other) else "unconditional"
