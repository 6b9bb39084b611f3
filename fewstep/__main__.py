"""`python -m fewstep` is the `fewstep` command."""

from fewstep.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
