"""Effects of sharing on a network: agreement of task gradients, and rank, dormancy and similarity of features."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mtrl_cli.agents.agent import Agent
from mtrl_cli.machine import rng
from mtrl_cli.metric_names import GRAD_CONFLICT, GRAD_COSINE, GRAD_NORM
from mtrl_cli.networks.per_task import Stacked
from mtrl_cli.replay.buffers import Replay, Samples
from mtrl_cli.task_weights.gradients import AutogradGradients
from mtrl_cli.training.heatmap import heatmap

DORMANT_TAU = 0.025  # Sokar et al. 2023, section 3
RANK_DELTA = 0.01  # Kumar et al. 2021, section 3
SAMPLES = 1024
"""Samples of all tasks for features. Gradients use the batch size of an update, and with many tasks at most this number."""
FEWEST_SAMPLES = 16
"""Lower bound on the samples of each task."""
FEWEST_POOLED = 2
"""Lower bound on the samples of each task that the paths of all tasks process."""
PAIRED_TASKS = 12
"""With more tasks, metrics of pairs are only in the picture."""
ROUTED_METRICS = 256
"""With more tasks times choices, a routing is only in its picture."""


@dataclass
class Report:
    """Metrics by name, and pictures (uint8 `[height, width, 3]`) by name."""

    metrics: dict[str, float] = field(default_factory=dict)
    pictures: dict[str, NDArray[np.uint8]] = field(default_factory=dict)


class Diagnostics:
    """Measures the agreement of task gradients and properties of features, on samples that no update has used.

    Gradients are those of the mean loss of each task over the shared parameters, before any task weight. A run without shared parameters
    has no metrics of gradients. A sample without a successor (a truncated step) has a loss of 0 in the mean. Features are the inputs of
    heads. The rank is at most the number of samples. Similarities (CKA) compare the features that the paths of two tasks compute of the
    same observations, some of each task; if observation shapes differ, each path reads its own part of the padded observation.

    Diagnostics have no state: samples depend on the seed, the step and the contents of the replay. A resumed run writes the same metrics,
    and training is not affected.

    Args:
        agent, replay: of the run.
        task_names: of its K tasks.
        seed: of the samples.
    """

    def __init__(self, agent: Agent, replay: Replay, task_names: Sequence[str], *, seed: int):
        self._agent = agent
        self._replay = replay
        self._task_names = list(task_names)
        self._seed = seed

    @property
    def ready(self) -> bool:
        """Whether the replay has samples."""
        first, stop = self._replay.eligible_rows
        return stop > first

    def report(self, step: int) -> Report:
        """Compute all metrics and pictures at a step (per task). Waits for the device."""
        generator = torch.Generator(self._replay.spec.device).manual_seed((self._seed + step) % 2**63)
        samples = max(FEWEST_SAMPLES, SAMPLES // len(self._task_names))
        report = Report()
        if self._agent.network.shared_parameters():
            self._describe_gradients(report, self._draw(min(samples, self._agent.batch_size), generator))
        observation = self._draw(samples, generator).observation.flatten(2, 3)
        with torch.no_grad():
            self._describe_features(report, observation)
            self._describe_similarity(report, observation)
            self._describe_routing(report, observation)
        return report

    def _draw(self, samples: int, generator: torch.Generator) -> Samples:
        """Draw samples of each task uniformly, without the random generator of the replay."""
        spec = self._replay.spec
        first, stop = self._replay.eligible_rows
        draw = torch.randint((stop - first) * spec.num_envs, (spec.num_tasks, samples), generator=generator, device=spec.device)
        return self._replay.gather(first + draw // spec.num_envs, draw % spec.num_envs, torch.ones(draw.shape, device=spec.device))

    def _describe_gradients(self, report: Report, batch: Samples) -> None:
        network, names = self._agent.network, self._task_names
        # Eager, because a compiled graph frees its buffers in the first backward pass, which other tasks need. The generator of dropout is
        # restored, so that the next update draws the same masks.
        with torch.compiler.set_stance("force_eager"), rng.kept(batch.action.device):
            loss_K = self._agent.losses(batch).loss_KB.mean(1)
        gram = AutogradGradients(loss_K, network.shared_parameters(), network.own_parameters()).gram()
        norms, cosines = norms_and_cosines(gram.double().cpu().numpy())
        report.metrics |= {f"{GRAD_NORM}/{name}": float(norm) for name, norm in zip(names, norms, strict=True)}
        pairs = self._report_pairs(report, GRAD_COSINE, f"{GRAD_COSINE}/mean", cosines)
        if pairs:
            report.metrics[GRAD_CONFLICT] = sum(cosine < 0 for cosine in pairs) / len(pairs)

    def _report_pairs(self, report: Report, name: str, mean: str, values_KK: NDArray[np.float64]) -> list[float]:
        """Report a metric of pairs of tasks: single values, mean and picture. Returns the finite values."""
        names = self._task_names
        pairs = {(a, b): float(values_KK[a, b]) for a, b in combinations(range(len(names)), 2) if np.isfinite(values_KK[a, b])}
        if pairs:
            report.metrics[mean] = sum(pairs.values()) / len(pairs)
            report.pictures[name] = heatmap(values_KK, names, names)
        if len(names) <= PAIRED_TASKS:
            report.metrics |= {f"{name}/{names[a]}~{names[b]}": value for (a, b), value in pairs.items()}
        return list(pairs.values())

    def _describe_features(self, report: Report, observation: torch.Tensor) -> None:
        network = self._agent.network
        with mean_activations(network.sharing) as activations:
            features_KBF = network.features(observation)
        # A structure without ReLU modules: use the features.
        activations = activations or [mean_activation(features_F) for features_F in features_KBF]
        norm_K = features_KBF.norm(dim=2).mean(1)
        report.metrics |= {f"features/norm/{name}": norm for name, norm in zip(self._task_names, norm_K.tolist(), strict=True)}
        report.metrics["features/norm"] = float(norm_K.mean())
        report.metrics["features/dormant"] = dormant_share(activations)
        if network.shared_parameters():
            report.metrics["features/rank"] = effective_rank(features_KBF.flatten(0, 1))
        for name, features_BF in zip(self._task_names, features_KBF, strict=True):
            report.metrics[f"features/rank/{name}"] = effective_rank(features_BF)

    def _describe_similarity(self, report: Report, observation: torch.Tensor) -> None:
        tasks = len(self._task_names)
        if tasks == 1:
            return
        pooled_M = observation[:, : max(FEWEST_POOLED, SAMPLES // tasks**2)].flatten(0, 1)
        features_KMF = self._agent.network.features(pooled_M.expand(tasks, *pooled_M.shape))
        self._report_pairs(report, "features/cka", "features/cka", similarity(features_KMF))

    def _describe_routing(self, report: Report, observation: torch.Tensor) -> None:
        for name, share_KC in self._agent.network.routing(observation).items():
            shares = share_KC.double().cpu().numpy()
            choices = [str(choice) for choice in range(shares.shape[1])]
            report.pictures[f"routing/{name}"] = heatmap(shares, self._task_names, choices)
            if shares.size <= ROUTED_METRICS:
                for task, row in zip(self._task_names, shares, strict=True):
                    report.metrics |= {f"routing/{name}/{task}/{choice}": float(share) for choice, share in zip(choices, row, strict=True)}


# -- mathematics --------------------------------------------------------------------------------------------------------------


def norms_and_cosines(gram_KK: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Norms `[K]` and cosines `[K, K]` of K vectors, from their inner products `[K, K]`; NaN for a zero vector."""
    norms = np.sqrt(np.maximum(np.diagonal(gram_KK), 0))
    with np.errstate(invalid="ignore", divide="ignore"):
        return norms, np.clip(gram_KK / np.outer(norms, norms), -1, 1)


