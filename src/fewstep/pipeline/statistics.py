"""The training statistics of a run, ``stats.jsonl``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, final

from fewstep.store.files import json_line, write_text


@final
class Statistics:
    """``stats.jsonl``: one line per log point and stage, never the same step twice; NaN and infinity are ``null``.

    Args:
        path: the file.
        stage: whose lines these are.
        writes: whether this process writes; the first one does.
    """

    def __init__(self, path: Path, stage: str, writes: bool) -> None:
        self.path, self.stage, self.writes = path, stage, writes

    def keep_until(self, samples: int) -> None:
        """Drop this stage's lines beyond ``samples``: they are about to be written again."""
        if not self.writes or not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = []
        for line in lines:
            try:
                fields = json.loads(line)
            except json.JSONDecodeError:
                continue  # the last line of a killed run may be cut off
            if fields["stage"] != self.stage or fields["samples"] <= samples:
                kept.append(line.rstrip("\n") + "\n")
        if kept != lines:
            write_text(self.path, "".join(kept))

    def write(self, fields: dict[str, Any]) -> None:
        """Append one line."""
        if self.writes:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json_line({"stage": self.stage, **fields}) + "\n")
