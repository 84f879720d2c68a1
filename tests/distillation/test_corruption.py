from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d3llm_ray.distillation.objectives import Moment, PseudoTrajectory
from d3llm_ray.distillation.objectives.batches import TrainingSample
from d3llm_ray.distillation.objectives.corruption import (
    TrainingWindow,
    block_ratios,
    choose_views,
    corrupted,
    draw_window,
    draws,
    invert,
    mask_blocks,
    monotone_ratios,
)
from d3llm_ray.models.families import read_family
from tests.distillation.toys import CONFIGS

MASK = 99
RNG = np.random.default_rng(0)
# Positions 0..7 were revealed in the order 2, 0, 1, 3 (one block), then 7, 5, 4, 6.
REVEAL = np.array([1, 2, 0, 3, 6, 5, 7, 4], dtype=np.uint16)


def test_masks_what_the_teacher_revealed_last() -> None:
    views = choose_views(RNG, REVEAL, TrainingWindow(4, 8, 0.5))
    assert views.masked.tolist() == [4, 6]  # steps 6 and 7; 5 and 7 were revealed at 5 and 4
    assert views.complement.tolist() == [5, 7]


def test_window_across_blocks_follows_reveal_steps_not_positions() -> None:
    views = choose_views(
        RNG, REVEAL, TrainingWindow(1, 6, 0.6)
    )  # steps 2 0 3 6 5: the last three are positions 3, 4, 5
    assert views.masked.tolist() == [3, 4, 5]
    assert views.complement.tolist() == [1, 2]


def test_ties_are_broken_by_position() -> None:
    together = np.zeros(8, dtype=np.uint16)  # an EOS tail: all revealed at once
    assert choose_views(RNG, together, TrainingWindow(0, 8, 0.25)).masked.tolist() == [6, 7]


@pytest.mark.parametrize("size", range(16, 33))
def test_masked_count_is_exactly_the_rounded_ratio(size: int) -> None:
    reveal = RNG.permutation(64).astype(np.uint16)
    for ratio in np.linspace(0.0, 0.8, 41):
        exact = ratio * size
        count = choose_views(RNG, reveal, TrainingWindow(10, 10 + size, float(ratio))).masked.size
        assert count == 1 if exact < 0.5 else abs(count - exact) <= 0.5


def test_published_rounding_reads_the_trajectory_entry() -> None:
    reveal = np.arange(32, dtype=np.uint16)  # left to right, one token a step
    # entry k = 16 + int(0.5 * 16) = 24 holds 25 revealed tokens: 7 of 16 are masked, where 8 were asked for
    views = choose_views(RNG, reveal, TrainingWindow(16, 32, 0.5), rounding="published")
    assert views.masked.tolist() == list(range(25, 32))
    # k = min(31, 16 + int(1.0 * 16)) = 31: nothing is left to mask, and nothing breaks
    assert choose_views(RNG, reveal, TrainingWindow(16, 32, 0.0), rounding="published").masked.size == 0


def test_random_order_ignores_the_trajectory() -> None:
    counts = np.zeros(8)
    for seed in range(2000):
        views = choose_views(np.random.default_rng(seed), REVEAL, TrainingWindow(0, 8, 0.5), order="random")
        assert views.masked.size > 0
        counts[views.masked] += 1
    # p = .5 (1 - 1e-3) + 1e-3 = .5005; five standard deviations of 2000 draws are .056
    assert np.abs(counts / 2000 - 0.5005).max() < 0.056


def test_reversed_order_masks_what_the_teacher_revealed_first() -> None:
    views = choose_views(RNG, REVEAL, TrainingWindow(4, 8, 0.5), order="reversed")
    assert views.masked.tolist() == [5, 7]  # steps 5 and 4; 6 and 4 were revealed at 7 and 6


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 1.0])
def test_inverted_order_has_exactly_that_share_of_pairs_the_wrong_way(share: float) -> None:
    order = np.random.default_rng(5).permutation(30)
    changed = invert(order, share, np.random.default_rng(6))
    assert sorted(changed) == list(range(30))
    before = {int(position): place for place, position in enumerate(order)}
    wrong = sum(before[int(a)] > before[int(b)] for n, a in enumerate(changed) for b in changed[n + 1 :])
    assert wrong == round(share * 435)
    if share == 1.0:
        assert changed.tolist() == order[::-1].tolist()


