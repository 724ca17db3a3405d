"""``python -m benchmarks``: elbo_ext beside what users write in its place. benchmarks/NOTES.md explains the method."""


class BenchmarkError(Exception):
    """One sentence, without a full stop, on why a benchmark cannot run or must not be believed."""
