"""``python -m benchmarks``: elbo_ext next to what users write in its place. benchmarks/NOTES.md explains the method."""


class BenchmarkError(Exception):
    """One sentence, without a full stop, on why a benchmark cannot run or must not be believed."""


def first_line(error: Exception) -> str:
    """What a row says of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
