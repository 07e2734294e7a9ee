"""Training state on disk: one safetensors file per checkpoint, written atomically; the newest two are kept.

A checkpoint has the weights of every role, their average, the optimisers' tensors and, as JSON in the file's metadata,
the samples seen and the running sums. The random numbers of training are functions of the samples seen, so a resumed
run gives the same bits as an uninterrupted one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, final

from torch import Tensor

from fewstep.errors import UserError
from fewstep.store.files import atomic_file, make_folder
from fewstep.store.tensors import unshared

KEEP = 2  # checkpoints of a stage: if the newest is damaged, the one before it can be used


@final
class Checkpoints:
    """The checkpoints of a stage.

    Args:
        folder: their folder; it is made with the first checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def files(self) -> list[Path]:
        """The checkpoint files, oldest first."""
        return sorted(self.folder.glob("samples-*.safetensors"))

    def save(self, tensors: dict[str, Tensor], state: dict[str, Any], *, keep: int = KEEP) -> Path:
        """Write a checkpoint and delete all but the newest ``keep``.

        Args:
            tensors: by name.
            state: values that JSON can represent; ``total_samples`` gives the file's name.
            keep: number of checkpoints that are kept.

        Returns:
            The file.
        """
        from safetensors.torch import save_file

        make_folder(self.folder)
        path = self.folder / f"samples-{state['total_samples']:015d}.safetensors"
        with atomic_file(path) as temporary:
            metadata = {"state": json.dumps(state, sort_keys=True)}
            save_file(unshared(tensors), temporary, metadata=metadata)
        for old in self.files()[:-keep]:
            old.unlink()
        return path

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The tensors and the state of the newest checkpoint; None if there is none.

        Raises:
            UserError: the file is truncated or not a checkpoint.
        """
        files = self.files()
        if not files:
            return None
        return read_checkpoint(files[-1])


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the state of one checkpoint file.

    Raises:
        UserError: the file is truncated or not a checkpoint.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            state = json.loads((file.metadata() or {})["state"])
            return {name: file.get_tensor(name).clone() for name in file.keys()}, state  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise UserError(
            f"the checkpoint {path} is truncated or no checkpoint ({error}): delete that file; the same "
            "command then continues from the one before it, or starts the stage again."
        ) from error
