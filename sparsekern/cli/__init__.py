"""The command line: ``sparsekern train | plan | recipes | report | doctor``.

A mistake of the user is one line on stderr and exit status 2; ``SPARSEKERN_DEBUG=1`` shows the traceback.
"""

from sparsekern.cli.app import app, main

__all__ = ["app", "main"]