@pytest.mark.parametrize("order", ["inverted", "shuffled"])
def test_a_sample_keeps_its_disturbed_order_in_all_epochs(order: str) -> None:
    def masked(seed: int, epoch: int, prompt_id: str) -> list[int]:
        drawn = draws(seed, epoch, prompt_id)
        views = choose_views(
            drawn.epoch,
            np.arange(32, dtype=np.uint16),
            TrainingWindow(0, 32, 0.5),
            order=order,  # type: ignore[arg-type]
            inverted_pairs=0.2,
            order_rng=drawn.lasting,
        )
        return views.masked.tolist()

    assert masked(1, 0, "a") == masked(1, 5, "a")
    assert len({tuple(masked(*key)) for key in ((1, 0, "a"), (1, 0, "b"), (2, 0, "a"))}) == 3
    assert all(len(masked(1, 0, str(n))) == 16 for n in range(5))
    assert masked(1, 0, "a") != list(range(16, 32))


def test_d2f_ratios_start_uniformly_and_never_fall() -> None:
    drawn = np.array([monotone_ratios(np.random.default_rng(n), 4, 0.2, 0.7) for n in range(4000)])
    assert drawn.shape == (4000, 4)
    assert (np.diff(drawn, axis=1) >= 0).all() and drawn.min() >= 0.2 and drawn.max() <= 0.7
    # E[first] = .45; each of three rises is U(0, 1) (.7 - first) / 3, on average .25 / 6. Five standard deviations.
    assert np.abs(drawn.mean(0) - (0.45 + np.arange(4) * 0.25 / 6)).max() < 0.012
    assert monotone_ratios(np.random.default_rng(0), 1, 0.2, 0.7).shape == (1,)


def test_d2f_ratios_by_hand() -> None:
    class Fixed:
        """Draws .4 for the first ratio, then rises of 1/2 and 1."""

        def uniform(self, low: float, high: float) -> float:
            return 0.4

        def random(self, count: int) -> np.ndarray:
            return np.array([0.5, 1.0])

    ratios = monotone_ratios(Fixed(), 3, 0.2, 0.7)  # type: ignore[arg-type]
    assert ratios == pytest.approx([0.4, 0.4 + 0.5 * 0.15, 0.4 + 1.5 * 0.15])


def test_blocks_are_masked_at_their_own_ratios() -> None:
    block_of = np.repeat([0, 1, 2], 2000)
    masked = mask_blocks(np.random.default_rng(1), block_of, np.array([0.2, 0.5, 0.9]))
    shares = masked.reshape(3, 2000).mean(1)
    assert np.abs(shares - [0.2, 0.5, 0.9]).max() < 0.06  # five standard deviations
    assert mask_blocks(np.random.default_rng(1), np.zeros(3, dtype=np.int64), np.array([1e-9])).sum() == 1


def test_block_diffusion_ratios_are_uniform_and_never_zero() -> None:
    ratios = block_ratios(np.random.default_rng(2), 5000)
    assert ratios.min() >= 1e-3 and ratios.max() <= 1
    assert abs(ratios.mean() - 0.5005) < 0.021  # p = (1 - 1e-3) t + 1e-3


def test_corrupted_input_is_clean_before_and_masked_after_the_window() -> None:
    response = np.arange(10, 18, dtype=np.int32)
    view = corrupted(response, np.array([3, 4]), MASK, end=6)
    assert view.tolist() == [10, 11, 12, MASK, MASK, 15, MASK, MASK]
    assert response.tolist() == list(range(10, 18))


@settings(deadline=None)  # a property of values, not of a busy machine's speed
@given(
    length=st.integers(1, 80),
    size=st.integers(1, 40),
    ratios=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    seed=st.integers(0, 2**32),
    order=st.sampled_from(["trajectory", "reversed", "inverted", "shuffled", "random"]),
)
def test_views_always_divide_a_window_that_is_never_empty(
    length: int, size: int, ratios: tuple[float, float], seed: int, order: str
) -> None:
    rng = np.random.default_rng(seed)
    low, high = sorted(ratios)
    window = draw_window(rng, length, size, low, high)
    assert 0 <= window.start < window.end <= length
    assert window.start % size == 0
    assert window.end - window.start == size or window.end == length
    assert low <= window.ratio <= high
    reveal = rng.permutation(length).astype(np.uint16)
    views = choose_views(rng, reveal, window, order=order, inverted_pairs=0.2, order_rng=rng)  # type: ignore[arg-type]
    assert views.masked.size >= 1
    assert sorted([*views.masked, *views.complement]) == list(range(window.start, window.end))


