"""Points files: what is read, what is refused, and the published tables against the published scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d3llm_ray.config import to_yaml
from d3llm_ray.errors import InputError
from d3llm_ray.leaderboard.board import score_table
from d3llm_ray.leaderboard.points import MethodPoints, PointsTable, open_points
from tests.evaluation import test_aup as published

FAMILIES = {
    "llada": (published.LLADA, published.LLADA_TASKS, published.LLADA_BEST, published.LLADA_AVERAGES),
    "dream": (published.DREAM, published.DREAM_TASKS, published.DREAM_BEST, published.DREAM_AVERAGES),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_published_tables_give_the_published_scores_and_averages(name: str) -> None:
    methods, tasks, best, averages = FAMILIES[name]
    scored = score_table(open_points(name))
    assert scored.best == dict(zip(tasks, best, strict=True))
    assert [each.name for each in scored.methods] == list(averages)
    for each in scored.methods:
        expected = {task: score for task, (_, _, score) in zip(tasks, methods[each.name], strict=True)}
        assert each.aup == pytest.approx(expected, abs=1e-3), each.name
        assert each.average == pytest.approx(averages[each.name], abs=0.01)
        assert not each.left_out


def test_the_published_coder() -> None:
    (coder,) = score_table(open_points("dream-coder")).methods
    expected = [score for *_, score in published.CODER]
    assert list(coder.aup.values()) == pytest.approx(expected, abs=1e-3)
    assert coder.average == pytest.approx(sum(expected) / 4, abs=1e-3)  # no published average: over the tasks present


def test_a_file_is_read_and_written_back(tmp_path: Path) -> None:
    table = open_points("dream")
    (tmp_path / "mine.yaml").write_text(to_yaml(table))
    assert open_points(str(tmp_path / "mine.yaml")) == table
    hidden = {name for name, method in table.methods.items() if not method.shown}
    assert hidden == {"EAGLE-3"}


def test_a_file_without_a_title_is_called_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("methods: {a: {points: {t: [[1, 50]]}}}")
    table = open_points(str(tmp_path / "mine.yaml"))
    assert (table.title, table.tasks) == ("mine", ["t"])


REFUSED = [
    ("{}", "methods: required"),
    ("methods: {}", "methods: "),
    ("methods: {a: {points: {}}}", "methods.a.points"),
    ("methods: {a: {points: {t: []}}}", "at least one"),
    ("methods: {a: {points: {t: [[0, 50]]}}}", "tokens per forward above 0"),
    ("methods: {a: {points: {t: [[.nan, 50]]}}}", "tokens per forward above 0"),
    ("methods: {a: {points: {t: [[1, 101]]}}}", "0 to 100"),
    ("methods: {a: {points: {t: [[1, -1]]}}}", "0 to 100"),
    ("methods: {a: {points: {t: [[1]]}}}", "methods.a.points.t.0"),
    ("methods: {a: {points: {t: [[1, fast]]}}}", "methods.a.points.t.0.1"),
    ("methods: {a: {points: {t: [[1, 50]]}, tps: {t: [[0, 50]]}}}", "tokens a second above 0"),
    ("methods: {a: {points: {t: [[1, 50]]}, tps: {t: [[9, 150]]}}}", "0 to 100 percent"),
    ("methods: {a: {points: {t: [[1, 50]]}, colour: red}}", "unknown setting; accepted: points, tps"),
    ("methods: {a: {points: {t: [[1, 50]]}}, a: {points: {t: [[1, 60]]}}}", "every key once"),
    ("{divisor: 0, methods: {a: {points: {t: [[1, 50]]}}}}", "divisor"),
    ("{best: {t: 120}, methods: {a: {points: {t: [[1, 50]]}}}}", "best.t"),
    (
        "methods: {a: {points: {t: [[1, 0.7]]}}, b: {points: {t: [[1, 0.82], [3, 0.8]]}}}",
        "percent, 0 to 100, such as 82",
    ),
    ("[1, 2]", "a mapping"),
    ("a: [", "is not YAML"),
]


@pytest.mark.parametrize(("text", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_what_is_no_points_file_is_refused_by_name(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(InputError, match=r"^points: ") as error:
        open_points(str(tmp_path / "mine.yaml"))
    assert said in str(error.value) and "mine.yaml" in str(error.value) and "\n" not in str(error.value)


def test_a_name_that_is_none_is_answered_with_those_there_are() -> None:
    with pytest.raises(InputError, match="'nothing'; accepted: a YAML file, or one of dream-coder, dream, llada"):
        open_points("nothing")


def test_a_low_accuracy_beside_others_is_percent_and_so_are_none_right() -> None:
    """0.8 % is an accuracy where others reach more; a task of which nobody solves anything has no scale at all."""
    methods: dict[str, Any] = {"a": {"points": {"t": [[1, 0.8]], "none": [[1, 0]]}}, "b": {"points": {"t": [[2, 30]]}}}
    assert PointsTable(methods=methods).methods["a"].points["t"] == ((1.0, 0.8),)


pairs = st.lists(st.tuples(st.floats(0.1, 20), st.floats(2, 100)), min_size=1, max_size=4).map(tuple)
tables = st.dictionaries(
    st.sampled_from("abcd"), st.dictionaries(st.sampled_from(["s", "t"]), pairs, min_size=1), min_size=2
)


@given(tables, st.randoms())
def test_the_order_of_methods_changes_no_score(methods: dict[str, Any], random: Any) -> None:
    built = {name: MethodPoints(points=points) for name, points in methods.items()}
    names = list(built)
    random.shuffle(names)
    one = score_table(PointsTable(methods=built))
    other = score_table(PointsTable(methods={name: built[name] for name in names}))
    assert {each.name: each.aup for each in one.methods} == {each.name: each.aup for each in other.methods}
    averages = [each.average for each in one.methods]
    assert averages == sorted(averages, reverse=True)
