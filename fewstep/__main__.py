"""`python -m fewstep` is the `fewstep` command."""

import os

try:
    from fewstep.cli.main import main
    from fewstep.system.launch import leave
except KeyboardInterrupt:  # pressed while Python was still reading the program
    raise SystemExit(130) from None

if __name__ == "__main__":
    code = main()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        leave(code)
    raise SystemExit(code)
