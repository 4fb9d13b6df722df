"""Shipped rewards: golden values, the bounds that were missing elsewhere, hostile answers, arithmetic."""

from fractions import Fraction

import pytest

from swift.config import option
from swift.config.option import ConfigError
from swift.config.rewards import RewardConfig
from swift.rewards import evaluate_arithmetic
from swift.rewards.builtin import Format, ReActFormat, RepetitionPenalty, SoftOverlong, ToolCall

TEXTS = {
    "<think>a</think><answer>b</answer>": 1,
    "<think>a</think>\n <answer>b</answer>": 1,
    " <think>a</think><answer>b</answer>": 0,
    "<think>a</think><answer>b</answer> tail": 0,
    "<think>a</think><answer>b</answer>\n": 0,
    "x\n<think>a</think><answer>b</answer>": 0,
    "<think>a\nb</think><answer>c\nd</answer>": 1,
    "<answer>b</answer>": 0,
}


def of_length(*lengths: int) -> dict[str, list[list[int]]]:
    return {"response_token_ids": [[7] * length for length in lengths]}


def test_format() -> None:
    assert Format()(list(TEXTS)) == list(TEXTS.values())


def test_react_format() -> None:
    begun = "<think>a</think> Action: x Action Input: {}"
    texts = [
        begun,
        f"{begun}\nand more",
        f" {begun}",
        "<think>a</think> Action: x",
        "Action: x Action Input:",
    ]
    assert ReActFormat()(texts) == [1, 1, 0, 0, 0]


def test_a_tool_call_is_right_or_wrong() -> None:
    right = 'Thought: look\nAction: search\nAction Input: {"q": "cat", "n": 2}'
    texts = [
        'Action: none\nAction: search\nAction Input: {"n": 2, "q": "cat"}\nObservation: a cat\nAction: stop',
        'Action: search\nAction Input: {"q": "dog", "n": 2}',
        'Action: find\nAction Input: {"q": "cat", "n": 2}',
        "Action: search\nAction Input: cat",
        "a cat",
    ]
    assert ToolCall()(texts, solution=[right] * 5) == [1, 0, 0, 0, 0]
    plain = [
        "Action: end",
        "Action: end Action Input: {}",
        "Action: end Action Input:  a b ",
        "nothing",
        "Action: x",
    ]
    rights = ["Action: end", "Action: end", "Action: end Action Input: a b", "no call", None]
    assert ToolCall()(plain, solution=rights) == [1, 1, 1, 1, None]


def test_repetition() -> None:
    texts = ["a b c a b c a b c", "A b C a B c a b c", "a b", "", "the cat sat on the mat"]
    values = RepetitionPenalty()(texts)
    assert values == pytest.approx([-4 / 7, -4 / 7, 0, 0, 0])
    assert RepetitionPenalty(1, -0.5)(["a a a a"]) == [-0.375]


def test_soft_overlong_stops_at_minus_one() -> None:
    reward = SoftOverlong(soft_max_length=100, soft_cache_length=20)
    assert reward([""] * 5, **of_length(50, 80, 90, 100, 140)) == [0, 0, -0.5, -1, -1]


@pytest.fixture(scope="module")
def accuracy():
    return pytest.importorskip("swift.rewards.accuracy")


def test_accuracy(accuracy) -> None:
    cases = [
        (r"\boxed{3}", r"\boxed{3}", 1),
        ("<answer>3</answer>", "$3$", 1),
        (r"\boxed{\frac{1}{2}}", r"\boxed{0.5}", 1),
        ("<think>4</think><answer>3</answer>", "3", 1),
        (r"\boxed{(1,2)}", "$(1,2)$", 1),
        # correct answers that other tools score 0, for want of markup
        ("3", "3", 1),
        ("0.5", r"\boxed{\frac12}", 1),
        ("so x = 3", "$x=3$", 1),
        ("no idea", "$7$", 0),
        ("", "7", 0),
        (r"\frac12", "0.5", 1),
        ("<answer>(1,2)</answer>", "(1, 2)", 1),
        ("<think>it is 7</think> maybe 8", "7", 0),
        ("<think>it is 7", "7", 0),
        ("<answer>7</answer> no, <answer>8</answer>", "7", 0),
        ("<think>is it <answer>8</answer>?</think> 7", 7, 1),
        ("The capital is Paris", "Paris", 0),
        ("<answer> Paris </answer>", "Paris", 1),
        ("1,234", "1234", 1),
    ]
    texts, solutions, expected = map(list, zip(*cases, strict=True))
    assert accuracy.MathAccuracy()(texts, solution=solutions) == expected
    assert accuracy.MathAccuracy()(["3", "3"], solution=[None, "3"]) == [None, 1]
    texts = ["4\n# Answer\n3", "# Answer 4", r"\boxed{3}", "3"]
    assert accuracy.MathSection()(texts, solution=["7 - 4 # Answer 3", "3", "3", None]) == [1, 0, 1, None]


