"""timm: vision models by name, without their pretrained weights."""

from __future__ import annotations

from typing import Any

import timm
from timm.layers import GatedMlp
from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock, SpatialGatingBlock
from torch import nn

from .entry import Entry, image

VIT: dict[str, Any] = {"img_size": 32, "patch_size": 16, "depth": 2, "embed_dim": 32, "num_heads": 4}
SWIN: dict[str, Any] = {
    "img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2),
}  # fmt: skip

# family, name, size of the image, what makes it tiny
NAMED: list[tuple[str, str, int, dict[str, Any]]] = [
    ("attention", "vit_tiny_patch16_224", 32, VIT),
    ("attention", "vit_base_patch16_clip_224", 32, VIT),
    ("attention", "vit_base_patch16_siglip_224", 32, VIT),
    ("attention", "vit_small_patch14_dinov2", 32, VIT),
    ("attention", "deit_tiny_distilled_patch16_224", 32, VIT),
    ("attention", "deit3_small_patch16_224", 32, VIT),
    ("attention", "beit_base_patch16_224", 32, VIT),
    ("attention", "eva02_tiny_patch14_224", 32, VIT),
    ("attention", "cait_xxs24_224", 32, {**VIT, "depth_token_only": 1}),
    ("attention", "xcit_nano_12_p16_224", 32, VIT),
    ("attention in windows", "swin_tiny_patch4_window7_224", 32, SWIN),
    ("attention in windows", "swinv2_tiny_window8_256", 32, SWIN),
    ("attention and convolutions", "efficientformerv2_s0", 64, {"img_size": 64}),
    ("attention and convolutions", "mobilevit_xxs", 64, {}),
    ("attention and convolutions", "levit_128s", 64,
     {"img_size": 64, "embed_dim": (16, 24, 32), "num_heads": (2, 3, 4), "depth": (1, 1, 1)}),
    ("attention and convolutions", "pvt_v2_b0", 32,
     {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 24, 32), "num_heads": (1, 2, 3, 4)}),
    ("attention and convolutions", "poolformer_s12", 64, {}),
    ("convolutions", "convnext_tiny", 32, {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}),
    ("convolutions", "convnextv2_atto", 32, {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}),
    ("convolutions", "resnet18", 64, {}),
    ("convolutions", "efficientnet_b0", 64, {}),
]  # fmt: skip

# whose named variants can't be made smaller
MIXERS: list[tuple[str, dict[str, Any]]] = [
    ("MlpMixer", {}),
    ("gMLP", {"block_layer": SpatialGatingBlock, "mlp_layer": GatedMlp, "mlp_ratio": 4}),
    ("ResMLP", {"block_layer": ResBlock, "norm_layer": Affine, "mlp_ratio": 4}),
]


def named(family: str, name: str, size: int, fields: dict[str, Any]) -> Entry:
    def make() -> nn.Module:
        made: nn.Module = timm.create_model(name, pretrained=False, num_classes=5, **fields)
        return made

    return Entry(name, "timm", family, make, image(size))


def mixer(name: str, fields: dict[str, Any]) -> Entry:
    def make() -> nn.Module:
        made: nn.Module = MlpMixer(num_classes=5, img_size=32, patch_size=16, num_blocks=2, embed_dim=32, **fields)
        return made

    return Entry(name, "timm", "mixers", make, image())


MODELS = [
    *(named(family, name, size, fields) for family, name, size, fields in NAMED),
    *(mixer(name, fields) for name, fields in MIXERS),
]
