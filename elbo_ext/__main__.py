"""``python -m elbo_ext info``: how the package was built and what it runs on."""

import argparse

from . import build_info


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m elbo_ext", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    commands.add_parser("info", help="print how the package was built and which kernels are in use")
    parser.parse_args(argv)
    for name, value in build_info().items():
        text = ", ".join(map(str, value)) or "none" if isinstance(value, list) else value
        print(f"{name.replace('_', ' '):22} {text}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
