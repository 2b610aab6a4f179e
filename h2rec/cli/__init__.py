"""The ``h2rec`` command."""

import sys


def main() -> None:
    """Runs the command; without the packages it needs, one line says how to install them."""
    try:
        from h2rec.cli.app import app
    except ModuleNotFoundError as error:
        if (error.name or "h2rec").partition(".")[0] == "h2rec":
            raise
        sys.exit(f'The h2rec command needs {error.name}: pip install "h2rec[train]"')
    app(prog_name="h2rec")
