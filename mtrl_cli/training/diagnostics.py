"""What sharing does to a network: how the tasks' gradients agree, what has become of its features, and how alike those of two tasks are.

Everything is measured now and then, on samples of its own, and leaves no trace in what is learned.
"""

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
from mtrl_cli.metric_names import GRAD_CONFLICT, GRAD_COSINE, GRAD_NORM
from mtrl_cli.networks.per_task import Stacked
from mtrl_cli.replay.buffers import Batch, Replay
from mtrl_cli.task_weights.gradients import AutogradGradients
from mtrl_cli.training.heatmap import heatmap

DORMANT_TAU = 0.025  # Sokar et al. 2023, section 3
RANK_DELTA = 0.01  # Kumar et al. 2021, section 3
SAMPLES = 1024
"""In all: features are theirs, and gradients those of an update's batch or, with many tasks, of no more than these."""
FEWEST_SAMPLES = 16
"""Of each task, however many tasks there are."""
FEWEST_POOLED = 2
"""Of each task, where every task's path is shown the samples of all."""
PAIRED_TASKS = 12
"""With more tasks than these, the metrics of each pair are in the picture alone."""
ROUTED_FIGURES = 256
"""Where tasks times choices are more than these, a routing is in its picture alone."""


@dataclass
class Report:
    """Metrics by name, and pictures (uint8 `[height, width, 3]`) by name."""

    metrics: dict[str, float] = field(default_factory=dict)
    pictures: dict[str, NDArray[np.uint8]] = field(default_factory=dict)