def test_cosine(accuracy) -> None:
    reward = accuracy.CosineReward(cosine_max_len=100)
    texts = ["3"] * 4 + ["4"] * 4
    values = reward(texts, solution=["3"] * 8, **of_length(*[0, 50, 100, 500] * 2))
    assert values == pytest.approx([1, 0.75, 0.5, 0.5, -0.5, -0.25, 0, 0])
    assert reward(["3"], solution=[None], **of_length(1)) == [None]


def test_hostile_answers_cost_their_worker_and_nothing_else(accuracy) -> None:
    """What math-verify cannot stop by itself is killed, counts as wrong, and the others are judged."""
    graders = accuracy.Graders(1, pair_seconds=60)
    assert graders.grade([("3", "3"), ("4", "3")]) == [True, False]
    assert graders.killed == 0
    hostile = (r"\boxed{10^{10^{10}}}", "3")
    graders.pair_seconds = 0.2  # the worker itself gives up after two seconds
    assert graders.grade([hostile]) == [False]
    assert graders.killed == 1
    graders.pair_seconds = 60
    assert graders.grade([hostile, ("5", "5"), hostile]) == [False, True, False]
    graders._workers[0].process.kill()
    graders._workers[0].process.wait()
    assert graders.grade([("3", "4"), ("2+2", "4")]) == [False, True]  # the first one died with it
    assert graders.killed == 2
    graders.close()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1 + 2*3", Fraction(7)),
        ("(44+19)/35", Fraction(9, 5)),
        ("1/3 + 1/3 + 1/3", Fraction(1)),
        ("-(2 - 5)\n", Fraction(3)),
        ("+7", Fraction(7)),
    ],
)
def test_arithmetic(text: str, value: Fraction) -> None:
    assert evaluate_arithmetic(text) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2**9999999", r"not arithmetic: 2 \*\* 9999999"),
        ("7//2", "not arithmetic: 7 // 2"),
        ("2(3)", r"not arithmetic: 2\(3\)"),
        ("()", r"not arithmetic: \(\)"),
        ("1.5+1", "not arithmetic: 1.5"),
        ("__import__('os')", "not arithmetic: __import__"),
        ("1 + x", "not arithmetic: 1 . x"),
        ("", "not an expression: "),
        ("1 +", "not an expression: 1 ."),
        ("007", "not an expression: 007"),
        ("(" * 150, "not an expression: "),
        ("1/(2-2)", "a division by 0"),
        ("1+" * 200 + "1", "an expression of 401 characters, more than 200"),
        ("1\0", "not arithmetic"),
    ],
)
def test_what_is_not_arithmetic(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_arithmetic(text)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "no reward is named"),
        (
            {"reward_funcs": ("format",), "reward_weights": (1.0, 2.0)},
            "--reward_weights has 2 values for 1",
        ),
        ({"reward_funcs": ("soft_overlong",)}, "--reward_funcs soft_overlong needs --soft_cache_length"),
        (
            {"reward_funcs": ("soft_overlong",), "soft_cache_length": 600},
            "--soft_cache_length 600 is above --soft_max_length 512",
        ),
        (
            {"reward_funcs": ("format",), "cosine_max_len": 7},
            "--cosine_max_len has no effect without --reward_funcs cosine",
        ),
        (
            {"reward_funcs": ("format",), "reward_model_plugin": ("mine",)},
            "--reward_model_plugin has 1 values for 0 in --reward_model",
        ),
    ],
)
def test_flags_that_contradict_each_other(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RewardConfig(**values).check(max_completion_length=512)


def test_flags_of_a_reward_may_be_for_a_users_own() -> None:
    config = RewardConfig(reward_funcs=("mine", "format"), cosine_max_len=7, reward_weights=(1.0, 2.0, 0.5))
    config.check(max_completion_length=512, has_environment=True)
    assert option.changed(config) == ["reward_funcs", "reward_weights", "cosine_max_len"]


def test_accuracy_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(option.importlib.util, "find_spec", lambda name: None)
    for name in ("accuracy", "cosine"):
        with pytest.raises(
            ConfigError, match=f"--reward_funcs {name} needs the package math_verify"
        ) as caught:
            RewardConfig(reward_funcs=(name,)).check(max_completion_length=512)
        assert caught.value.hint == "pip install 'swiftune[rewards]'"
