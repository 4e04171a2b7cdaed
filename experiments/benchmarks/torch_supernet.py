"""A dynamic supernet in PyTorch, made as Once-for-All's (Cai et al. 2020, arXiv:1908.09791), to time ours against.

Eager PyTorch has no static shapes to mind: every layer slices its stored weights in each pass, by leading channels and
by the centre of the kernel window, and a shallower subnet leaves layers out. Subnets train by the sandwich rule with
distillation in place, and are evaluated with batch-norm statistics of their own. It is built from a space of ours whose
stages are `mbconv`, with the same weights under the same names, so that both sides are held to one answer
(tests/test_torch_supernet.py), and it does what makes it fast: `channels_last`, fused SGD, activations in place, no
running statistics in training, no gradients in evaluation.

Strided convolutions are padded symmetrically, which PyTorch does at no cost; ours are padded as by XLA. At stride 2 and
an even size each is the other's mirror image: `load` mirrors the kernels, and images that are mirrored give our logits.
"""

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from nas import config
from nas.ops import NORM_EPSILON, Act, Block, Conv
from nas.space import Space

FORMATS = {"channels_last": torch.channels_last, "default": torch.contiguous_format}
ACTIVATIONS = {
    "relu": torch.relu_,
    "relu6": lambda x: F.relu6(x, inplace=True),
    "hard_swish": F.hardswish,
    "swish": F.silu,
}