class Diagnostics:
    """Looks at the network every so often, on samples that no update has chosen.

    Gradients are those of each task's mean loss over the parameters that tasks share, before any weight; what a run does not share has
    none. A sample without a successor (a truncated step) is in the mean with a loss of 0. Features are what heads read; ranks are at most
    the number of samples that they are of. Similarities (CKA) are between the features that two tasks' paths through the network make of
    the same observations, some of each task's; where tasks differ in observation shape, each path reads its own part of what is padded.

    Nothing here has state: which samples are drawn depends on the seed, the step and what the replay holds. So a run that was resumed
    writes the metrics that it would have written, and a run learns the same with and without them.

    Args:
        agent, replay: of the run.
        task_names: of its K tasks.
        every: steps per task from one look to the next; there is one at the end, too. 0: none at all.
        seed: of the samples.
        steps_per_tick: steps per task that a tick of the loop makes; None: as many as the replay has environments.
    """

    def __init__(
        self, agent: Agent, replay: Replay, task_names: Sequence[str], *, every: int, seed: int, steps_per_tick: int | None = None
    ):
        self._agent, self._replay, self._task_names = agent, replay, list(task_names)
        self._every, self._seed = every, seed
        self._steps_per_tick = steps_per_tick or replay.spec.num_envs

    def due(self, step: int, finished: bool) -> bool:
        """Whether to look at a step (per task), which the last tick led to."""
        before = step - self._steps_per_tick
        first, stop = self._replay.eligible_rows
        return self._every > 0 and stop > first and (finished or step // self._every > before // self._every)

    def report(self, step: int) -> Report:
        """All metrics and pictures at a step (per task). Waits for the device."""
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

    def _draw(self, samples: int, generator: torch.Generator) -> Batch:
        """Samples of each task, evenly from all that the replay holds; what the replay itself draws is not touched."""
        spec = self._replay.spec
        first, stop = self._replay.eligible_rows
        draw = torch.randint((stop - first) * spec.num_envs, (spec.num_tasks, samples), generator=generator, device=spec.device)
        return self._replay.gather(first + draw // spec.num_envs, draw % spec.num_envs, torch.ones(draw.shape, device=spec.device))

    def _describe_gradients(self, report: Report, batch: Batch) -> None:
        network, names = self._agent.network, self._task_names
        # A compiled graph gives its buffers away in its first backward pass, and has none left for a second task's.
        # Dropout, where the network has any, is drawn as an update draws it, and then drawn again by the next one.
        cuda = [batch.action.device] if batch.action.is_cuda else []
        with torch.compiler.set_stance("force_eager"), torch.random.fork_rng(devices=cuda):
            loss_K = self._agent.losses(batch).loss_KB.mean(1)
        gram = AutogradGradients(loss_K, network.shared_parameters(), network.own_parameters()).gram()
        norms, cosines = norms_and_cosines(gram.double().cpu().numpy())
        report.metrics |= {f"{GRAD_NORM}/{name}": float(norm) for name, norm in zip(names, norms, strict=True)}
        pairs = self._report_pairs(report, GRAD_COSINE, f"{GRAD_COSINE}/mean", cosines)
        if pairs:
            report.metrics[GRAD_CONFLICT] = sum(cosine < 0 for cosine in pairs) / len(pairs)

    def _report_pairs(self, report: Report, name: str, mean: str, values_KK: NDArray[np.float64]) -> list[float]:
        """Report a metric that each pair of tasks has: of each, as a mean, as a picture. Returns what is finite of it."""
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
        # What a structure does between its layers may be no ReLU's output, and its features are still what heads read.
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
            if shares.size <= ROUTED_FIGURES:
                for task, row in zip(self._task_names, shares, strict=True):
                    report.metrics |= {f"routing/{name}/{task}/{choice}": float(share) for choice, share in zip(choices, row, strict=True)}


# -- mathematics --------------------------------------------------------------------------------------------------------------


def norms_and_cosines(gram_KK: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Norms `[K]` and cosines `[K, K]` of K vectors, from their inner products `[K, K]`; NaN where a vector is zero."""
    norms = np.sqrt(np.maximum(np.diagonal(gram_KK), 0))
    with np.errstate(invalid="ignore", divide="ignore"):
        return norms, np.clip(gram_KK / np.outer(norms, norms), -1, 1)


def similarity(features_KMF: torch.Tensor) -> NDArray[np.float64]:
    """Linear CKA `[K, K]` of K networks' features `[K, M, F]` of the same M > 3 samples: Kornblith et al. 2019, "Similarity of Neural
    Network Representations Revisited", section 3, without its bias, which is large where samples are few beside features.

    It is 1 for features that are the same but for a rotation and a scale, and in the mean 0 for such that have nothing in common, so
    that it may come out below 0. Inner products over samples are centred so that their own product is the unbiased estimate of HSIC
    (Song et al. 2012, "Feature Selection via Dependence Maximization", equation 5; Szekely and Rizzo 2014, equation 2.5), as in
    Nguyen et al. 2021, "Do Wide and Deep Networks Learn the Same Things?", equation 3.

    NaN beside features that are the same for all samples, or not finite.
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
    """How many singular values of features `[M, F]` make up all but 1% of the sum of them: srank of Kumar et al. 2021, equation 1.

    At most the smaller of M and F; 0 for features that are all zero, NaN for such that are not finite.
    """
    if not torch.isfinite(features_MF).all():
        return float("nan")
    features = features_MF.double()
    # Eigenvalues of the smaller product are the squares of the singular values, and quicker.
    product = features.T @ features if features.shape[0] > features.shape[1] else features @ features.T
    values = torch.linalg.eigvalsh(product).clamp_min(0).sqrt().flip(0)
    values = torch.where(values > values[0] * 1e-7, values, 0)  # below is rounding
    total = values.sum()
    return float((values.cumsum(0) < (1 - RANK_DELTA) * total).sum() + 1) if total > 0 else 0.0


def mean_activation(outputs: torch.Tensor) -> torch.Tensor:
    """Mean size `[H]` of what each of a layer's H neurons gives: units of `[..., H]`, or channels of images `[M, H, height, width]`."""
    neuron = outputs.ndim - 3 if outputs.ndim >= 4 else outputs.ndim - 1
    return outputs.float().abs().movedim(neuron, -1).flatten(0, -2).mean(0)


def dormant_share(activations: Sequence[torch.Tensor], tau: float = DORMANT_TAU) -> float:
    """Share of a network's neurons that are dormant: Sokar et al. 2023, definitions 3.1 and 3.2.

    Args:
        activations: of each layer, the mean size of each neuron's output, `[H]`.
        tau: a neuron is dormant if its own is at most this share of its layer's mean.
    """
    dormant = sum(int((activation <= tau * activation.mean()).sum()) for activation in activations)
    return dormant / sum(activation.numel() for activation in activations)


@contextmanager
def mean_activations(module: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Gathers what `mean_activation` says of each `nn.ReLU` in a module, in the order in which they are called within.

    Each of the modules that are `Stacked` has layers, and so neurons, of its own.
    """
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
