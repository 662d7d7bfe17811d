"""The networks of demo, examples and benchmarks, any depth and width: ResNet (He et al. 2016, section 4.2), VGG."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """relu(bn(conv(relu(bn(conv(x))))) + shortcut(x))."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """[n, inputs, h, w] → [n, outputs, h / stride, w / stride]."""
        hidden = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(hidden)) + self.shortcut(x))


class ResNet(nn.Module):
    """ResNet-(2·stages·blocks+2): blocks=1 is ResNet-8, blocks=3 ResNet-20; `width` channels in the first stage."""

    def __init__(self, blocks: int = 1, width: int = 16, channels: int = 3, classes: int = 10, stages: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        widths = [width] + [width * 2**stage for stage in range(stages) for _ in range(blocks)]
        strides = [2 if stage and not block else 1 for stage in range(stages) for block in range(blocks)]
        pairs = zip(widths, widths[1:], strides, strict=False)
        self.blocks = nn.Sequential(*(Block(inputs, outputs, stride) for inputs, outputs, stride in pairs))
        self.fc = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """[n, channels, h, w] → logits [n, classes]."""
        hidden = self.blocks(F.relu(self.bn(self.conv(x))))
        logits: Tensor = self.fc(hidden.mean((2, 3)))
        return logits


class VGG(nn.Sequential):
    """Simonyan and Zisserman 2015 for small images: two 3×3 convolutions with batch norm a stage, then pooling."""

    def __init__(self, width: int = 32, channels: int = 3, classes: int = 10, stages: int = 3) -> None:
        layers: list[nn.Module] = []
        for stage in range(stages):
            for _ in range(2):
                layers += [nn.Conv2d(channels, width << stage, 3, padding=1, bias=False)]
                layers += [nn.BatchNorm2d(width << stage), nn.ReLU()]
                channels = width << stage
            layers += [nn.MaxPool2d(2)]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def measure_accuracy(model: nn.Module, images: Tensor, labels: Tensor, batch: int = 500) -> float:
    """Return percent of labels that the model's largest output meets, in eval mode."""
    model.eval()
    images = images.to(memory_format=torch.channels_last) if images.ndim == 4 else images
    with torch.no_grad():
        pieces = zip(images.split(batch), labels.split(batch), strict=True)
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in pieces)
    return 100 * right / len(labels)
