"""Transformers' Trainer: adapter folders in its checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ..checkpoint import hotswap_adapter, save_adapter


class SaveAdapterCallback(TrainerCallback):
    """Writes the adapter beside each checkpoint, and takes its values from there when a run is resumed.

    ``Trainer(..., callbacks=[SaveAdapterCallback()])`` writes ``checkpoint-<step>/<adapter>``, a folder that
    :func:`fused_lora.load_adapter` and PEFT read.

    Args:
        adapter: the name of the adapter, which the model must have.
    """

    def __init__(self, adapter: str = "default") -> None:
        self.adapter = adapter

    def _folder(self, args: Any, state: Any) -> Path:
        return Path(args.output_dir) / f"checkpoint-{state.global_step}" / self.adapter

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            save_adapter(kwargs["model"], self._folder(args, state), self.adapter)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = self._folder(args, state)
        # a run that starts anew is at step 0, and a resumed one at the step of its checkpoint
        if state.global_step and folder.is_dir():
            hotswap_adapter(kwargs["model"], folder, self.adapter)
