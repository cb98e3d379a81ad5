"""What every benchmark's command line has."""

from __future__ import annotations

import argparse


def parser(name: str, text: str | None) -> argparse.ArgumentParser:
    """A parser with ``--json``, whose help is the module's docstring as it stands."""
    result = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}", description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--json", action="store_true", help="print JSON")
    return result
