"""python -m elbo_ext.demo: trains a variational autoencoder, and compares (training.py).

python -m elbo_ext.demo bound: what theory says about the bound, measured (the folder bound).
python -m elbo_ext.demo counts: likelihoods of counts compared on held-out data (the folder counts).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType

from .command_line import exit_code


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo, or its command `bound` or `counts`; returns the exit code (see --help)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    command: ModuleType
    if argv[:1] == ["bound"]:
        from .bound import command as bound

        command, argv = bound, argv[1:]
    elif argv[:1] == ["counts"]:
        from .counts import command as counts

        command, argv = counts, argv[1:]
    else:
        from . import training

        command = training
    return exit_code(lambda: command.run(command.build_parser().parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
