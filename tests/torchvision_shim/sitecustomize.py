"""Loaded at Python's start: declares the operators that torchvision does not find beside a CPU build of torch."""

import torch

library = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    library.define(f"{name}(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")
