"""The bundle `watch_cnn` in torch, for the peers' environments; `simulation_job.SHAPES` says what it must have."""

from __future__ import annotations

import simulation_job as jobs
import torch
from torch import nn


class WatchCnn(nn.Module):
    """Input float32 ``[B, 6, 128]``: torch convolves along the last axis; windows are turned before the clock runs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = nn.Conv1d(jobs.CHANNELS, jobs.FILTERS, jobs.KERNEL)
        self.conv2 = nn.Conv1d(jobs.FILTERS, jobs.FILTERS, jobs.KERNEL)
        self.hidden = nn.Linear(jobs.FILTERS, jobs.HIDDEN)
        self.logits = nn.Linear(jobs.HIDDEN, jobs.CLASSES)
        scale = torch.tensor(jobs.CHANNEL_SCALE)[:, None]
        self.register_buffer("scale", scale, persistent=False)  # a constant of the graph; it is not sent
        if (count := sum(parameter.numel() for parameter in self.parameters())) != jobs.CNN_PARAMETERS:
            raise jobs.JobError(f"The network must have {jobs.CNN_PARAMETERS} parameters, not {count}.")

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        """Logits ``[B, 7]``."""
        features = nn.functional.max_pool1d(torch.relu(self.conv1(windows / self.scale)), 2)
        pooled = torch.relu(self.conv2(features)).mean(dim=2)
        return self.logits(torch.relu(self.hidden(pooled)))

    def loss(self, windows: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy; pfl asks for it by this name."""
        return nn.functional.cross_entropy(self(windows), labels)


class FlatModel(nn.Module):
    """One vector that nobody trains."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.from_numpy(jobs.flat_parameters(count)))


def tensors(client: int, *, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A client's windows float32 ``[256, 6, 128]`` and labels int64 ``[256]``."""
    windows, labels = jobs.client_windows(client, seed=seed)
    return torch.from_numpy(windows).transpose(1, 2).contiguous(), torch.from_numpy(labels).long()


def loss_of(model: WatchCnn, *, seed: int) -> float:
    """On the first client's windows."""
    with torch.no_grad():
        return float(model.loss(*tensors(0, seed=seed)))
