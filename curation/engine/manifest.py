"""What a stage wrote, from which inputs, with which settings. Written last: where it is, the stage is whole."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class File:
    """One file of a stage: path relative to the stage's folder, its rows, bytes and sha256 (hex)."""

    path: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The record that closes a stage's folder.

    It holds nothing that differs between two runs with the same settings (times are kept beside it), so its own
    hash stands for the stage's output in the keys of the stages after it.
    """

    stage: str
    version: int
    key: str
    """hex digest of stage, version, settings and input hashes; equal keys mean equal bytes"""
    settings: dict[str, Any]
    inputs: dict[str, str]
    """manifest hashes of the stages this one read, by name"""
    files: list[File]
    counts: dict[str, int] = field(default_factory=dict)
    """images in and out, and rejected by reason"""
    figures: dict[str, Any] = field(default_factory=dict)
    """what the stage measured: certified recall, balance, and so on"""

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"

    def hash(self) -> str:
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def hash_of(self, prefix: str) -> str:
        """Of the files whose names begin so, whatever else the stage read, counted or wrote."""
        files = [asdict(file) for file in self.files if file.path.startswith(prefix)]
        assert files, f"{self.stage} wrote no {prefix}"
        return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()

    @staticmethod
    def from_json(text: str) -> "Manifest":
        content = json.loads(text)
        return Manifest(**{**content, "files": [File(**file) for file in content["files"]]})


def stage_key(stage: str, version: int, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """The identity of a stage's output: 32 hex digits over everything that can change it."""
    content = json.dumps([stage, version, dict(settings), dict(inputs)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:32]
