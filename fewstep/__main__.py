"""`python -m fewstep` is the `fewstep` command."""

import os

from fewstep.cli import main
from fewstep.launch import leave

if __name__ == "__main__":
    code = main()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        leave(code)
    raise SystemExit(code)
