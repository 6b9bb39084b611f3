"""`fewstep completion`: the shell completes commands and options. tyro writes the script."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, Literal

from tyro.conf import FlagCreatePairsOff, Positional

from fewstep.cli.options import about

__all__ = ["completion"]


def completion(
    shell: Positional[Annotated[Literal["bash", "zsh", "fish"], about("the shell that you use")]],
) -> None:
    """Print a script by which your shell completes commands and options.

    bash: `source <(fewstep completion bash)` in ~/.bashrc. zsh: `fewstep completion zsh > ~/.zfunc/_fewstep`, a folder of fpath.
    fish: `fewstep completion fish > ~/.config/fish/completions/fewstep.fish`.
    """
    import tyro

    from fewstep.cli.main import COMMANDS

    tyro.extras.subcommand_cli_from_dict(
        {name: _outline(command) for name, command in COMMANDS.items()},
        prog="fewstep",
        args=["--tyro-print-completion", shell],
        config=(FlagCreatePairsOff,),
    )


def _outline(command: Callable[..., Any]) -> Callable[..., None]:
    """A function with the options of a command."""
    takes = inspect.signature(command, eval_str=True).parameters
    # a shell that knows every setting would have to import torch at each press of the key
    kept = {name: option for name, option in takes.items() if name not in ("settings", "line")}

    @functools.wraps(command)
    def outline(**options: Any) -> None: ...

    del outline.__wrapped__
    outline.__signature__ = inspect.Signature(list(kept.values()))  # type: ignore[attr-defined]
    outline.__annotations__ = {name: option.annotation for name, option in kept.items()}
    return outline
