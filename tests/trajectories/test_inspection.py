from __future__ import annotations

import io
import random
from collections.abc import Sequence
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from d3llm_ray.config import parse
from d3llm_ray.errors import InputError
from d3llm_ray.models import load_tokenizer, read_configs
from d3llm_ray.terminal import legible
from d3llm_ray.trajectories.inspection import InspectSettings, run
from d3llm_ray.trajectories.play import ENTER, LEAVE, Unmasking, play, token_texts
from d3llm_ray.trajectories.plots import plot_histograms, plot_unmasking
from d3llm_ray.trajectories.reveals import Reveals, round_up
from d3llm_ray.trajectories.schema import ERROR_SCHEMA, ERRORS, SCHEMA, build_table, with_metadata
from d3llm_ray.trajectories.storage import SUCCESS, Location

STOP = 1  # tiny-llada's <|endoftext|>
METADATA = {"teacher": "tiny-llada", "family": "llada", "decoder": {"decoder": "vanilla", "block_size": 4}}
UNORDERED = dict.fromkeys(("reveal_step", "reveal_entropy", "attempt", "forwards"))


def row(number: int, canvas: int = 8, **changes: Any) -> dict[str, Any]:
    """Random tokens, half of them followed by stop tokens; several positions may share a forward."""
    rng = random.Random(number)
    answer = rng.randrange(1, canvas + 1)
    return {
        "prompt_id": f"{number:016x}",
        "messages": [{"role": "user", "content": "How many apples?"}],
        "prompt_ids": [4, 5],
        "response_ids": [rng.randrange(10, 100) for _ in range(answer)] + [STOP] * (canvas - answer),
        "reveal_step": [rng.randrange(6) for _ in range(canvas)],
        "reveal_entropy": [rng.randrange(2048) / 1024 for _ in range(canvas)],  # exact in float16
        "reference": "42",
        "answer": "42" if number % 4 else "41",
        "is_correct": number % 4 != 0,
        "attempt": number % 3,
        "forwards": rng.randrange(6, 9),
        **changes,
    }


