"""Input adapters, task embedding and FiLM, against loops over tasks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mtrl_cli.networks.adapters import FiLM, InputAdapters, TaskEmbedding
from mtrl_cli.networks.sharing import HardSharing
from mtrl_cli.networks.torsos import MLP, MinAtarCNN, NatureCNN, Torso
from tests.helpers.structures import IMAGES, VECTORS, Shapes, UngroupedTorso, counts, observations, stem_of_task, unstacked

CASES = [
    (MLP(hidden=[8, 7, 5]), VECTORS),
    (MLP(hidden=[8, 5]), [(4,)] * 3),
    (MinAtarCNN(channels=3, features=5, layer_norm=True), IMAGES),
    (NatureCNN(features=5, width=0.1), [(4, 36, 36)] * 3),
]


@pytest.mark.parametrize(("torso", "shapes"), CASES)
def test_input_adapters_apply_the_tasks_stem_then_the_shared_body(torso: Torso, shapes: Shapes) -> None:
    sharing, observation = InputAdapters(torso, shapes), observations(shapes)
    features = sharing(observation)
    for task, shape in enumerate(shapes):
        expected = sharing.body(unstacked(torso.stem(shape), sharing.stem, task)(observation[task, :, : shape[0]]))
        assert torch.allclose(features[task], expected, atol=1e-5)


def test_input_adapters_parameter_counts() -> None:
    assert counts(InputAdapters(MLP(hidden=[8, 5]), VECTORS)) == (8 * 5 + 5, [4 * 8 + 8, 6 * 8 + 8, 2 * 8 + 8])
    alike = InputAdapters(MLP(hidden=[8, 5]), [(4,)] * 2)
    assert counts(alike) == (8 * 5 + 5, [40, 40])
    same = torch.randn(1, 6, 4).expand(2, -1, -1)
    assert not torch.allclose(*alike(same))


@pytest.mark.parametrize(("torso", "shapes"), CASES)
def test_joint_layer_reads_features_and_the_task_embedding(torso: Torso, shapes: Shapes) -> None:
    sharing, observation = TaskEmbedding(torso, shapes, size=3), observations(shapes)
    features = sharing(observation)
    for task, shape in enumerate(shapes):
        encoded = sharing.body(stem_of_task(sharing, torso, shapes, task)(observation[task, :, : shape[0]]))
        vector = sharing.embedding.vectors[task]
        joined = torch.stack([torch.cat([each, vector]) for each in encoded])
        assert torch.allclose(features[task], sharing.joint(joined).relu(), atol=1e-5)


def test_task_embedding_parameter_counts() -> None:
    body, joint = 8 * 5 + 5, (5 + 3) * 5 + 5
    assert counts(TaskEmbedding(MLP(hidden=[8, 5]), [(4,)] * 2, size=3)) == (4 * 8 + 8 + body + joint, [3, 3])
    assert counts(TaskEmbedding(MLP(hidden=[8, 5]), VECTORS, size=3)) == (body + joint, [40 + 3, 56 + 3, 24 + 3])


@pytest.mark.parametrize(("torso", "shapes"), CASES)
def test_film_scales_and_shifts_each_block_per_task(torso: Torso, shapes: Shapes) -> None:
    sharing, observation = FiLM(torso, shapes), observations(shapes)
    with torch.no_grad():
        for modulation in sharing.modulations:
            for parameter in modulation.parameters():
                parameter.normal_()
    features = sharing(observation)
    for task, shape in enumerate(shapes):
        x = stem_of_task(sharing, torso, shapes, task)(observation[task, :, : shape[0]])
        for block, modulation in zip(torso.body(shapes[0]), sharing.modulations, strict=True):
            block.load_state_dict(sharing.get_submodule(f"blocks.{list(sharing.modulations).index(modulation)}.0").state_dict())
            x = block(x)
            scale, shift = modulation.get_parameter("scale.vectors")[task], modulation.get_parameter("shift.vectors")[task]
            x = torch.stack([scale[channel] * x[:, channel] + shift[channel] for channel in range(x.shape[1])], 1)
        assert torch.allclose(features[task], x, atol=1e-4)


@pytest.mark.parametrize(("torso", "shapes"), [*CASES, (UngroupedTorso(), VECTORS), (MLP(hidden=[8]), VECTORS)])
def test_film_starts_as_hard_sharing(torso: Torso, shapes: Shapes) -> None:
    film, hard = FiLM(torso, shapes), HardSharing(torso, shapes)
    hard.stem.load_state_dict(film.stem.state_dict())
    children = [child for block in film.blocks.children() for child in block.children()]
    hard.body.load_state_dict(nn.Sequential(*children).state_dict())
    observation = observations(shapes)
    assert torch.allclose(film(observation), hard(observation), atol=1e-6)


def test_film_parameter_counts() -> None:
    """Two numbers for each channel of each block."""
    stem, body = 4 * 8 + 8, 8 * 7 + 7 + 7 * 5 + 5
    assert counts(FiLM(MLP(hidden=[8, 7, 5]), [(4,)] * 2)) == (stem + body, [2 * (7 + 5)] * 2)
    assert counts(FiLM(MLP(hidden=[8, 7, 5]), VECTORS)) == (body, [40 + 24, 56 + 24, 24 + 24])
    # Nature: 32 channels in the stem, then 64, 64, and 512 features.
    assert counts(FiLM(NatureCNN(), [(4, 84, 84)] * 2)) == (1_684_128, [2 * (64 + 64 + 512)] * 2)
    # Separate activations join the layer before them. Without a body, the 8 units of the stem are modulated.
    assert counts(FiLM(UngroupedTorso(), VECTORS))[1] == [40 + 2 * (7 + 7 + 6), 56 + 40, 24 + 40]
    assert counts(FiLM(MLP(hidden=[8]), [(4,)] * 2)) == (40, [16, 16])
