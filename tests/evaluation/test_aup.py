"""AUP against the figures of the published program on its own data (d3LLM's AUP leaderboard)."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d3llm_ray.errors import InputError
from d3llm_ray.evaluation.aup import aup, leaderboard
from d3llm_ray.evaluation.report import method_points

LLADA_TASKS = ("GSM8K-CoT", "MATH", "MBPP", "HumanEval", "Long-GSM8K")
LLADA_BEST = (74.98, 41.15, 63.6, 67.73, 82.56)
# method -> per task: accuracy at one token a forward, the measured (TPF, accuracy) pair or None, published AUP
LLADA = {
    "LLaDA": [
        (72.55, None, 72.55),
        (32.2, None, 32.2),
        (41.72, None, 41.72),
        (38.28, None, 38.28),
        (78.58, None, 78.58),
    ],
    "Fast-dLLM-LLaDA": [
        (74.79, (2.77, 74.68), 205.7811),
        (32.1, (1.97, 30.82), 47.1873),
        (41.58, (2.13, 38.6), 56.6011),
        (38.16, (2.56, 37.8), 54.0245),
        (78.45, (2.45, 78.01), 175.3744),
    ],
    "D2F": [
        (74.98, (2.88, 74.39), 213.7564),
        (29.1, (2.66, 28.94), 48.9958),
        (39.1, (2.13, 39.0), 52.9606),
        (41.02, (2.69, 40.64), 61.9823),
        (76.0, (2.7, 75.66), 176.9480),
    ],
    "dParallel-LLaDA": [
        (74.0, (5.14, 72.63), 358.1422),
        (32.0, (3.17, 30.18), 64.5356),
        (41.62, (2.35, 40.0), 60.4513),
        (39.68, (4.93, 39.02), 83.6855),
        (79.15, (4.49, 76.65), 309.0756),
    ],
    "d3LLM-LLaDA": [
        (74.02, (9.11, 73.09), 637.6549),
        (32.76, (5.74, 30.36), 107.6419),
        (42.0, (4.21, 40.6), 88.3560),
        (39.8, (5.95, 39.63), 96.6405),
        (78.32, (6.95, 74.22), 441.1296),
    ],
}
LLADA_AVERAGES = {
    "d3LLM-LLaDA": 274.28,
    "dParallel-LLaDA": 175.18,
    "D2F": 110.93,
    "Fast-dLLM-LLaDA": 107.79,
    "LLaDA": 52.67,
}

DREAM_TASKS = ("GSM8K-CoT", "MATH", "MBPP-Instruct", "HumanEval-Instruct", "Long-GSM8K")
DREAM_BEST = (83.94, 49.92, 63.8, 72.25, 82.56)
DREAM = {
    "Dream": [(83.94, None, 83.94), (39.63, None, 39.63), (57.2, None, 57.2), (55.2, None, 55.2), (78.95, None, 78.95)],
    "Fast-dLLM-Dream": [
        (83.68, (1.44, 79.0), 116.4864),
        (39.53, (1.78, 38.3), 55.2169),
        (56.38, (1.2, 53.2), 63.5892),
        (54.86, (1.33, 54.27), 63.5012),
        (78.83, (1.79, 76.57), 130.3502),
    ],
    "Fast-dLLM-v2-7B": [
        (82.82, (2.21, 81.48), 176.1064),
        (49.92, (2.61, 48.74), 126.6553),
        (61.23, (2.04, 59.12), 114.1151),
        (63.2, (2.58, 61.7), 128.9414),
        (82.34, (2.58, 80.97), 207.2460),
    ],
    "dParallel-Dream": [
        (83.8, (3.02, 82.12), 245.7335),
        (39.06, (2.94, 38.72), 77.9471),
        (57.8, (2.24, 55.4), 107.9665),
        (56.08, (2.57, 54.27), 98.7677),
        (81.27, (3.49, 78.56), 262.3936),
    ],
    "d3LLM-Dream": [
        (83.47, (4.94, 81.36), 391.3278),
        (39.38, (3.92, 38.21), 97.4967),
        (58.8, (2.96, 55.6), 141.4058),
        (58.86, (3.2, 57.1), 129.4756),
        (81.2, (4.8, 77.18), 348.6435),
    ],
    "EAGLE-3": [
        (76.57, (5.12, 76.57), 318.9862),
        (39.8, (5.72, 39.8), 142.0584),
        (60.2, (5.69, 60.2), 298.5704),
        (67.58, (5.98, 67.58), 344.8057),
        (80.52, (5.57, 80.52), 422.2056),
    ],
}
DREAM_AVERAGES = {
    "EAGLE-3": 305.33,
    "d3LLM-Dream": 221.67,
    "dParallel-Dream": 158.56,
    "Fast-dLLM-v2-7B": 150.61,
    "Fast-dLLM-Dream": 85.83,
    "Dream": 62.98,
}

CODER = [
    (82.4, (2.88, 79.7), 86.6, 208.3577),
    (74.4, (2.88, 71.3), 82.3, 171.7194),
    (80.1, (2.5, 80.0), 83.5, 186.1772),
    (69.6, (2.5, 69.3), 70.1, 170.9205),
]


def _cases():
    for methods, tasks, best in ((LLADA, LLADA_TASKS, LLADA_BEST), (DREAM, DREAM_TASKS, DREAM_BEST)):
        for method, rows in methods.items():
            for task, top, (accuracy, pair, expected) in zip(tasks, best, rows, strict=True):
                points = [(1.0, accuracy)] + ([pair] if pair else [])
                yield pytest.param(points, top, expected, id=f"{method}-{task}")


@pytest.mark.parametrize(("points", "best", "expected"), list(_cases()))
def test_published_scores(points, best, expected):
    assert aup(points, best) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(("accuracy", "pair", "best", "expected"), CODER)
def test_published_coder_scores(accuracy, pair, best, expected):
    assert aup([(1.0, accuracy), pair], best) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("methods", "tasks", "averages"), [(LLADA, LLADA_TASKS, LLADA_AVERAGES), (DREAM, DREAM_TASKS, DREAM_AVERAGES)]
)
def test_published_averages(methods, tasks, averages):
    scores = {
        method: {task: expected for task, (_, _, expected) in zip(tasks, rows, strict=True)}
        for method, rows in methods.items()
    }
    board = leaderboard(scores)
    assert list(board) == list(averages)
    assert board == pytest.approx(averages, abs=0.01)


def test_leaderboard_divides_by_the_tasks_present_unless_told_otherwise():
    scores = {"coder": {"HumanEval": 200.0, "MBPP": 100.0}}
    assert leaderboard(scores) == {"coder": 150.0}
    assert leaderboard(scores, divisor=5) == {"coder": 60.0}


def test_a_curve_by_hand():
    # W(80) = exp(-3 * 20/100) = 0.548812, W(78) = exp(-0.66) = 0.516851, W(76) = exp(-0.72) = 0.486752
    # 1*80 + (80*0.548812 + 78*0.516851)/2 * 1 + (78*0.516851 + 76*0.486752)/2 * 2
    expected = 80 + (43.90493 + 40.31440) / 2 + (40.31440 + 36.99317)
    assert aup([(4.0, 76.0), (1.0, 80.0), (2.0, 78.0)], 100.0) == pytest.approx(expected, abs=1e-3)


def test_a_pair_too_far_below_the_first_does_not_count():
    assert aup([(1, 80), (3, 76), (9, 74.99)], 80) == aup([(1, 80), (3, 76)], 80)
    assert aup([(1, 80), (3, 76), (9, 75.0)], 80) > aup([(1, 80), (3, 76)], 80)
    # a dip in the middle is passed over: the area joins its neighbours
    assert aup([(1, 80), (2, 60), (3, 80)], 80) == pytest.approx(80 + 2 * 80)


def published(points: list[tuple[float, float]], best: float) -> float | None:
    """The published program's rule, step by step (algorithms.md 10); None where it stops."""
    rho, y = [point[0] for point in points], [point[1] for point in points]
    order = sorted(range(len(points)), key=lambda index: rho[index])  # stable
    rho, y = [rho[index] for index in order], [y[index] for index in order]
    if y[0] - y[-1] > 5:
        return None
    kept = [index for index in range(len(y)) if y[index] >= y[0] - 5]
    rho, y = [rho[index] for index in kept], [y[index] for index in kept]
    weighted = [value * min(math.exp(-3 * (1 - value / best)), 1) for value in y]
    area = rho[0] * y[0]
    for index in range(1, len(rho)):
        area += (rho[index] - rho[index - 1]) * (weighted[index] + weighted[index - 1]) / 2
    return area


