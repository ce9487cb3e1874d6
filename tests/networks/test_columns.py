"""Cross-stitch networks and MTAN, against loops over tasks, columns and positions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mtrl_cli.networks.columns import MTAN, CrossStitch
from mtrl_cli.networks.per_task import PerTask, Stacked
from mtrl_cli.networks.sharing import IndependentSharing, blocks_of
from mtrl_cli.networks.torsos import MLP, ImpalaCNN, MinAtarCNN, Torso
from tests.helpers.structures import IMAGES, VECTORS, Shapes, UngroupedTorso, counts, observations, stem_of_task, unstacked

CASES = [
    (MLP(hidden=[8, 7, 5]), VECTORS),
    (MLP(hidden=[8, 7, 5], layer_norm=True), [(4,)] * 3),
    (MinAtarCNN(channels=3, features=5), IMAGES),
    (ImpalaCNN(features=5), [(4, 9, 9)] * 3),
    (UngroupedTorso(), [(4,)] * 3),
]

# -- cross-stitch ---------------------------------------------------------------------------------------------------------------


def layers_of_columns(sharing: CrossStitch, torso: Torso, shapes: Shapes) -> list[list[nn.Module]]:
    """By layer, then by column."""
    alike = len(set(shapes)) == 1
    columns = []
    for column in range(len(shapes)):
        layers = [*([torso.stem(shapes[0])] if alike else []), *blocks_of(torso.body(shapes[0]))]
        columns.append([unstacked(layer, stacked, column) for layer, stacked in zip(layers, stacks(sharing), strict=True)])
    return [list(layer) for layer in zip(*columns, strict=True)]


def stacks(sharing: CrossStitch) -> list[Stacked]:
    return [each for each in sharing.columns if isinstance(each, Stacked)]


@pytest.mark.parametrize(("torso", "shapes"), CASES)
def test_cross_stitch_mixes_columns_after_every_block(torso: Torso, shapes: Shapes) -> None:
    sharing, observation = CrossStitch(torso, shapes), observations(shapes)
    assert sharing.last_mixing is not None
    with torch.no_grad():
        for parameter in [*sharing.mixing, sharing.last_mixing.vectors]:
            parameter.normal_()
    features = sharing(observation)
    layers = layers_of_columns(sharing, torso, shapes)
    matrices = [*sharing.mixing, sharing.last_mixing.vectors]
    for task, shape in enumerate(shapes):
        x = observation[task, :, : shape[0]]
        if isinstance(sharing.stem, PerTask):
            x = stem_of_task(sharing, torso, shapes, task)(x)
        read = [x] * 3
        for columns, matrix in zip(layers, matrices, strict=True):
            passed = [column(each) for column, each in zip(columns, read, strict=True)]
            read = [sum((matrix[i, j] * passed[j] for j in range(3)), torch.zeros(())) for i in range(3)]
        assert torch.allclose(features[task], read[task], atol=1e-4)


def test_cross_stitch_with_identity_mixing_equals_independent() -> None:
    torso, shapes = MLP(hidden=[8, 5]), [(4,)] * 3
    sharing, independent = CrossStitch(torso, shapes, self_weight=1.0), IndependentSharing(torso, shapes)
    with torch.no_grad():
        for index, stacked in enumerate(sharing.columns):
            for name, parameter in stacked.named_parameters():
                prefix = "stacked.0:" if index == 0 else "stacked.1:"
                # A block of the body is a sequence in a sequence: 0:0:weight instead of 0:weight.
                independent.torsos.get_parameter(prefix + name.removeprefix("stacked.")).copy_(parameter)
    observation = observations(shapes)
    assert torch.allclose(sharing(observation), independent(observation), atol=1e-6)


@pytest.mark.parametrize("self_weight", [0.9, 0.4])
def test_cross_stitch_rows_start_near_identity_and_sum_to_one(self_weight: float) -> None:
    sharing = CrossStitch(MLP(hidden=[8, 7, 5]), [(4,)] * 4, self_weight=self_weight)
    assert len(sharing.mixing) == 2
    assert sharing.last_mixing is not None
    for matrix in [*sharing.mixing, sharing.last_mixing.vectors]:
        assert torch.allclose(matrix.diag(), torch.full((4,), self_weight))
        assert torch.allclose(matrix.sum(1), torch.ones(4))
        assert len(matrix.unique()) == 2
    alone_ = CrossStitch(MLP(hidden=[8]), [(4,)], self_weight=self_weight)
    assert alone_.last_mixing is not None
    assert alone_.last_mixing.vectors.tolist() == [[1.0]]


def test_cross_stitch_parameter_counts() -> None:
    """K torsos, a K x K matrix after each block except the last, and a row per task after the last."""
    torso = 4 * 8 + 8 + 8 * 7 + 7 + 7 * 5 + 5
    assert counts(CrossStitch(MLP(hidden=[8, 7, 5]), [(4,)] * 3)) == (3 * torso + 2 * 9, [3] * 3)
    body = 8 * 7 + 7 + 7 * 5 + 5
    assert counts(CrossStitch(MLP(hidden=[8, 7, 5]), VECTORS)) == (3 * body + 9, [40 + 3, 56 + 3, 24 + 3])
    assert counts(CrossStitch(MLP(hidden=[8]), VECTORS)) == (0, [40, 56, 24])


# -- MTAN -----------------------------------------------------------------------------------------------------------------------


def mask_by_hand(attention: nn.Module, task: int, x: torch.Tensor) -> torch.Tensor:
    """Convolution of kernel 1, position by position."""
    hidden = attention.get_parameter("hidden.weight")[task], attention.get_parameter("hidden.bias")[task, 0]
    mask = attention.get_parameter("mask.weight")[task], attention.get_parameter("mask.bias")[task, 0]
    if x.dim() == 4:
        kernels = [(weight.T[:, :, None, None], bias) for weight, bias in (hidden, mask)]
        return nn.functional.conv2d(nn.functional.conv2d(x, *kernels[0]).relu(), *kernels[1]).sigmoid()
    return ((x @ hidden[0] + hidden[1]).relu() @ mask[0] + mask[1]).sigmoid()


@pytest.mark.parametrize(("torso", "shapes"), CASES)
def test_mtan_masks_shared_features_of_every_block(torso: Torso, shapes: Shapes) -> None:
    sharing, observation = MTAN(torso, shapes), observations(shapes)
    features = sharing(observation)
    assert len(sharing.attentions) == len(sharing.blocks) + 1
    for task, shape in enumerate(shapes):
        shared = stem_of_task(sharing, torso, shapes, task)(observation[task, :, : shape[0]])
        masked = shared * mask_by_hand(sharing.attentions[0], task, shared)
        for index, (block, bridge) in enumerate(zip(sharing.blocks, sharing.bridges, strict=True), 1):
            shared = block(shared)
            mask = mask_by_hand(sharing.attentions[index], task, torch.cat([shared, bridge(masked)], 1))
            assert ((mask > 0) & (mask < 1)).all()
            masked = mask * shared
        assert torch.allclose(features[task], masked, atol=1e-5)


def test_mtan_masks_belong_to_one_task() -> None:
    sharing, same = MTAN(MLP(hidden=[8, 5]), [(4,)] * 2), torch.randn(1, 6, 4).expand(2, -1, -1)
    features = sharing(same)
    assert not torch.allclose(features[0], features[1])
    with torch.no_grad():
        for attention in sharing.attentions:
            for parameter in attention.parameters():
                parameter[1] = parameter[0]
    features = sharing(same)
    assert torch.allclose(features[0], features[1], atol=1e-6)


def test_mtan_parameter_counts() -> None:
    """Shared: a torso and a second body.

    Per task and block: two layers of the block's width; after the stem, the first reads twice the channels.
    """
    body = 8 * 7 + 7 + 7 * 5 + 5
    masks = (8 * 8 + 8) * 2 + (14 * 7 + 7) + (7 * 7 + 7) + (10 * 5 + 5) + (5 * 5 + 5)
    assert counts(MTAN(MLP(hidden=[8, 7, 5]), [(4,)] * 2)) == (4 * 8 + 8 + 2 * body, [masks] * 2)
    assert counts(MTAN(MLP(hidden=[8, 7, 5]), VECTORS)) == (2 * body, [40 + masks, 56 + masks, 24 + masks])
    # MinAtar: 3 channels of 8 x 8, then 5 features.
    body = 3 * 8 * 8 * 5 + 5
    masks = (3 * 3 + 3) * 2 + (10 * 5 + 5) + (5 * 5 + 5)
    assert counts(MTAN(MinAtarCNN(channels=3, features=5), IMAGES[:1] * 2)) == (4 * 9 * 3 + 3 + 2 * body, [masks] * 2)
