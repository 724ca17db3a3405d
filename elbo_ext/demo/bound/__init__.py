"""python -m elbo_ext.demo bound: what theory says about the bound, measured."""