def similarity(features_KMF: torch.Tensor) -> NDArray[np.float64]:
    """Debiased linear CKA `[K, K]` of features `[K, M, F]` of K networks for the same M > 3 samples (Kornblith et al. 2019, "Similarity of
    Neural Network Representations Revisited", section 3). Biased CKA is too large for few samples of many features.

    The similarity is 1 for features that are equal up to rotation and scale. The mean similarity of independent features is 0, so single
    values may be negative. Inner products over samples are centred so that their product is the unbiased estimate of HSIC (Song et al.
    2012, "Feature Selection via Dependence Maximization", equation 5; Szekely and Rizzo 2014, equation 2.5), as in Nguyen et al. 2021, "Do
    Wide and Deep Networks Learn the Same Things?", equation 3.

    NaN for features that are constant or not finite.
    """
    features = features_KMF.double()
    samples = features.shape[1]
    centred = features - features.mean(1, keepdim=True)
    varies_K = centred.flatten(1).norm(dim=1) > 1e-6 * features.flatten(1).norm(dim=1)  # below is rounding
    gram = (centred @ centred.mT) * (1 - torch.eye(samples, dtype=torch.float64, device=features.device))
    sums = gram.sum(2)
    means = sums / (samples - 2)
    gram = gram - means[:, :, None] - means[:, None] + (sums.sum(1) / ((samples - 1) * (samples - 2)))[:, None, None]
    gram.diagonal(dim1=1, dim2=2).zero_()
    flat = (gram * varies_K[:, None, None]).flatten(1)
    return norms_and_cosines((flat @ flat.T).cpu().numpy())[1]


