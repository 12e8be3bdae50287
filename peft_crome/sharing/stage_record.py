"""The record of a training stage, which marks its directory."""

from __future__ import annotations

STAGE_RECORD = "crome_stage.json"  # in a directory that a training stage wrote
