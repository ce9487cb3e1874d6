"""Augmentations: hand-computed results, comparisons with torch and kornia, and random draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mtrl_cli.augmentation.base import Augmentation, ObservationSpec, Pipeline
from mtrl_cli.augmentation.geometry import Crop, Rotate, Scale, Shift, auto_pad, looked_up, padded_windows, shifted, turned
from mtrl_cli.augmentation.mirror import Flip
from mtrl_cli.augmentation.pixels import NOISE_TABLE, Blur, Cutout, Intensity, Noise, blurred, brightened, cut_out, with_noise
from mtrl_cli.machine import cuda_graphs
from mtrl_cli.replay.types import Batch, Samples
from tests.helpers.recorded_operations import RecordedOperations

ATARI, TINY, VECTOR = (1, 40, 36), (6, 10, 10), (5,)
MAKE: dict[str, Callable[[ObservationSpec], Augmentation]] = {
    "shift": lambda spec: Shift(spec, pad=3),
    "crop": lambda spec: Crop(spec, share=0.8),
    "rotate": lambda spec: Rotate(spec, degrees=20.0),
    "scale": lambda spec: Scale(spec, low=0.7, high=1.4),
    "flip": lambda spec: Flip(spec, probability=0.5),
    "cutout": lambda spec: Cutout(spec, least=0.2, most=0.5),
    "noise": lambda spec: Noise(spec, std=0.1),
    "intensity": lambda spec: Intensity(spec, scale=0.3),
    "blur": lambda spec: Blur(spec, low=0.1, high=1.5),
}
WEAKEST: dict[str, Callable[[ObservationSpec], Augmentation]] = {
    "shift": lambda spec: Shift(spec, pad=0),
    "crop": lambda spec: Crop(spec, share=1.0),
    "rotate": lambda spec: Rotate(spec, degrees=0.0),
    "scale": lambda spec: Scale(spec, low=1.0, high=1.0),
    "flip": lambda spec: Flip(spec, probability=0.0),
    "cutout": lambda spec: Cutout(spec, least=0.0, most=0.0),
    "noise": lambda spec: Noise(spec, std=0.0),
    "intensity": lambda spec: Intensity(spec, scale=0.0),
    "blur": lambda spec: Blur(spec, low=0.0, high=0.0),
}
EVERY = pytest.mark.parametrize("name", MAKE)


def spec(shape: tuple[int, ...] = ATARI, **changes: Any) -> ObservationSpec:
    """Two tasks; the second has fewer channels if there are several."""
    values: dict[str, Any] = {
        "kind": "vector" if len(shape) == 1 else "image",
        "frame_shape": shape,
        "own_sizes": (shape[0], max(1, shape[0] - 2)),
        "largest": 1.0 if shape != ATARI else 255.0,
        "task_names": ("breakout", "seaquest"),
        "actions": (("NOOP", "RIGHT", "LEFT"), ("NOOP", "FIRE", "UPLEFT", "UPRIGHT")),
        "symmetric": (True, True),
        "device": torch.device("cpu"),
        "seed": 7,
    }
    return ObservationSpec(**values | changes)


def observations(shape: tuple[int, ...] = ATARI, samples: int = 16, stack: int = 4, seed: int = 0) -> torch.Tensor:
    """Noise `[2, samples, stack, *shape]`; the padding of the second task is zero."""
    random = torch.Generator().manual_seed(seed)
    size = (2, samples, stack, *shape)
    if len(shape) == 1:
        made = torch.rand(size, generator=random)
    else:
        made = torch.randint(256 if shape == ATARI else 2, size, dtype=torch.uint8, generator=random)
    if shape[0] > 1:
        made[1, :, :, shape[0] - 2 :] = 0
    return made


def batch(shape: tuple[int, ...] = ATARI, samples: int = 16, stack: int = 4) -> Batch:
    return Batch(
        observation=observations(shape, samples, stack),
        action=torch.arange(2 * samples).view(2, samples) % 3,
        rewards=torch.ones(2, samples, 1),
        steps=torch.ones(2, samples, dtype=torch.int64),
        terminated=torch.zeros(2, samples, dtype=torch.bool),
        next_observation=observations(shape, samples, stack),
        weight=torch.ones(2, samples),
        index=torch.zeros(2, samples, dtype=torch.int64),
    )


# -- properties of all augmentations --------------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("shape", [ATARI, TINY])
def test_zero_strength_changes_nothing(name: str, shape: tuple[int, ...]) -> None:
    given = batch(shape)
    result = WEAKEST[name](spec(shape))(given)
    assert torch.equal(result.observation.to(torch.uint8), given.observation)
    assert torch.equal(result.next_observation.to(torch.uint8), given.next_observation)
    assert torch.equal(result.action, given.action)


@EVERY
def test_one_draw_per_sample_for_all_frames_of_its_stack(name: str) -> None:
    given = batch()
    same = observations(samples=1, stack=1).expand(-1, 16, 4, -1, -1, -1)
    given.observation, given.next_observation = same.clone(), same.clone()
    result = MAKE[name](spec())(given)
    for changed in (result.observation, result.next_observation):
        assert changed.shape == same.shape
        assert changed.dtype == torch.uint8
        assert (changed == changed[:, :, :1]).all()
    different = (result.observation[:, :, None, 0] != result.observation[:, None, :, 0]).flatten(3).any(3)
    assert different.float().mean() > (0.4 if name == "flip" else 0.7)
    unlike = (result.observation != result.next_observation).flatten(2).any(2).float().mean()
    assert unlike == 0 if name == "flip" else unlike > 0.7  # a transition is mirrored as a whole


@EVERY
def test_restored_state_repeats_the_draws(name: str) -> None:
    augmentation = MAKE[name](spec())
    state = augmentation.state_dict()
    first, second = augmentation(batch()), augmentation(batch())
    assert not torch.equal(first.observation, second.observation)
    again = MAKE[name](spec(seed=8))
    again.load_state_dict(state)
    if name != "noise":  # its table depends on the seed
        assert torch.equal(again(batch()).observation, first.observation)
    augmentation.load_state_dict(state)
    assert torch.equal(augmentation(batch()).next_observation, first.next_observation)
    other = MAKE[name](spec(seed=9))(batch())
    assert not torch.equal(other.observation, first.observation)


@EVERY
def test_padding_stays_zero(name: str) -> None:
    given = batch(TINY, stack=1)
    result = MAKE[name](spec(TINY))(given)
    assert not result.observation[1, :, :, 4:].any()
    assert not result.next_observation[1, :, :, 4:].any()
    assert (result.observation != given.observation).any()
    assert torch.isfinite(result.observation.float()).all()


@EVERY
def test_recorded_calls_draw_the_same_as_eager_calls(name: str) -> None:
    """As in a CUDA graph: no synchronization, and no Python number changes between calls."""
    results = []
    for recorded in (False, True):
        augmentation, given = MAKE[name](spec()), batch(samples=4)
        assert augmentation.capturable
        assert cuda_graphs.generators_of(augmentation) == [augmentation._generator]

        def act(augmentation: Augmentation = augmentation, given: Batch = given) -> tuple[torch.Tensor, torch.Tensor]:
            result = augmentation(given)
            return result.observation.clone(), result.action.clone()

        call = cuda_graphs.Captured(act, RecordedOperations, warm_up=1) if recorded else act
        results.append([[each.clone() for each in call()] for _ in range(4)])
    for plain, replayed in zip(*results, strict=True):
        assert all(torch.equal(mine, other) for mine, other in zip(plain, replayed, strict=True))


@pytest.mark.parametrize("name", [name for name in MAKE if name not in ("noise", "scale")])
def test_image_augmentation_refuses_vectors_and_names_alternatives(name: str) -> None:
    with pytest.raises(ValueError, match=r"requires image observations, got vector observations\. Use noise or scale"):
        MAKE[name](spec(VECTOR))


def test_samples_without_next_observations_are_augmented() -> None:
    given = Samples(observations(), torch.zeros(2, 16, dtype=torch.int64), torch.ones(2, 16), torch.zeros(2, 16, dtype=torch.int64))
    for name in MAKE:
        result, whole = MAKE[name](spec())(given), MAKE[name](spec())(batch())
        assert type(result) is Samples
        assert torch.equal(result.observation, whole.observation)


# -- single augmentations ---------------------------------------------------------------------------------------------------------------


def image(*rows: list[int]) -> torch.Tensor:
    return torch.tensor([[rows]], dtype=torch.uint8)


def test_shift_moves_pixels_and_repeats_edges() -> None:
    """One pixel down and one to the left, with repeated edges."""
    start = image([1, 2, 3], [4, 5, 6], [7, 8, 9])
    moved = padded_windows(start, torch.tensor([0]), torch.tensor([2]), pad=1)
    assert moved.tolist() == image([2, 3, 3], [2, 3, 3], [5, 6, 6]).tolist()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_windows_equal_crops_of_padded_images(dtype: torch.dtype) -> None:
    images, pad = observations()[0].squeeze(2).to(dtype), 4
    top_M, left_M = torch.randint(2 * pad + 1, (2, len(images)), generator=torch.Generator().manual_seed(1))
    padded = torch.nn.functional.pad(images.float(), (pad, pad, pad, pad), mode="replicate").to(dtype)
    expected = torch.stack(
        [each[:, top : top + 40, left : left + 36] for each, top, left in zip(padded, top_M.tolist(), left_M.tolist(), strict=True)]
    )
    assert torch.equal(padded_windows(images, top_M, left_M, pad), expected)
    assert torch.equal(looked_up(images, shifted(top_M - pad, left_M - pad, 40, 36)), expected)


def test_shift_draws_every_offset_up_to_the_pad() -> None:
    place = torch.arange(40)[:, None] * 100 + torch.arange(36)
    observation = place.float().expand(2, 400, 1, 1, 40, 36)
    middle = Shift(spec(), pad=2).augment(observation)[..., 20, 18].flatten()
    assert sorted(set(middle.tolist())) == sorted({float((20 + y) * 100 + 18 + x) for y in range(-2, 3) for x in range(-2, 3)})


def test_pad_of_the_image_size_is_refused() -> None:
    with pytest.raises(ValueError, match="pad must be below the image size, 36, got 36"):
        Shift(spec(), pad=36)


@pytest.mark.parametrize(("shape", "pad"), [((1, 84, 84), 4), ((10, 10, 10), 1), ((3, 64, 96), 3), ((1, 5, 5), 1)])
def test_auto_pad_follows_the_image_size(shape: tuple[int, ...], pad: int) -> None:
    assert auto_pad(shape) == pad


def test_crop_equals_torch_nearest_interpolation_of_a_window() -> None:
    observation = observations(samples=200, stack=2)
    changed = Crop(spec(), share=0.75).augment(observation)
    for before, after in zip(observation.flatten(0, 1)[::40], changed.flatten(0, 1)[::40], strict=True):
        windows = before[:, 0].float().unfold(1, 30, 1).unfold(2, 27, 1).permute(1, 2, 0, 3, 4).flatten(0, 1)
        enlarged = torch.nn.functional.interpolate(windows, (40, 36), mode="nearest-exact").to(torch.uint8)
        assert (enlarged == after[:, 0]).flatten(1).all(1).sum() == 1
    assert len(changed.flatten(2)[0].unique(dim=0)) > 50


def test_quarter_turn_is_counter_clockwise() -> None:
    images = torch.randint(256, (1, 2, 9, 9), dtype=torch.uint8)
    zero, one = torch.zeros(1), torch.ones(1)
    assert torch.equal(looked_up(images, turned(zero, one, one, 9, 9)), images.rot90(1, (2, 3)))
    assert torch.equal(looked_up(images, turned(-one, zero, one, 9, 9)), images.flip(-1, -2))


def test_zoom_by_two_repeats_central_pixels() -> None:
    images = torch.arange(25, dtype=torch.uint8).view(1, 1, 5, 5)
    index, middle = turned(torch.ones(1), torch.zeros(1), torch.full((1,), 2.001), 5, 5), [11, 12, 12, 12, 13]
    assert looked_up(images, index)[0, 0].tolist() == [[6, 7, 7, 7, 8], middle, middle, middle, [16, 17, 17, 17, 18]]


def test_cut_out_sets_the_box_to_zero() -> None:
    ones = torch.ones(1, 2, 3, 4, dtype=torch.uint8)
    cut = cut_out(ones, *(torch.tensor([each]) for each in (1, 0, 2, 3)))
    assert cut[0, 1].tolist() == [[1, 1, 1, 1], [0, 0, 0, 1], [0, 0, 0, 1]]


def test_cutout_boxes_stay_inside_and_reach_all_sizes() -> None:
    ones = torch.full((2, 300, 1, *ATARI), 9, dtype=torch.uint8)
    black = (Cutout(spec(), least=0.25, most=0.5).augment(ones) == 0).flatten(0, 3)
    heights, widths = black.any(2).sum(1), black.any(1).sum(1)
    assert (black.flatten(1).sum(1) == heights * widths).all()
    assert (heights.min(), heights.max(), widths.min(), widths.max()) == (10, 20, 9, 18)
    assert all(black.any(0).any(dim).all() for dim in (0, 1))


def test_noise_is_gaussian_rounded_and_clipped() -> None:
    grey = torch.full((2, 50, 4, *ATARI), 128, dtype=torch.uint8)
    change = Noise(spec(), std=0.04).augment(grey).float()[:, :, 0] - 128
    assert change.mean().abs() < 0.1
    assert change.std() == pytest.approx(0.04 * 255, rel=0.02)
    within = (change.abs() <= 0.04 * 255 + 0.5).float().mean()  # bytes up to 10
    assert within == pytest.approx(torch.erf(torch.tensor(10.5 / 10.2 / 2**0.5)).item(), abs=0.01)
    ends = with_noise(torch.tensor([0, 250], dtype=torch.uint8), torch.tensor([-3, 9], dtype=torch.int16), 255)
    assert ends.tolist() == [0, 255]
    table = Noise(spec(), std=0.04)._float_table[:NOISE_TABLE]
    assert (table[1:] * table[:-1]).mean().abs() < 0.005 * table.square().mean()


def test_vector_noise_is_in_units_of_components_and_spares_padding() -> None:
    given = observations(VECTOR, samples=2000, stack=1)
    change = Noise(spec(VECTOR), std=0.5).augment(given) - given
    assert not change[1, :, :, 3:].any()
    assert change[0].std() == pytest.approx(0.5, rel=0.05)
    assert change[0].mean(0).abs().max() < 0.06


def test_vector_scale_is_one_factor_per_sample() -> None:
    given = observations(VECTOR, samples=500, stack=1) + 0.1
    factors = Scale(spec(VECTOR), low=0.5, high=2.0).augment(given) / given
    assert torch.allclose(factors, factors[..., :1].expand_as(factors))
    assert 0.5 <= factors.min() < 0.52
    assert 1.95 < factors.max() <= 2.0


def test_brightened_image_equals_hand_computed_values() -> None:
    bytes_ = torch.tensor([[0, 10, 101, 255]], dtype=torch.uint8)
    assert brightened(bytes_, torch.tensor([[1.05]]), 255.0).tolist() == [[0, 10, 106, 255]]
    assert brightened(bytes_ // 10, torch.tensor([[0.5]]), 1.0).tolist() == [[0.0, 0.5, 5.0, 12.5]]


def test_intensity_factors_are_clipped_at_two_standard_deviations() -> None:
    ones = torch.ones((2, 2000, 1, *TINY))
    factors = Intensity(spec(TINY), scale=0.1).augment(ones)[:, :, 0, 0, 0, 0]
    assert factors.min() == pytest.approx(0.8)
    assert factors.max() == pytest.approx(1.2)
    assert factors.mean() == pytest.approx(1.0, abs=0.01)
    assert ((factors - 1).abs() < 0.1).float().mean() == pytest.approx(0.683, abs=0.03)


def test_blur_spreads_a_point_and_keeps_a_constant_image() -> None:
    point = torch.zeros(1, 1, 7, 7)
    point[..., 3, 3] = 1.0
    spread = blurred(point, torch.tensor([0.8]), 1.0)[0, 0]
    weight = torch.exp(-0.5 * (torch.arange(-2, 3) / 0.8) ** 2)
    weight = weight / weight.sum()
    assert torch.allclose(spread[1:6, 1:6], weight[:, None] * weight)
    plain = torch.full((3, 2, 8, 6), 77, dtype=torch.uint8)
    assert torch.equal(blurred(plain, torch.tensor([0.3, 1.0, 3.0]), 255.0), plain)


# -- kornia -------------------------------------------------------------------------------------------------------------------


def test_rotation_and_zoom_agree_with_kornia() -> None:
    """Except for pixels so close to the middle of two others that rounding decides."""
    kornia = pytest.importorskip("kornia", reason="kornia, in the extra `test`, is the reference")
    images = observations(stack=3)[:, :, :, 0].flatten(0, 1)
    angle, zoom = torch.linspace(-40, 40, len(images)), torch.linspace(0.6, 1.7, len(images))
    radians = angle * torch.pi / 180
    one, zero, transform = torch.ones_like(zoom), torch.zeros_like(zoom), kornia.geometry.transform
    nearest = {"mode": "nearest", "padding_mode": "border"}
    for mine, other in (
        (turned(radians.cos(), radians.sin(), one, 40, 36), transform.rotate(images.float(), angle, **nearest)),
        (turned(one, zero, zoom, 40, 36), transform.scale(images.float(), zoom, **nearest)),
    ):
        assert (looked_up(images, mine) == other.to(torch.uint8)).float().mean() > 0.995


def test_blur_agrees_with_kornia() -> None:
    kornia = pytest.importorskip("kornia", reason="kornia, in the extra `test`, is the reference")
    images = observations(stack=3)[:, :, :, 0].flatten(0, 1)
    sigma = torch.linspace(0.2, 2.0, len(images))
    other = kornia.filters.gaussian_blur2d(images.float(), (5, 5), torch.stack([sigma, sigma], 1), border_type="replicate")
    assert (blurred(images, sigma, 255.0).float() - other).abs().max() <= 0.51
    assert torch.allclose(blurred(images.float(), sigma, 255.0), other, atol=1e-3)


def test_flip_agrees_with_kornia() -> None:
    kornia = pytest.importorskip("kornia", reason="kornia, in the extra `test`, is the reference")
    given = batch(samples=3)
    flipped = Flip(spec(), probability=1.0)(given)
    assert torch.equal(flipped.observation, kornia.geometry.transform.hflip(given.observation))
    assert torch.equal(flipped.next_observation, kornia.geometry.transform.hflip(given.next_observation))


def test_flip_refuses_a_task_without_a_mirrored_action() -> None:
    with pytest.raises(ValueError, match="seaquest has the action UPLEFT but no UPRIGHT"):
        Flip(spec(actions=(("NOOP",), ("NOOP", "UPLEFT"))), probability=0.5)


# -- pipelines ------------------------------------------------------------------------------------------------------------------


def test_pipeline_applies_augmentations_in_order() -> None:
    """A box cut out before a rotation is rotated, one cut out after is not.

    Each augmentation has its own draws, as if it were the only one.
    """
    given = batch()
    separate = {name: MAKE[name](spec()) for name in ("cutout", "rotate")}
    expected = separate["rotate"](separate["cutout"](given))
    orders = [Pipeline({name: MAKE[name](spec()) for name in names}) for names in (["cutout", "rotate"], ["rotate", "cutout"])]
    results = [order(given) for order in orders]
    assert torch.equal(results[0].observation, expected.observation)
    assert not torch.equal(results[1].observation, expected.observation)


def test_empty_pipeline_changes_nothing() -> None:
    given = batch()
    assert all(after is before for after, before in zip(vars(Pipeline()(given)).values(), vars(given).values(), strict=True))


def test_several_draws_are_stored_in_draw_major_order() -> None:
    given = batch()
    made = Pipeline({"shift": Shift(spec(), pad=0)}, loss_draws=3, target_draws=2)(given)
    assert torch.equal(made.observation.unflatten(1, (3, 16)), given.observation[:, None].expand(-1, 3, *(-1,) * 5))
    assert torch.equal(made.next_observation.unflatten(1, (2, 16)), given.next_observation[:, None].expand(-1, 2, *(-1,) * 5))
    assert torch.equal(made.action, given.action.repeat(1, 3))
    assert made.weight.shape == (2, 16)
