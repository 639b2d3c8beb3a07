"""torchvision: classifiers without their weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torchvision import models
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.resnet import BasicBlock
from torchvision.models.swin_transformer import SwinTransformerBlockV2

from .entry import Entry, image

VIT = partial(models.VisionTransformer, image_size=32, patch_size=16, num_layers=2, num_heads=4, hidden_dim=32)
SWIN = partial(
    models.SwinTransformer, patch_size=[4, 4], embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=[4, 4]
)


def video() -> tuple[torch.Tensor]:
    return (torch.randn(1, 3, 4, 32, 32),)


NAMED: list[tuple[str, str, Callable[..., Any], Callable[[], Any]]] = [
    ("attention", "VisionTransformer", partial(VIT, mlp_dim=48), image()),
    ("attention in windows", "SwinTransformer", SWIN, image()),
    ("attention in windows", "SwinTransformer V2", partial(SWIN, block=SwinTransformerBlockV2), image()),
    ("attention in windows", "MaxVit",
     partial(models.MaxVit, input_size=(32, 32), stem_channels=8, partition_size=2, block_channels=[8, 16],
             block_layers=[1, 1], head_dim=8, stochastic_depth_prob=0.0), image()),
    ("attention in windows", "swin3d_t",
     partial(models.video.SwinTransformer3d, patch_size=[2, 4, 4], embed_dim=16, depths=[1, 1], num_heads=[2, 2],
             window_size=[2, 4, 4]), video),
    ("convolutions", "ConvNeXt",
     lambda num_classes: models.ConvNeXt(
         [CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)], num_classes=num_classes), image()),
    ("convolutions", "ResNet", partial(models.ResNet, BasicBlock, [1, 1, 1, 1]), image(64)),
    ("convolutions", "mobilenet_v3_small", models.mobilenet_v3_small, image(64)),
    ("convolutions", "efficientnet_b0", models.efficientnet_b0, image(64)),
    ("convolutions", "shufflenet_v2_x0_5", models.shufflenet_v2_x0_5, image(64)),
]  # fmt: skip


def model(family: str, name: str, kind: Callable[..., Any], inputs: Callable[[], Any]) -> Entry:
    def make() -> nn.Module:
        made: nn.Module = kind(num_classes=5)
        return made

    return Entry(name, "torchvision", family, make, inputs)


MODELS = [model(family, name, kind, inputs) for family, name, kind, inputs in NAMED]
