"""What starts: the installed `semmoe`, `python -m semmoe`, and that under torchrun.

Imports hardly anything, so that Ctrl-C while the command line is still being imported is one line
too.
"""

import sys


def main() -> None:
    """Import the command line and run it."""
    try:
        from semmoe.main import main as run_command

        run_command()
    except KeyboardInterrupt:
        print("semmoe: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
