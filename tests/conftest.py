"""Shared fixtures: one thread, fixed seeds, a tiny teacher."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