few_rhos = st.sampled_from([1.0, 1.5, 2.0, 4.0])  # so that many are equal


@given(st.lists(st.tuples(few_rhos, st.floats(60, 80)), min_size=1, max_size=8), st.floats(60, 100))
def test_scores_equal_the_published_rule_also_for_equal_parallelism(points, top):
    expected = published(points, top)
    if expected is not None:
        assert aup(points, top) == pytest.approx(expected)


def test_pairs_of_equal_parallelism_keep_their_order():
    one, other = [(1, 80), (2, 76), (2, 80), (3, 80)], [(1, 80), (2, 80), (2, 76), (3, 80)]
    # W(76 of 80) = exp(-0.15): the second trapezium starts at 80, or at 65.413
    assert aup(one, 80) == pytest.approx(80 + (80 + 65.4137) / 2 + 80, abs=1e-3)
    assert aup(other, 80) == pytest.approx(80 + 80 + (80 + 65.4137) / 2, abs=1e-3)
    worse = [(1, 80), (2, 80), (2, 76), (3, 80), (3, 79)]
    better = [(1, 80), (2, 80), (2, 76), (3, 79), (3, 80)]
    assert published(worse, 80) == pytest.approx(aup(worse, 80)) != aup(better, 80)


def test_a_report_hands_on_points_in_the_order_of_its_rows():
    rows = [
        SimpleNamespace(model="m", decoder=decoder, task="t", tpf=tpf, accuracy=accuracy, settings={"decoder": decoder})
        for decoder, tpf, accuracy in [("a", 2, 80), ("vanilla", 1, 80), ("a", 2, 76), ("b", 3, 1), ("a", 2, 80)]
    ]
    assert method_points(rows, ("m", "a", "t"), {}) == [(2, 80), (1, 80), (2, 76)]


