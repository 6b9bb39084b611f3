"""The JSON schema of run files, by which editors complete and check them."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

from fewstep.run.pretraining import PretrainRun
from fewstep.run.specs import DistillRun

__all__ = ["LINE", "run_schema"]

LINE = "# yaml-language-server: $schema="
"""Beginning of the line of a run file that names its schema, as VS Code's YAML extension and others read it."""


def run_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a run file of either kind.

    It includes the methods, teachers, networks and data sets that were imported from outside. Rules over several settings,
    such as a batch that micro-batches must divide, are not in it.
    """
    schema = TypeAdapter(DistillRun | PretrainRun).json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "fewstep run", **schema}