def effective_rank(features_MF: torch.Tensor) -> float:
    """Number of singular values of features `[M, F]` that make up 99% of their sum: srank of Kumar et al. 2021, equation 1.

    At most min(M, F); 0 for features that are all zero, NaN for features that are not finite.
    """
    if not torch.isfinite(features_MF).all():
        return float("nan")
    features = features_MF.double()
    # Eigenvalues of the smaller product are the squared singular values, and faster to compute.
    product = features.T @ features if features.shape[0] > features.shape[1] else features @ features.T
    values = torch.linalg.eigvalsh(product).clamp_min(0).sqrt().flip(0)
    values = torch.where(values > values[0] * 1e-7, values, 0)  # below is rounding
    total = values.sum()
    return float((values.cumsum(0) < (1 - RANK_DELTA) * total).sum() + 1) if total > 0 else 0.0


def mean_activation(outputs: torch.Tensor) -> torch.Tensor:
    """Mean absolute output `[H]` of the H neurons of a layer: units of `[..., H]`, or channels of images `[M, H, height, width]`."""
    neuron = outputs.ndim - 3 if outputs.ndim >= 4 else outputs.ndim - 1
    return outputs.float().abs().movedim(neuron, -1).flatten(0, -2).mean(0)


def dormant_share(activations: Sequence[torch.Tensor], tau: float = DORMANT_TAU) -> float:
    """Share of dormant neurons: Sokar et al. 2023, definitions 3.1 and 3.2.

    Args:
        activations: mean absolute output of each neuron of each layer, `[H]`.
        tau: a neuron is dormant if its activation is at most this share of the mean of its layer.
    """
    dormant = sum(int((activation <= tau * activation.mean()).sum()) for activation in activations)
    return dormant / sum(activation.numel() for activation in activations)


@contextmanager
def mean_activations(module: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collect `mean_activation` of each `nn.ReLU` in a module, in the order of calls. Each `Stacked` module has separate neurons."""
    found: list[torch.Tensor] = []

    def record(layer: nn.Module, inputs: tuple[torch.Tensor], outputs: torch.Tensor) -> None:
        found.append(mean_activation(outputs))

    stacks = [each for each in module.modules() if isinstance(each, Stacked)]
    layers = [layer for within in (module, *(each.structure for each in stacks)) for layer in within.modules()]
    hooks = [layer.register_forward_hook(record) for layer in layers if isinstance(layer, nn.ReLU)]
    try:
        for each in stacks:
            each.one_by_one = True
        yield found
    finally:
        for each in stacks:
            each.one_by_one = False
        for hook in hooks:
            hook.remove()