def test_where_the_published_program_stops_the_last_pair_is_left_out():
    assert published([(1, 80), (2, 78), (3, 70)], 80) is None
    assert aup([(1, 80), (2, 78), (3, 70)], 80) == aup([(1, 80), (2, 78)], 80)


def test_accuracy_above_the_best_gains_no_bonus():
    assert aup([(1, 80), (3, 90)], 80) == pytest.approx(80 + 2 * (90 + 80) / 2)


tpf = st.floats(0.05, 50)
percent = st.floats(0, 100)
best = st.floats(1, 100)


@given(tpf, percent, best)
def test_one_point_scores_tpf_times_accuracy(rho, accuracy, top):
    assert aup([(rho, accuracy)], top) == pytest.approx(rho * accuracy)


@given(tpf, st.floats(0.01, 20), st.floats(0.01, 20), st.floats(20, 100), st.floats(0, 5), best)
def test_more_parallelism_at_the_same_accuracy_never_scores_less(start, step, more, accuracy, loss, top):
    slower = aup([(start, accuracy), (start + step, accuracy - loss)], top)
    faster = aup([(start, accuracy), (start + step + more, accuracy - loss)], top)
    assert faster >= slower - 1e-9


@given(tpf, st.floats(0.01, 20), st.floats(20, 95), st.floats(0, 5), st.floats(0, 5), best)
def test_more_accuracy_at_the_same_parallelism_never_scores_less(start, step, accuracy, loss, gain, top):
    worse = aup([(start, accuracy), (start + step, accuracy - loss)], top)
    better = aup([(start, accuracy), (start + step, accuracy - loss + gain)], top)
    assert better >= worse - 1e-9


@given(st.lists(st.tuples(tpf, percent), min_size=1, max_size=8, unique_by=lambda pair: pair[0]), best, st.randoms())
def test_order_does_not_matter_and_alpha_zero_bounds_it(points, top, random):
    shuffled = list(points)
    random.shuffle(shuffled)
    assert aup(shuffled, top) == aup(points, top)
    assert aup(points, top) <= aup(points, top, alpha=0.0) + 1e-9


@pytest.mark.parametrize(
    ("points", "arguments", "field"),
    [
        ([], {}, "points"),
        ([(0.0, 50.0)], {}, "points"),
        ([(-1.0, 50.0)], {}, "points"),
        ([(math.nan, 50.0)], {}, "points"),
        ([(1.0, -0.1)], {}, "points"),
        ([(1.0, 100.1)], {}, "points"),
        ([(1.0, math.nan)], {}, "points"),
        ([(1.0, 50.0)], {"max_accuracy": 0.0}, "max_accuracy"),
        ([(1.0, 50.0)], {"max_accuracy": 101.0}, "max_accuracy"),
        ([(1.0, 50.0)], {"alpha": -1.0}, "alpha"),
        ([(1.0, 50.0)], {"offset": -1.0}, "offset"),
    ],
)
def test_bad_input_names_its_field(points, arguments, field):
    with pytest.raises(InputError, match=f"^{field}: "):
        aup(points, **{"max_accuracy": 90.0, **arguments})


def test_leaderboard_refuses_a_method_without_tasks():
    with pytest.raises(InputError, match=r"scores.nothing"):
        leaderboard({"nothing": {}})
    with pytest.raises(InputError, match="divisor"):
        leaderboard({"method": {"task": 1.0}}, divisor=0)
