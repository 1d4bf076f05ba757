"""``python -m sparsekern``: the doctor without arguments, else the command line (``python -m sparsekern train``)."""

from __future__ import annotations

import sys


def main() -> int:
    if len(sys.argv) == 1:
        from sparsekern.doctor import main as doctor

        return doctor()
    from sparsekern.cli import main as cli

    return int(cli() or 0)


if __name__ == "__main__":
    sys.exit(main())