def test_every_window_is_drawn_about_equally_often() -> None:
    starts = [draw_window(np.random.default_rng(n), 64, 24, 0.0, 0.8).start for n in range(3000)]
    values, counts = np.unique(starts, return_counts=True)
    assert values.tolist() == [0, 24, 48]  # the last holds 16 positions; there is no empty fourth
    assert abs(counts - 1000).max() < 130  # five standard deviations


def published_window(rng: np.random.Generator, answer: int, canvas: int, size: int) -> tuple[int, int]:
    """[start, end) by the published LLaDA trainer: n uniform on 0 .. floor(R / S), the last one to the end."""
    most = answer // size
    n = int(rng.integers(0, most + 1))
    return n * size, canvas if n == most else n * size + size


@pytest.mark.parametrize(("answer", "canvas", "size"), [(130, 256, 24), (128, 256, 32), (5, 64, 16), (255, 256, 17)])
def test_windows_are_drawn_over_the_answer_and_the_last_runs_on(answer: int, canvas: int, size: int) -> None:
    for seed in range(200):
        window = draw_window(np.random.default_rng(seed), answer, size, 0.0, 0.8, canvas=canvas)
        expected = published_window(np.random.default_rng(seed), answer, canvas, size)
        assert (window.start, window.end) == expected
    # Where the answer fills the canvas, the published last window would be empty; here the one before it is the last.
    ends = {draw_window(np.random.default_rng(seed), 64, 16, 0.0, 0.8, canvas=64).end for seed in range(200)}
    assert ends == {16, 32, 48, 64}


@pytest.mark.parametrize(("domain", "low", "high"), [("answer", 0.003, 0.010), ("canvas", 0.43, 0.48)])
def test_share_of_windows_that_see_nothing_but_padding(domain: str, low: float, high: float) -> None:
    """Answers of about 130 of 256 tokens, the published window sizes: 0.6 to 0.8 %, and 44 to 46 % over the canvas."""
    _, family = read_family(CONFIGS["llada"], {})
    stop = family.eos_token_id
    rng = np.random.default_rng(3)
    objective = PseudoTrajectory(window_sizes=(16, 16, 24, 24, 32, 32), window_domain=domain)  # type: ignore[arg-type]
    padding = total = 0
    for n in range(1000):
        answer = int(np.clip(rng.normal(130, 25), 40, 250))  # with its stop token
        response = np.full(256, stop, dtype=np.int32)
        response[: answer - 1] = 1
        sample = TrainingSample(str(n), np.array([2, 2], dtype=np.int32), response, np.arange(256, dtype=np.uint16))
        for step in (0, 3, 5):
            views = objective.views(draws(0, step, str(n)), sample, Moment(step, n, 1000, 1000 * step, 6000), family)
            first = min(view.rows.min() for view in views if view.rows.size) - 2
            padding += first >= answer
            total += 1
    assert low < padding / total < high


def test_draws_depend_on_seed_epoch_and_prompt_alone() -> None:
    def draw(seed: int, epoch: int, prompt_id: str) -> TrainingWindow:
        return draw_window(draws(seed, epoch, prompt_id).epoch, 256, 32, 0.0, 0.8)

    assert draw(1, 2, "ab") == draw(1, 2, "ab")
    others = [draw(2, 2, "ab"), draw(1, 3, "ab"), draw(1, 2, "ac"), draw(1, 22, "ab"), draw(12, 2, "ab")]
    assert len({other.ratio for other in [draw(1, 2, "ab"), *others]}) == 6
    ratios = [draw(0, 0, str(n)).ratio for n in range(2000)]
    assert abs(np.mean(ratios) - 0.4) < 0.03  # uniform on [0, .8]: the mean's deviation is .005
    assert abs(np.quantile(ratios, 0.25) - 0.2) < 0.04
