"""Overrides of `mtrl sweep`: those of the sweep, those shared by all runs, and the axes."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mtrl_cli.config import overrides
from mtrl_cli.errors import UserError
from mtrl_cli.sweeps import search_space
from mtrl_cli.sweeps.search_space import Choices, NumberRange


def axis(word: str) -> Choices | NumberRange | None:
    return search_space.axis_of(word)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("hard,film", ("hard", "film")),
        ("choice(hard,film)", ("hard", "film")),
        ("choice(film)", ("film",)),
        (" 1 , 2", ("1", "2")),
        ("[pong,breakout],[pong]", ("[pong,breakout]", "[pong]")),
        ("choice([pong,breakout],[pong])", ("[pong,breakout]", "[pong]")),
        ("null,1", ("null", "1")),
        ("-1,1e-4,.5", ("-1", "1e-4", ".5")),
        ("true,False", ("true", "False")),
        ("'a,b',\"c d\"", ("'a,b'", '"c d"')),
        ("{a:1,b:2},{}", ("{a:1,b:2}", "{}")),
        (r"a\,b,c", (r"a\,b", "c")),
        ("range(3)", ("0", "1", "2")),
        ("range(5,0,-2)", ("5", "3", "1")),
        ("range(0,1,0.1)", ("0.0", "0.1", "0.2", "0.3", "0.4", "0.5", "0.6", "0.7", "0.8", "0.9")),
        ("range(1,0.5,-0.25)", ("1.0", "0.75")),
        ("sort(3,1,2)", ("1", "2", "3")),
        ("sort(range(3),reverse=true)", ("2", "1", "0")),
        ("int(1.5,2.5)", ("1", "2")),
        ("str(1,2)", ("'1'", "'2'")),
        ("bool(1,0)", ("true", "false")),
    ],
)
def test_choices_keep_the_text_of_their_values(value: str, words: tuple[str, ...]) -> None:
    assert axis(f"key={value}") == Choices(words)


@pytest.mark.parametrize(
    ("value", "interval"),
    [
        ("interval(1e-5,1e-3)", NumberRange(1e-5, 1e-3)),
        ("tag(log,interval(1e-5,1e-3))", NumberRange(1e-5, 1e-3, log=True)),
        ("int(interval(1,8))", NumberRange(1, 8, is_integer=True)),
        ("tag(log,int(interval(1,64)))", NumberRange(1, 64, log=True, is_integer=True)),
        ("int(tag(log,interval(1,64)))", NumberRange(1, 64, log=True, is_integer=True)),
        ("interval(-1,1)", NumberRange(-1.0, 1.0)),
    ],
)
def test_intervals_are_parsed(value: str, interval: NumberRange) -> None:
    assert axis(f"key={value}") == interval


@pytest.mark.parametrize("word", ["key=1", "key=[1,2]", "key={a:1}", "key='a,b'", "key=", "~key", "key=a=b", "key=f(1)", "key", "key=a b"])
def test_single_value_is_not_an_axis(word: str) -> None:
    assert axis(word) is None


def test_order_of_shuffled_choices_is_reproducible() -> None:
    first = axis("seed=shuffle(range(50))")
    assert isinstance(first, Choices)
    assert first == axis("seed=shuffle(range(50))")
    assert sorted(first.values, key=int) == [str(each) for each in range(50)]
    assert list(first.values) != sorted(first.values, key=int)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("env=glob(*)", "glob is not supported; name the values"),
        ("seed=range(a)", "cannot be parsed"),
        ("seed=range(3", "cannot be parsed"),
        ("lr=interval(3)", "cannot be parsed"),
        ("seed=range(0,5,0)", "finite and its step not 0"),
        ("seed=range(3,0)", "has no values"),
        ("seed=range(1000000)", "has more than 10,000 values"),
        ("seed=1,2,1", "has 1 twice"),
        ("lr=0.1,1e-1", "has 0.1 twice"),
        ("seed=1,1.0", "has 1 twice"),
        ("name=a,'a'", "has a twice"),
        ("lr=interval(2,1)", "from a number to a larger number"),
        ("lr=interval(1,1)", "from a number to a larger number"),
        ("lr=interval(0,inf)", "from a number to a larger number"),
        ("lr=int(interval(0.1,0.9))", "from a number to a larger number"),
        ("lr=tag(log,interval(0,1))", "a logarithmic interval must start above 0, got 0"),
        ("lr=tag(lin,interval(0,1))", "unknown tag lin"),
        ("lr=tag(log,choice(1,2))", "only intervals have tags"),
        ("seed=1,", "expected values between commas"),
        ("name=a=b,c", "quoted if they have special characters: name='a=b',c"),
        ("optimizer@agent=a,b", "a group with @package is not supported"),
        ("device=cpu,cuda", "device cannot differ between runs"),
        ("ranks=1,2", "ranks cannot differ between runs"),
        ("trusted_packages=[a],[b]", "trusted_packages cannot differ between runs"),
        ("hydra.searchpath=[a],[b]", "hydra.searchpath cannot differ between runs"),
        ("sweep.trials=1,2", "the key belongs to the sweep"),
        ("launcher=local,slurm", "the key belongs to the sweep"),
        ("seed=${oc.env:HOME},2", "interpolation"),
        ("seed=${oc.env:HOME}", "interpolation"),
    ],
)
def test_invalid_override_is_refused_in_one_line(word: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        search_space.split_overrides([word])
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_overrides_are_split_into_sweep_shared_and_axes() -> None:
    words = ["env=classic_pack", "seed=1,2", "sweep.trials=3", "launcher=local", "launcher.jobs=2", "run_dir=a,b", "+agent.n_step=range(2)"]
    words += ["hydra.searchpath=[/conf]", "trusted_packages=[mine]", "init_from=runs/a,b", "~augmentation", "env.tasks=[a,b]"]
    apart = search_space.split_overrides(words)
    assert apart.sweep == (
        "sweep.trials=3",
        "launcher=local",
        "launcher.jobs=2",
        "run_dir=a,b",
        "hydra.searchpath=[/conf]",
        "trusted_packages=[mine]",
    )
    assert apart.shared == ("env=classic_pack", "hydra.searchpath=[/conf]", "init_from=runs/a,b", "~augmentation", "env.tasks=[a,b]")
    assert apart.axes == {"seed": Choices(("1", "2")), "agent.n_step": Choices(("0", "1"))}
    assert list(apart.axes) == ["seed", "agent.n_step"]


def test_init_from_is_an_axis_only_as_an_explicit_choice() -> None:
    assert search_space.split_overrides(["init_from=choice(a,b)"]).axes == {"init_from": Choices(("a", "b"))}
    assert search_space.split_overrides(["init_from=choice(/a/b-1,null)"]).axes == {"init_from": Choices(("/a/b-1", "null"))}


@pytest.mark.parametrize("words", [["seed=1,2", "seed=3"], ["seed=1", "++seed=2"], ["sweep.trials=1", "sweep.trials=1"]])
def test_duplicate_key_is_refused(words: list[str]) -> None:
    with pytest.raises(UserError, match="is given twice"):
        search_space.split_overrides(words)


def test_misspelled_sweep_key_gets_a_suggestion() -> None:
    assert search_space.near_miss(["env=a", "swep.trials=3"]) == "unknown key 'swep.trials'. Did you mean 'sweep.trials'?"
    assert search_space.near_miss(["env=a", "sweep.trials=3", "launcher=local", "seed=3"]) is None


PLAIN = st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False) | st.text(max_size=8)
VALUES = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=3), max_leaves=4)


def is_allowed(value: object) -> bool:
    """Exclude interpolations, which the grammar resolves even within quotes, and NUL, which no command line can contain."""
    text = str(value)
    return "$" not in text and "\x00" not in text


@settings(max_examples=150, deadline=None)
@given(VALUES.filter(is_allowed))
def test_value_survives_formatting_and_parsing(value: object) -> None:
    read = overrides.parse(f"key={search_space.as_text(value)}").value
    assert repr(read) == repr(value)


@settings(max_examples=100, deadline=None)
@given(st.lists(VALUES.filter(is_allowed), min_size=2, max_size=5))
@example([[], "A¹"])  # Hydra's grammar accepts letters outside ASCII only in quotes
def test_list_of_choices_survives_joining_and_splitting(values: list[object]) -> None:
    words = list({repr(each): search_space.as_text(each) for each in values}.values())
    if len(words) < 2 or {0, 1, -1} & {each for each in values if isinstance(each, int | float)}:
        return  # a single value is no axis; 1 and 1.0 are the same value
    assert axis("key=" + ",".join(words)) == Choices(tuple(words))
