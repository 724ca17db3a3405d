"""python -m elbo_ext.demo: what the library is good for, on data. Nothing outside of this folder needs it.

It needs matplotlib, scikit-learn and tqdm, which the library does without: pip install 'elbo_ext[demo]'.
"""
