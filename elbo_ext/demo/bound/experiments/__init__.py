"""What theory says about the bound, measured: one file and function per statement of python -m elbo_ext.demo bound.

Each returns a `Finding`: the numbers of its figure, as lists and floats, and the checks that hold them against
theory. Repetitions of an estimator are batch dimensions of one call. A tolerance of `SIGMAS` standard errors is meant
where it says "within its error".
"""
