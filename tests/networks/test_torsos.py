"""Torsos: parameter counts, shapes and normalisation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mtrl_cli.networks.torsos import MLP, ImpalaCNN, MinAtarCNN, NatureCNN, Torso

ATARI = (4, 84, 84)


def module(torso: Torso, shape: tuple[int, ...]) -> nn.Sequential:
    return nn.Sequential(torso.stem(shape), torso.body(shape))


def parameters(torso: Torso, shape: tuple[int, ...]) -> int:
    return sum(parameter.numel() for parameter in module(torso, shape).parameters())


def test_nature_has_the_published_layers() -> None:
    # (4*8*8+1)*32 + (32*4*4+1)*64 + (64*3*3+1)*64 + (64*7*7+1)*512
    assert parameters(NatureCNN(), ATARI) == 8_224 + 32_832 + 36_928 + 1_606_144 == 1_684_128


def test_layer_norm_adds_two_parameters_per_channel_and_unit() -> None:
    assert parameters(NatureCNN(layer_norm=True), ATARI) == 1_684_128 + 2 * (32 + 64 + 64 + 512)


def test_nature_width_scales_channels() -> None:
    # (4*64+1)*16 + (16*16+1)*32 + (32*9+1)*32 + (32*49+1)*100
    assert parameters(NatureCNN(width=0.5, features=100), ATARI) == 4_112 + 8_224 + 9_248 + 156_900
    assert parameters(NatureCNN(width=0.001), ATARI) > 0  # at least one channel


def test_impala_has_the_published_layers() -> None:
    # Each block: one convolution and four more of its width. Images shrink 84, 42, 21, 11.
    blocks = (4 * 9 + 1) * 16 + 4 * (16 * 9 + 1) * 16 + (16 * 9 + 1) * 32 + 4 * (32 * 9 + 1) * 32 + 5 * (32 * 9 + 1) * 32
    assert parameters(ImpalaCNN(), ATARI) == blocks + (32 * 11 * 11 + 1) * 256 == 1_089_232


def test_impala_width_scales_channels() -> None:
    blocks = (4 * 9 + 1) * 32 + 4 * (32 * 9 + 1) * 32 + (32 * 9 + 1) * 64 + 4 * (64 * 9 + 1) * 64 + 5 * (64 * 9 + 1) * 64
    assert parameters(ImpalaCNN(width=2, features=10, layer_norm=True), ATARI) == blocks + (64 * 121 + 1) * 10 + 20


def test_minatar_has_the_published_layers() -> None:
    assert parameters(MinAtarCNN(), (4, 10, 10)) == (4 * 9 + 1) * 16 + (16 * 8 * 8 + 1) * 128


def test_mlp_has_the_configured_layers() -> None:
    assert parameters(MLP(hidden=[20, 30]), (5,)) == 6 * 20 + 21 * 30
    assert parameters(MLP(hidden=[20], layer_norm=True), (5,)) == 6 * 20 + 2 * 20


def test_empty_mlp_is_refused() -> None:
    with pytest.raises(ValueError, match=r"network\.hidden"):
        MLP(hidden=[])


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize(
    ("torso", "shape", "features"),
    [
        (NatureCNN, ATARI, {"features": 24}),
        (NatureCNN, (1, 50, 40), {"features": 24}),
        (ImpalaCNN, ATARI, {"features": 24}),
        (ImpalaCNN, (3, 21, 30), {"features": 24}),
        (MinAtarCNN, (7, 10, 10), {"features": 24}),
        (MLP, (5,), {"hidden": [10, 24]}),
        (MLP, (5,), {"hidden": [24]}),
    ],
)
def test_features_have_num_features_and_are_not_negative(torso: type, shape: tuple[int, ...], features: dict, layer_norm: bool) -> None:
    recipe = torso(**features, layer_norm=layer_norm)
    assert recipe.observation_kind == ("image" if len(shape) == 3 else "vector")
    out = module(recipe, shape)(torch.rand(2, *shape))
    assert out.shape == (2, recipe.num_features) == (2, 24)
    assert (out >= 0).all()
    assert out.any()


def test_normalised_convolution_equals_layer_norm_over_channels_and_positions() -> None:
    stem = NatureCNN(layer_norm=True).stem(ATARI)
    observation = torch.rand(3, *ATARI)
    plain = stem[0](observation)
    assert torch.allclose(stem(observation), torch.relu(nn.functional.layer_norm(plain, plain.shape[1:])), atol=1e-5)


def test_too_small_image_is_an_error_at_construction() -> None:
    with pytest.raises(RuntimeError):
        NatureCNN().body((4, 20, 20))