def folder(path: Path, rows: Sequence[dict[str, Any]], metadata: dict[str, Any] = METADATA, files: int = 1) -> str:
    path.mkdir()
    table = build_table(rows).replace_schema_metadata(with_metadata(SCHEMA, metadata).metadata)
    size = max(1, -(-len(rows) // files))
    for number in range(files):
        (Location.of(path) / f"trajectories-{number:05d}.parquet").write_table(table.slice(number * size, size), 3)
    (path / SUCCESS).touch()
    return str(path)


def inspect(path: str, output: Path, **changes: Any) -> dict[str, str]:
    """The lines of the report that begin with a name, by that name."""
    report = run(InspectSettings(path=path, output=output, **{"play": False, **changes}))
    pairs = (line.split("  ", 1) for line in report.splitlines() if "  " in line.strip())
    return {name: value.strip() for name, value in pairs if name}


@pytest.mark.parametrize(("stops", "block_size"), [((STOP,), 4), ((), 4), ((STOP,), 3), ((STOP,), None)])
def test_figures_equal_those_counted_one_by_one(stops: tuple[int, ...], block_size: int | None) -> None:
    rows = [row(number, canvas=8 if number % 3 else 10) for number in range(40)]
    rows += [row(40, **UNORDERED), row(41, reveal_entropy=None)]
    reveals = Reveals(stops, block_size, bins=10)
    reveals.add(build_table(rows[:7]))
    reveals.add(build_table(rows[7:]))

    left_first = right_first = counted_positions = 0
    relative, steps, entropies = [], [], []
    for one in rows:
        ids = one["response_ids"]
        length = ids.index(STOP) if stops and STOP in ids else len(ids)
        entropies += (one["reveal_entropy"] or [])[:length]
        if one["reveal_step"] is None:
            continue
        counted_positions += length
        steps += one["reveal_step"][:length]
        relative += [10 * step // one["forwards"] for step in one["reveal_step"][:length]]
        for left, right in combinations(range(length), 2):
            if left // (block_size or len(ids)) == right // (block_size or len(ids)):
                left_first += one["reveal_step"][left] < one["reveal_step"][right]
                right_first += one["reveal_step"][left] > one["reveal_step"][right]
    assert reveals.order == pytest.approx((left_first - right_first) / (left_first + right_first))
    assert reveals.positions == counted_positions
    assert reveals.forwards == sum(one["forwards"] or 0 for one in rows)
    assert reveals.canvases == {8: 28, 10: 14}
    assert reveals.untold == {"reveal_step": 1, "reveal_entropy": 2, "attempt": 1}
    by_forwards, by_step, by_entropy = reveals.histograms()
    assert by_forwards.counts.tolist() == [relative.count(bin_) for bin_ in range(10)]
    assert by_step.edges.tolist() == list(range(7))
    assert by_step.counts.tolist() == [steps.count(step) for step in range(6)]
    assert by_entropy.edges == pytest.approx(np.arange(len(by_entropy.edges)) * 0.2)
    inside = [sum(low <= value < high for value in entropies) for low, high in pairwise(by_entropy.edges)]
    assert by_entropy.counts.tolist() == inside and sum(inside) == len(entropies)


def test_order_is_one_from_left_to_right_and_minus_one_the_other_way() -> None:
    for steps, expected in (([0, 1, 2, 3], 1.0), ([3, 2, 1, 0], -1.0), ([2, 3, 0, 1], 1.0), ([0, 0, 1, 1], None)):
        reveals = Reveals((), block_size=2, bins=5)
        reveals.add(build_table([row(0, response_ids=[9] * 4, reveal_step=steps, reveal_entropy=None)]))
        assert reveals.order == expected


@pytest.mark.parametrize(("width", "expected"), [(1.0, 1.0), (1.1, 2.0), (0.19, 0.2), (0.021, 0.05), (60.0, 100.0)])
def test_bins_have_round_widths(width: float, expected: float) -> None:
    assert round_up(width) == pytest.approx(expected)


def test_report_of_rows_counted_by_hand(tmp_path: Path) -> None:
    """Two answers of 3 and 8 tokens in 6 and 8 forwards; the padding of the first counts nowhere."""
    first = row(0, response_ids=[20, 21, 22] + [STOP] * 5, reveal_step=[0, 1, 2, 5, 4, 4, 4, 4], forwards=6)
    second = row(1, response_ids=[20] * 8, reveal_step=[3, 2, 1, 0, 4, 5, 6, 7], forwards=8)
    path = tmp_path / "rows"
    folder(path, [first, second], files=2)
    errors = [{"row": number, "error": "too long" if number else "no text"} for number in range(3)]
    (Location.of(path) / ERRORS).write_table(build_table(errors, ERROR_SCHEMA))
    report = inspect(str(path), tmp_path / "pictures")
    size = sum(file.stat().st_size for file in path.glob("trajectories-*"))
    assert report["rows"] == "2" and report["canvas"] == "8 positions"
    assert report["size"] == f"{size / 1e6:.3g} MB in 2 files, {size / 2:.0f} bytes a row"
    assert report["teacher"] == "tiny-llada (llada)" and report["decoder"] == "vanilla: block_size 4"
    assert report["correct"] == "1 of 2 judged (50.0 %)" and report["correct at attempt"] == "0: 0, 1: 1"
    assert report["forwards"] == "7.0 a row" and report["tokens per forward"].startswith("0.79 (")  # 11 / 14
    # Left first: 3 pairs of the first answer, 6 of the second's other block; its first block runs backwards, 6 pairs.
    assert report["order"].startswith("0.20: Goodman-Kruskal gamma")
    assert report["errors"] == "3, most often: 2 x too long; 1 x no text"
    assert report["row"] == first["prompt_id"] and report["answer"] == "41 (wrong, reference 42)"
    written = sorted(file.name for file in (tmp_path / "pictures").iterdir())
    assert written == ["histograms.png", "inspect.yaml", f"trajectory-{first['prompt_id']}.png"]
    inspect(str(path), tmp_path / "pictures", row=1)  # the same folder, another picture
    assert len(list((tmp_path / "pictures").iterdir())) == 4


def test_what_imported_rows_do_not_tell_is_said(tmp_path: Path) -> None:
    rows = [row(0, **UNORDERED), row(1, reveal_entropy=None, attempt=None)]
    report = inspect(folder(tmp_path / "rows", rows, {"teacher": "/nowhere"}), tmp_path / "pictures")
    assert report["not known"] == "reveal_step in 1 rows, reveal_entropy in 2 rows, attempt in 2 rows"
    assert report["decoder"].startswith("unknown") and report["correct at attempt"] == "unknown"
    assert (
        report["positions per forward"]
        == f"{8 / rows[1]['forwards']:.2f} (revealed positions, the stop token is unknown)"
    )
    assert "the block size is unknown" in report["order"]
    assert report["row"] == rows[1]["prompt_id"]  # the first that knows its order


def test_rows_without_any_order_and_no_rows_at_all_are_reported(tmp_path: Path) -> None:
    path = folder(tmp_path / "rows", [row(0, **UNORDERED)])
    report = inspect(path, tmp_path / "pictures")
    assert report["rows"] == "1" and "order" not in report and "row" not in report
    assert not (tmp_path / "pictures").exists()
    with pytest.raises(InputError, match=r"row: 0 has no reveal_step"):
        inspect(path, tmp_path / "pictures", row=0)
    assert inspect(folder(tmp_path / "empty", []), tmp_path / "pictures")["rows"] == "0"


@pytest.mark.parametrize("wanted", [7, "7", f"{7:016x}"])
def test_row_is_found_by_number_and_by_id(wanted: int | str, tmp_path: Path) -> None:
    path = folder(tmp_path / "rows", [row(number) for number in range(10)], files=2)
    assert inspect(path, tmp_path / "pictures", row=wanted)["row"] == f"{7:016x}"


@pytest.mark.parametrize("wanted", [10, -1, "abc"])
def test_row_that_is_not_there_is_refused(wanted: int | str, tmp_path: Path) -> None:
    path = folder(tmp_path / "rows", [row(number) for number in range(10)])
    with pytest.raises(InputError, match=f"row: got {wanted!r}; accepted: 0 to 9, or a prompt_id such as 0{{16}}, 0"):
        inspect(path, tmp_path / "pictures", row=wanted)


def test_missing_unfinished_and_foreign_paths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        inspect(str(tmp_path / "nothing"), tmp_path / "pictures")
    path = folder(tmp_path / "rows", [row(0)])
    (tmp_path / "rows" / SUCCESS).unlink()
    with pytest.raises(InputError, match="has no _SUCCESS"):
        inspect(path, tmp_path / "pictures")
    foreign = Location.of(tmp_path / "foreign.parquet")
    foreign.write_table(build_table([row(0)]).drop_columns(["forwards"]))
    with pytest.raises(InputError, match="column 'forwards' is missing"):
        inspect(foreign.path, tmp_path / "pictures")


def test_pictures_never_replace_another_file(tmp_path: Path) -> None:
    path = folder(tmp_path / "rows", [row(0)])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "histograms.png").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for output in ("mine", "rows", "file", "file/below"):
        with pytest.raises(InputError, match=r"^output: "):
            inspect(path, tmp_path / output)
    assert (tmp_path / "mine" / "histograms.png").read_text() == "mine" == (tmp_path / "file").read_text()
    assert len(list((tmp_path / "rows").iterdir())) == 2


def test_path_is_a_word_and_may_come_from_a_file(tmp_path: Path) -> None:
    config = tmp_path / "inspect.yaml"
    config.write_text("path: some/folder\nrow: 3\n")
    assert parse(InspectSettings, ["a/b", "--row", "5", "--play"])[0].model_dump(include={"path", "row", "play"}) == {
        "path": "a/b",
        "row": "5",
        "play": True,
    }
    settings, _ = parse(InspectSettings, ["--config", str(config), "--no-play"])
    assert (settings.path, settings.row, settings.play) == ("some/folder", 3, False)
    assert parse(InspectSettings, ["a/b", "--config", str(config)])[0].path == "a/b"
    with pytest.raises(InputError, match="bins"):
        parse(InspectSettings, ["a/b", "--bins", "0"])


@pytest.fixture(scope="module")
def answer() -> Unmasking:
    """`We have 7.` and a newline, then two stop tokens; the last word first."""
    _, family = read_configs("tiny-llada")
    tokenizer = load_tokenizer("tiny-llada", family)
    assert tokenizer is not None
    ids = tokenizer("We have 7.\n", add_special_tokens=False)["input_ids"] + [STOP, STOP]
    steps = [3, 2, 1, 0, 3, 0, 0]
    entropy = [step / 2 for step in steps]
    own = row(0, response_ids=ids, reveal_step=steps, reveal_entropy=entropy, forwards=5)
    return Unmasking.of(own, tokenizer, block_size=4)


def test_frames_fill_the_masked_places(answer: Unmasking) -> None:
    assert answer.moments == [-1, 0, 1, 2, 3]
    frames = [answer.frame(step).split("\n", 1) for step in answer.moments]
    assert [text for _, text in frames] == [
        "░░░░░░░",
        "░░░.░<|endoftext|>×2",
        "░░ 7.░<|endoftext|>×2",
        "░ have 7.░<|endoftext|>×2",
        " We have 7.\n<|endoftext|>×2",
    ]
    assert frames[1][0] == "forward 1 of 5, 3 of 7 positions revealed"
    assert answer.frame(1, mark=True).endswith("░░\x1b[7m 7\x1b[27m.░<|endoftext|>×2")


def test_elsewhere_than_on_a_terminal_a_few_plain_frames_are_printed() -> None:
    long = row(0, response_ids=[20] * 40, reveal_step=list(range(40)), reveal_entropy=None, forwards=40)
    stream = io.StringIO()
    play(Unmasking.of(long, None, None), 1000.0, stream)
    frames = stream.getvalue().strip("\n").split("\n\n")
    assert len(frames) == 8 and "\x1b" not in stream.getvalue()
    assert frames[0] == f"forward 0 of 40, 0 of 40 positions revealed\n{'░' * 40}"
    assert frames[-1] == f"forward 40 of 40, 40 of 40 positions revealed\n{' 20' * 40}"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_terminal_is_given_back_with_the_answer_on_it(answer: Unmasking, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    play(answer, 0.0, stream)
    drawn, left = stream.getvalue().split(LEAVE)
    assert drawn.startswith(ENTER) and drawn.count("forward ") == 5
    assert left == f"{answer.frame(3)}\n\n"

    def interrupt(_seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("d3llm_ray.trajectories.play.time.sleep", interrupt)
    stream = Terminal()
    with pytest.raises(KeyboardInterrupt):
        play(answer, 0.0, stream)
    assert stream.getvalue().endswith(LEAVE)


def test_texts_cannot_steer_the_terminal() -> None:
    assert legible("a\x1b[2Jb\tc\r\n") == "a\ufffd[2Jb    c\ufffd\n"


def test_token_texts_join_to_the_text() -> None:
    _, family = read_configs("tiny-llada")
    tokenizer = load_tokenizer("tiny-llada", family)
    assert tokenizer is not None
    text = "There are 20 coins in the box of Mia.\n#### 27"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert "".join(token_texts(tokenizer, ids)) == f" {text}"
    assert token_texts(tokenizer, [STOP]) == ["<|endoftext|>"]


def test_picture_colours_every_position_by_its_entropy(answer: Unmasking, tmp_path: Path) -> None:
    """Viridis: entropy 0 is its darkest colour and the row's largest its brightest, as in matplotlib's table."""
    plot_unmasking(answer, tmp_path / "row.png")
    (file,) = tmp_path.iterdir()
    pixels = np.round(imread(file)[..., :3] * 255).astype(int).reshape(-1, 3).tolist()
    darkest, brightest = pixels.count([68, 1, 84]), pixels.count([253, 231, 36])
    assert darkest > 1000 and brightest > 1000
    plot_unmasking(Unmasking.of(row(0, reveal_entropy=None), None, None), tmp_path / "row.png")
    pixels = np.round(imread(file)[..., :3] * 255).astype(int).reshape(-1, 3).tolist()
    assert [253, 231, 36] not in pixels


def test_long_canvas_continues_below(tmp_path: Path) -> None:
    heights = []
    for canvas in (64, 128):
        path = tmp_path / f"{canvas}.png"
        plot_unmasking(Unmasking.of(row(0, canvas=canvas), None, 32), path)
        heights.append(imread(path).shape[0])
    assert heights[1] > 1.5 * heights[0]


def test_histograms_of_what_is_known_are_drawn_side_by_side(tmp_path: Path) -> None:
    widths = []
    for entropy in (None, [0.5] * 8):
        reveals = Reveals((), 4, bins=5)
        reveals.add(build_table([row(0, reveal_entropy=entropy)]))
        plot_histograms(reveals.histograms(), tmp_path / "histograms.png")
        widths.append(imread(tmp_path / "histograms.png").shape[1])
    assert widths[1] * 2 == widths[0] * 3