class DynamicConv(nn.Module):
    """SAME convolution with a part of its kernel [outputs, inputs, k, k]; depthwise where that has 1 input."""

    def __init__(self, outputs: int, inputs: int, kernel: int, *, stride: int, bias: bool):
        super().__init__()
        self.kernel = nn.Parameter(torch.zeros(outputs, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.stride = stride

    def forward(self, x: Tensor, outputs: int, kernel: int) -> Tensor:
        _, inputs, _, largest = self.kernel.shape
        depthwise = inputs == 1 < x.shape[1]
        window = slice((largest - kernel) // 2, (largest + kernel) // 2)
        weight = self.kernel[:outputs, : inputs if depthwise else x.shape[1], window, window]
        bias = None if self.bias is None else self.bias[:outputs]
        return F.conv2d(x, weight, bias, self.stride, kernel // 2, groups=outputs if depthwise else 1)


class DynamicNorm(nn.Module):
    """Batch norm of as many channels as come: by the batch's moments in training, else by those measured last."""

    share: float | None = None  # of the next batch in the moments that are being measured; None: none are
    biased = 1.0  # biased over unbiased variance; PyTorch measures the latter

    def __init__(self, channels: int):
        super().__init__()
        self.scale, self.offset = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("mean", torch.zeros(channels), persistent=False)
        self.register_buffer("var", torch.ones(channels), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        measured = None, None
        if self.share is not None:
            self.biased = 1 - n / x.numel()
        if self.share is not None or not self.training:
            measured = self.mean[:n], self.var[:n]
        return F.batch_norm(
            x, *measured, self.scale[:n], self.offset[:n], self.training, self.share or 0.0, NORM_EPSILON
        )


class Layer(NamedTuple):
    """What a subnet has of one block."""

    name: str
    convs: dict[str, tuple[int, int]]  # outputs and kernel, by name
    acts: list[str]

    @classmethod
    def of(cls, block: Block) -> "Layer":
        convs = {op.name: (op.shape[-1], op.kernel) for op in block.graph.ops if isinstance(op, Conv)}
        return cls(block.name, convs, [op.function for op in block.graph.ops if isinstance(op, Act)])


class DynamicBlock(nn.Module):
    """Room for any of `blocks`: their convolutions, each as large as in any of them, and the norms behind these."""

    def __init__(self, blocks: Sequence[Block]):
        super().__init__()
        largest: dict[str, tuple[int, ...]] = {}
        convs = [(block.graph, op) for block in blocks for op in block.graph.ops if isinstance(op, Conv)]
        for graph, op in convs:
            inputs = graph.shape_of(op.inputs[0])[-1] // op.groups
            largest[op.name] = tuple(map(max, (op.shape[-1], inputs, op.kernel), largest.get(op.name, (0, 0, 0))))
        for name, op in {op.name: op for _, op in convs}.items():
            self.add_module(name, DynamicConv(*largest[name], stride=op.stride, bias=op.bias))
            if not op.bias:
                self.add_module("norm" if name == "conv" else f"{name}_norm", DynamicNorm(largest[name][0]))


class Stem(DynamicBlock):
    """A `conv_stem`."""

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        return ACTIVATIONS[layer.acts[0]](self.norm(self.conv(x, *layer.convs["conv"])))


class MBConv(DynamicBlock):
    """An inverted residual, with squeeze-and-excite where the subnet has it."""

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        act, convs, y = ACTIVATIONS[layer.acts[0]], layer.convs, x
        if "expand" in convs:
            y = act(self.expand_norm(self.expand(y, *convs["expand"])))
        y = act(self.depthwise_norm(self.depthwise(y, *convs["depthwise"])))
        if "se_reduce" in convs:
            squeezed = torch.relu_(self.se_reduce(y.mean((2, 3), keepdim=True), *convs["se_reduce"]))
            y = y * F.hardsigmoid(self.se_expand(squeezed, *convs["se_expand"]))
        y = self.project_norm(self.project(y, *convs["project"]))
        return x + y if x.shape == y.shape else y


class Classifier(Stem):
    """A `classifier` of one width."""

    def __init__(self, blocks: Sequence[Block]):
        super().__init__(blocks)
        self.logits = nn.Linear(self.conv.kernel.shape[0], blocks[0].graph.shape[-1])

    def forward(self, x: Tensor, layer: Layer) -> Tensor:
        return self.logits(super().forward(x, layer).mean((2, 3)))


KINDS = {"conv_stem": Stem, "mbconv": MBConv, "classifier": Classifier}


class DynamicSupernet(nn.Module):
    """All weights of `space`, whose blocks must be among `KINDS`."""

    def __init__(self, space: Space):
        super().__init__()
        for position in space.positions:
            blocks = [block for block in position.branches if block is not None]
            self.add_module(blocks[0].name, KINDS[blocks[0].name.rpartition("/")[2]](blocks))

    def forward(self, x: Tensor, subnet: list[Layer]) -> Tensor:
        """Logits of images [n, channels, height, width]."""
        for layer in subnet:
            x = self.get_submodule(layer.name)(x, layer)
        return x

    def load(self, params: Mapping[str, np.ndarray]) -> None:
        """Takes over the trained arrays of `nas.supernet.Supernet`, kernels mirrored."""
        for name, mine in self.named_parameters():
            array = params[name.replace("weight", "kernel").replace(".", "/")]
            array = array[::-1, ::-1].transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
            with torch.no_grad():
                mine.copy_(torch.from_numpy(np.ascontiguousarray(array)))


class Peer:
    """A supernet with its optimiser: the training step and the evaluation that are timed, in seconds.

    Images come normalised and in `images`' format; what a timing includes is what ours includes.
    """

    def __init__(self, space: Space, params: Mapping[str, np.ndarray], settings: config.Optimiser, *, form: str):
        self.space, self.form, self.clip_norm = space, FORMATS[form], settings.clip_norm
        self.net, self.params = DynamicSupernet(space).to(memory_format=self.form), params
        self.net.load(params)
        named = dict(self.net.named_parameters())
        kernels = {name for name in named if name.endswith(("kernel", "weight"))}
        groups = [
            {"params": [p for name, p in named.items() if name in kernels], "weight_decay": settings.weight_decay},
            {"params": [p for name, p in named.items() if name not in kernels]},
        ]
        self.optimiser = torch.optim.SGD(
            groups, lr=settings.learning_rate, momentum=settings.momentum, nesterov=True, fused=True
        )

    def subnet(self, genotype: np.ndarray) -> list[Layer]:
        return [Layer.of(block) for block in self.space.decode(genotype).blocks]

    def images(self, images: np.ndarray) -> Tensor:
        """[..., height, width, channels] -> [..., channels, height, width]."""
        return torch.from_numpy(images).movedim(-1, -3)

    def train(self, genotypes: np.ndarray, images: np.ndarray, labels: np.ndarray) -> float:
        """One update by the sum of the gradients of subnets [k, genes]; the first teaches the others (KL)."""
        subnets = [self.subnet(g) for g in genotypes]
        self.net.train()
        start = time.perf_counter()
        x = self.images(images).contiguous(memory_format=self.form)
        targets = torch.from_numpy(labels).long()
        self.optimiser.zero_grad(set_to_none=True)
        teacher: Tensor | None = None
        for subnet in subnets:
            logits = self.net(x, subnet)
            if teacher is None:
                loss, teacher = F.cross_entropy(logits, targets), logits.detach().log_softmax(-1)
            else:
                loss = F.kl_div(logits.log_softmax(-1), teacher, reduction="batchmean", log_target=True)
            loss.backward()
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.net.parameters(), self.clip_norm)
        self.optimiser.step()
        return time.perf_counter() - start

    def keep(self, calibration: np.ndarray, images: np.ndarray, labels: np.ndarray) -> None:
        """What `evaluate` works on, in batches as `nas.evaluate.batches` makes them; takes up the first weights."""
        self.net.load(self.params)
        self.calibration, self.tests = (
            [batch.contiguous(memory_format=self.form) for batch in self.images(batches)]
            for batches in (calibration, images)
        )
        self.labels = torch.from_numpy(labels)

    @torch.inference_mode()
    def evaluate(self, genotypes: np.ndarray) -> tuple[float, list[int]]:
        """Correct answers of each genotype, by batch-norm statistics of its own."""
        start = time.perf_counter()
        correct = []
        for genotype in genotypes:
            subnet = self.subnet(genotype)
            self.calibrate(subnet, self.calibration)
            answers = (self.net(x, subnet).argmax(-1) for x in self.tests)
            correct.append(sum(int((a == t).sum()) for a, t in zip(answers, self.labels, strict=True)))
        return time.perf_counter() - start, correct

    def calibrate(self, subnet: list[Layer], batches: list[Tensor]) -> None:
        """Batch-norm statistics of `subnet`: means over batches of their means and biased variances."""
        norms = [module for module in self.net.modules() if isinstance(module, DynamicNorm)]
        self.net.train()
        for number, batch in enumerate(batches, start=1):
            for norm in norms:
                norm.share = 1 / number
            self.net(batch, subnet)
        self.net.eval()
        for norm in norms:
            norm.share = None
            norm.var *= norm.biased

    @torch.inference_mode()
    def size(self, genotype: np.ndarray) -> tuple[int, int]:
        """Multiply-accumulates for one image, and parameters: what PyTorch is seen to compute, and to compute with."""
        self.net.eval()
        height, width, channels = self.space.input
        with FlopCounterMode(display=False) as flops, Read() as read:
            self.net(torch.zeros(1, channels, height, width), self.subnet(genotype))
        return flops.get_total_flops() // 2, read.elements


class Read(TorchFunctionMode):
    """Counts the elements of the weights that layers are called with."""

    elements = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (F.conv2d, F.linear):
            self.elements += sum(weight.numel() for weight in args[1:3] if weight is not None)
        elif function is F.batch_norm:
            self.elements += kwargs["weight"].numel() + kwargs["bias"].numel()
        return function(*args, **kwargs)
