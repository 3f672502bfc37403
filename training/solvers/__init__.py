"""Fits of learned solvers, the rivals of a fit on the `output` tap: BNS, GS, LD3, ...

`families` says which numbers of the one class are free; `solver_fit` fits them through the sampler.
"""
