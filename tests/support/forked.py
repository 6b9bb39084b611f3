"""The end of a forked child: what it runs, where its output goes, and its exit code."""

import os
import sys
import traceback
from collections.abc import Callable
from typing import IO, NoReturn


def leave_after(run: Callable[[], int], said: IO[bytes]) -> NoReturn:
    """In a forked child: run with errors going to a file, and end the process with the exit code; 99 after a traceback."""
    code = 99
    try:
        null = os.open(os.devnull, os.O_RDWR)
        for number, target in enumerate((null, null, said.fileno())):
            os.dup2(target, number)
        code = run()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)
