"""The two files of an adapter folder, found and opened. Nothing that is read is a pickle."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from . import foreign
from .writing import CONFIG_FILE, WEIGHTS_FILE, beside_of, digest

_LARGEST_CONFIG = 1 << 24


# what PEFT wrote before it wrote safetensors
_PICKLE = "adapter_model.bin"


def weights_of(folder: Path) -> Path:
    """The file of the weights, whose size is checked.

    Raises:
        FileNotFoundError, NotADirectoryError, ValueError: naming the format where the path is another writer's.
    """
    if not folder.is_dir():
        raise foreign.no_directory(folder)
    file = folder / WEIGHTS_FILE
    if not file.exists() and (folder / _PICKLE).exists():
        raise FileNotFoundError(
            f"folder must hold {WEIGHTS_FILE}, got {str(folder)!r} with {_PICKLE}, a pickle, which can run code and is "
            "never read; where you trust it, PEFT writes the other: PeftModel.from_pretrained(base_model, "
            "folder).save_pretrained(folder)"
        )
    if not file.is_file():
        raise foreign.no_weights(folder)
    _check_file(file, _memory())
    return file


@contextmanager
def safetensors(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt", device="cpu") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{file} must be a safetensors file: {error}") from None


def _check_file(file: Path, largest: int) -> None:
    if not file.is_file():
        raise FileNotFoundError(f"folder must hold {file.name}, got no file {str(file)!r}")
    size = file.stat().st_size
    if size > largest:
        raise ValueError(f"{file} must have at most {largest:,} bytes, got {size:,}")


def _memory() -> int:
    """Bytes of this machine's memory, where it tells."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 1 << 40


def config_beside(folder: Path, wanted: str | None) -> tuple[Path, bytes]:
    """The config of the weights that say their config's digest, wherever the writer was stopped; else what is there."""
    place = folder / CONFIG_FILE
    # a writer may be at work: what was beside its place a moment ago is in it now
    for path in (place, *beside_of(folder, CONFIG_FILE), place) if wanted is not None else ():
        try:
            _check_file(path, _LARGEST_CONFIG)
            data = path.read_bytes()
        except (OSError, ValueError):
            continue
        if digest(data) == wanted:
            return path, data
    _check_file(place, _LARGEST_CONFIG)
    if wanted is not None:
        warnings.warn(f"{place} is not the one that {WEIGHTS_FILE} was saved with; it was changed since", stacklevel=5)
    return place, place.read_bytes()
