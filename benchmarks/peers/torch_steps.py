"""The step in PyTorch, and with Opacus; a script for the ``torch`` environment, see ``serve`` for what it says.

The private modes are what ``PrivacyEngine.make_private`` returns, used as its documentation has it: zero_grad, loss,
backward, step, the accountant's hook included. Only the data loader stays unused, because its cost is not the step's.
``hooks``: per-example gradients by Opacus' hand-written rules. ``functorch``: by ``vmap(grad)``. ``ew``: by PyTorch's
expanded weights. ``ghost``: norms first, then a second, weighted backward pass; Opacus has such norms for linear layers
and falls back to per-example gradients for convolutions.
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import warnings

import serve
import torch
from opacus import PrivacyEngine
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

CLASSES, CHANNELS, WINDOW = 6, 6, 128
PACKAGES = ("torch", "opacus", "numpy")


def main() -> None:
    """Serve."""
    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    warnings.simplefilter("ignore")  # Opacus: full backward hooks, no secure random numbers
    logging.getLogger("opacus").setLevel(logging.ERROR)
    private = {
        mode: serve.Mode(functools.partial(private_trainer, mode), private=True)
        for mode in ("hooks", "functorch", "ew", "ghost")
    }
    serve.main(
        serve.Library(
            versions={name: importlib.metadata.version(name) for name in PACKAGES} | {"torch": torch.__version__},
            parameters=sum(parameter.numel() for parameter in network().parameters()),
            modes={"plain": serve.Mode(plain_trainer, private=False), **private},
            naive_gradients=naive_gradients,
        )
    )


def network() -> nn.Sequential:
    """The CNN, always with the same initial parameters; input [B, 6, 128]."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv1d(CHANNELS, 32, 5),
        nn.ReLU(),
        nn.MaxPool1d(2),
        nn.Conv1d(32, 32, 5),
        nn.ReLU(),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(32, 64),
        nn.ReLU(),
        nn.Linear(64, CLASSES),
    )


def batch(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows and labels; a smaller batch is the beginning of a larger one."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(serve.TIMED.batch_size, CHANNELS, WINDOW, generator=generator)
    y = torch.randint(CLASSES, (serve.TIMED.batch_size,), generator=generator)
    return x[:size].clone(), y[:size].clone()


def plain_trainer(setting: serve.Setting) -> serve.Trainer:
    """Mean loss, backward, SGD."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=setting.learning_rate)
    return trainer(model, optimizer, nn.CrossEntropyLoss(), setting)


def private_trainer(mode: str, setting: serve.Setting) -> serve.Trainer:
    """The same under Opacus."""
    module = network()
    made = PrivacyEngine().make_private(
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=setting.learning_rate),
        criterion=nn.CrossEntropyLoss(),
        data_loader=DataLoader(TensorDataset(*batch(setting.batch_size)), batch_size=setting.batch_size),
        noise_multiplier=setting.noise_multiplier,
        max_grad_norm=setting.clip,
        poisson_sampling=False,
        grad_sample_mode=mode,
    )
    model, optimizer = made[:2]
    criterion = made[2] if mode == "ghost" else nn.CrossEntropyLoss()
    return trainer(model, optimizer, criterion, setting)


def trainer(
    model: nn.Module, optimizer: torch.optim.Optimizer, criterion: nn.Module, setting: serve.Setting
) -> serve.Trainer:
    """The training loop's body, as every mode has it."""
    x, y = batch(setting.batch_size)

    def step() -> None:
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()

    return serve.Trainer(step, lambda: flat([parameter.detach() for parameter in model.parameters()]))


def naive_gradients(examples: int) -> list[list[float]]:
    """One backward pass for every example."""
    model = network()
    x, y = batch(examples)
    gradients = []
    for number in range(examples):
        loss = nn.functional.cross_entropy(model(x[number : number + 1]), y[number : number + 1])
        gradients.append(flat(torch.autograd.grad(loss, list(model.parameters()))))
    return gradients


def flat(tensors: list[torch.Tensor] | tuple[torch.Tensor, ...]) -> list[float]:
    """One after the other."""
    values: list[float] = torch.cat([tensor.reshape(-1) for tensor in tensors]).tolist()
    return values


if __name__ == "__main__":
    main()
