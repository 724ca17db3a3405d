"""python -m elbo_ext.demo counts: likelihoods of counts, compared on held-out data."""
