"""`python -m mtrl_cli` is `mtrl`."""

from mtrl_cli import parent
from mtrl_cli.cli import main

if __name__ == "__main__":
    parent.watch()
    main()
