"""Run `mtrl` as `python -m mtrl_cli`."""

from mtrl_cli.cli.main import main
from mtrl_cli.machine import parent_watchdog

if __name__ == "__main__":
    parent_watchdog.watch()
    main()
