"""Networks of foreign files, sized against the bytes present before any memory is taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from fewstep.system.bounds import shown
from fewstep.system.errors import FileError, UserError

__all__ = ["check_real", "check_tensors", "described_shapes"]

SLACK, SMALL = 2, 64  # parameters may be replaced or dropped while a network is built
SMALL_NUMBERS = 1 << 20


def described_shapes(build: Callable[[], nn.Module], held: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """Shapes of a network's weights by name, found on the meta device, which takes no memory.

    Building stops at the first parameter beyond twice what the file holds.

    Args:
        build: builds the network.
        held: the file's weights.

    Raises:
        FileError: the network has far more or larger weights than the file, or cannot be built.
    """
    most = SLACK * len(held) + SMALL
    most_numbers = SLACK * sum(value.numel() for value in held.values()) + SMALL_NUMBERS
    count = numbers = 0

    def registered(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal count, numbers
        count, numbers = count + 1, numbers + (0 if parameter is None else parameter.numel())
        if count > most or numbers > most_numbers:
            raise FileError(
                f"it describes a network of more than {count - 1:,} weights and {numbers:,} numbers, it holds {len(held):,} weights"
            )

    hook = register_module_parameter_registration_hook(registered)
    try:
        with torch.device("meta"):
            return {name: value.shape for name, value in build().state_dict().items()}
    except UserError:
        raise
    except (RuntimeError, ValueError, TypeError, OverflowError, ArithmeticError, MemoryError, LookupError) as error:
        why = shown(" ".join(str(error).split()), quote=False)
        raise FileError(f"it cannot be built ({why})") from None
    finally:
        hook.remove()


def check_real(tensors: Mapping[str, Tensor]) -> None:
    """Refuse weights that are whole numbers, which no network has.

    Raises:
        FileError: there are some.
    """
    if odd := [name for name, value in tensors.items() if not value.is_floating_point()]:
        raise FileError(
            f"its weights must be real numbers, got {tensors[odd[0]].dtype} in {shown(odd[0], quote=False)}"
        )


def check_tensors(tensors: Mapping[str, Tensor], size: int) -> None:
    """Refuse tensors that claim more than their file holds, as those do that repeat a number without storing it.

    Args:
        tensors: of the file, before any is copied.
        size: of the file in bytes.

    Raises:
        FileError: they claim more than four times its size.
    """
    claimed = sum(value.numel() * value.element_size() for value in tensors.values())
    if claimed > 4 * size:
        raise FileError(f"its tensors claim {claimed:,} bytes, it has {size:,}")
