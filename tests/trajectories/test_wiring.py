"""Every setting of `trajectories` and of its import has a value of its own here, and is looked for where it acts.

A new setting needs a line in `ARRIVES` or `IMPORT_ARRIVES`: its value, and where it is seen in a run; one that changes
no row is named in `ANY_ROW`. The run is the whole pipeline in this process: its Ray Data is a stand-in that calls one
worker, and the teacher is watched where it hands on to the engine.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from d3llm_ray.config import build
from d3llm_ray.decoding import DiffusionLLM, Engine, Request
from d3llm_ray.errors import InputError
from d3llm_ray.models import load_model
from d3llm_ray.progress import Progress
from d3llm_ray.tasks import EMBEDDED
from d3llm_ray.trajectories import importer, pipeline, publish, read_metadata, read_trajectories, shards, staging
from d3llm_ray.trajectories.importer import ImportSettings
from d3llm_ray.trajectories.plan import make_plan
from d3llm_ray.trajectories.publish import IncompleteRun
from d3llm_ray.trajectories.schema import build_table
from d3llm_ray.trajectories.settings import TrajectorySettings
from d3llm_ray.trajectories.staging import is_finished, read_manifest, stage
from d3llm_ray.trajectories.storage import Location
from d3llm_ray.trajectories.worker import STAGED_SCHEMA, write_part
from tests.reference import vanilla_llada
from tests.reference.answer import Conventions
from tests.reference.network import Network
from tests.wiring import Look, Seen, only

QUIET = Progress(quiet=True)


def rungs(seen: Seen) -> tuple[float, ...]:
    """Temperatures of the requests of the prompt that is answered wrongly at each of them."""
    ladders: dict[tuple[int, ...], list[float]] = defaultdict(list)
    for request in seen["requests"]:
        ladders[tuple(request.prompt_ids)].append(request.temperature)
    return max(map(tuple, ladders.values()), key=len)


# Setting -> (a value that is not its default, where it is seen); None: a path that the fixture makes.
ARRIVES: dict[str, tuple[Any, Look]] = {
    "teacher": (None, only("teacher")),
    "prompts": (None, only("prompts")),
    "texts": (["one", "two"], only("texts")),
    "split": ("validation", only("split")),
    "count": (5, only("count")),
    "output": (None, only("output")),
    "keep": ("correct", only("keep")),
    "decoder": ("d3llm-nocache", lambda seen: only("decoder")(seen).name),
    "decoder_settings": (
        {"entropy_threshold": 0.3, "block_size": 8, "early_stop": True},
        lambda seen: {name: only("decoder")(seen).settings()[name] for name in ARRIVES["decoder_settings"][0]},
    ),
    "max_tokens": (16, lambda seen: {request.max_tokens for request in seen["requests"]}.pop()),
    "attempts": (3, lambda seen: len(rungs(seen))),
    "temperatures": ((0.1, 0.5, 0.9, 1.3), lambda seen: (*rungs(seen), 1.3)),  # attempts end before the last
    "seed": (7, lambda seen: 7 if {r.seed for r in seen["requests"]} == set(seen["seeds of 7"]) else None),
    "dtype": ("bfloat16", lambda seen: str(only("dtype")(seen)).removeprefix("torch.")),
    "device": ("cuda:1", only("device")),
    "actors": (5, lambda seen: only("pool")(seen).max_size),
    "min_actors": (3, lambda seen: only("pool")(seen).min_size),
    "gpus_per_actor": (0.5, only("num_gpus")),
    "max_batch_size": (4, only("max_batch_size")),
    "rows_per_block": (4, lambda seen: 2 * only("batch_size")(seen)),  # two calls share an actor
    "rows_per_file": (2, lambda seen: max(seen["rows of files"])),
    "max_error_fraction": (0.25, only("allowed errors")),
    "resource_timeout_s": (3.5, only("patience")),
    "stall_timeout_s": (33.0, only("stall")),
    "operator_bars": (True, only("bars")),
}

# What changes no row: another value continues a run, or finds it finished.
ANY_ROW = {"output", "device", "actors", "min_actors", "gpus_per_actor", "max_batch_size", "rows_per_block"}
ANY_ROW |= {"rows_per_file", "max_error_fraction", "resource_timeout_s", "stall_timeout_s", "operator_bars"}


class Here:
    """Ray Data's part: reads the prompts, calls one worker, call after call."""

    def __init__(self, seen: Seen, path: str) -> None:
        self.seen, self.path = seen, path

    def repartition(self, *, target_num_rows_per_block: int, strict: bool) -> Here:
        self.seen["batch_size"].append(target_num_rows_per_block)
        return self

    def map_batches(self, worker: Any, *, fn_constructor_kwargs: dict[str, Any], **options: Any) -> Here:
        self.worker = worker(**fn_constructor_kwargs)
        self.size = options["batch_size"]
        self.seen["batch_size"].append(self.size)
        self.seen["pool"].append(options["compute"])
        self.seen["num_gpus"].append(options["num_gpus"])
        return self

    def iter_batches(self, **_: Any) -> Iterator[pa.Table]:
        context = pipeline.DataContext.get_current()
        self.seen["stall"].append(context.execution_no_progress_timeout_s)
        self.seen["bars"].append(context.enable_progress_bars)

        async def call(batch: pa.Table) -> list[pa.Table]:
            return [receipt async for receipt in self.worker(batch)]

        prompts = pa.concat_tables([pq.read_table(path) for path in sorted(Path(self.path).glob("*.parquet"))])
        for first in range(0, prompts.num_rows, self.size):
            yield from asyncio.run(call(prompts.slice(first, self.size)))


def run_here(patch: pytest.MonkeyPatch, settings: TrajectorySettings) -> Seen:
    """The finished run of these settings without Ray, and what it handed on."""
    seen: Seen = defaultdict(list)
    load, make_engine, submit = DiffusionLLM.from_pretrained, Engine.__init__, Engine.submit

    def loaded(name: str, **options: Any) -> DiffusionLLM:
        seen["teacher"].append(name)
        seen["device"].append(options.pop("device"))
        llm = load(name, **options)
        seen["dtype"].append(next(llm.model.parameters()).dtype)
        seen["decoder"].append(llm.engine.decoder)
        return llm

    def made(engine: Engine, *args: Any, **options: Any) -> None:
        seen["max_batch_size"].append(options["max_batch_size"])
        make_engine(engine, *args, **options)

    def submitted(engine: Engine, request: Request) -> int:
        seen["requests"].append(request)
        return submit(engine, request)

    def waited(demand: list[dict[str, float]], timeout: float, _what: str) -> None:
        seen["demand"].append(demand)
        seen["patience"].append(timeout)

    def checked(failed: int, total: int, allowed: float, example: str) -> None:
        seen["allowed errors"].append(allowed)
        shards.check_errors(failed, total, allowed, example)

    with patch.context() as inner:
        inner.setattr(DiffusionLLM, "from_pretrained", loaded)
        inner.setattr(Engine, "__init__", made)
        inner.setattr(Engine, "submit", submitted)
        inner.setattr(pipeline, "connect", lambda min_cpus: seen["cpus"].append(min_cpus))
        inner.setattr(pipeline, "wait_for_resources", waited)
        inner.setattr(pipeline, "read_parquet", lambda path, filesystem: Here(seen, path))
        for module in (pipeline, publish):
            inner.setattr(module, "check_errors", checked)
        seen["output"].append(pipeline.run(settings, QUIET))
    return seen


def source(folder: Path) -> Path:
    """Seven prompts, of which the first three have no reference and the others one that no answer gives."""
    rows = [{"prompt": f"Tom has {n} apples.", **({"reference": "never"} if n > 2 else {})} for n in range(7)]
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> dict[str, Any]:
    """A value of its own for every setting."""
    folder = tmp_path_factory.mktemp("wiring")
    paths = {"teacher": str(tiny_checkpoint), "prompts": str(source(folder)), "output": str(folder / "out")}
    return {name: ARRIVES[name][0] for name in TrajectorySettings.model_fields if name in ARRIVES} | paths


@pytest.fixture(scope="module")
def seen(given: dict[str, Any]) -> Seen:
    with pytest.MonkeyPatch.context() as patch:
        settings = build(TrajectorySettings, {**given, "texts": []})
        found = run_here(patch, settings)
    (folder,) = map(Path, found["output"])
    rows = read_trajectories(folder).to_pylist()
    summary = json.loads((folder / "summary.json").read_text())
    found["prompts"].append(given["prompts"] if rows[0]["messages"][0]["content"] == "Tom has 0 apples." else None)
    found["count"].append(summary["rows"])
    found["keep"].append("correct" if (summary["correct"], summary["kept"]) == (0, 3) else "all")
    found["rows of files"] += [pq.read_metadata(file).num_rows for file in folder.glob("trajectories-*")]
    for prompt in make_plan(settings).prompts():
        ladder = range(3) if prompt.reference is not None else range(1)
        found["seeds of 7"] += [_seed(7, prompt.prompt_id, attempt) for attempt in ladder]
    # Two settings that go with other prompts.
    texts = make_plan(build(TrajectorySettings, given)).prompts()
    found["texts"].append([prompt.messages[0]["content"] for prompt in texts])
    task = make_plan(build(TrajectorySettings, {**given, "texts": [], "prompts": "arith"})).prompts()
    names = {split: next(EMBEDDED["arith"].stream(split, 1)).messages for split in ("train", "validation", "test")}
    first = next(task).messages
    found["split"] += [split for split, messages in names.items() if messages == first]
    return found


def _seed(seed: int, row: str, attempt: int) -> int:
    """The first 63 bits of SHA-256."""
    return int(hashlib.sha256(f"{seed}/{row}/{attempt}".encode()).hexdigest()[:16], 16) // 2


@pytest.mark.parametrize("name", TrajectorySettings.model_fields)
def test_every_setting_arrives_where_it_acts(name: str, given: dict[str, Any], seen: Seen) -> None:
    assert name in ARRIVES, f"{name}: a new setting needs a value of its own, and a look where it acts, in ARRIVES"
    value, look = ARRIVES[name]
    assert value is None or given[name] != TrajectorySettings.model_fields[name].get_default(), "it proves nothing"
    assert look(seen) == given[name]


def test_every_attempt_draws_with_a_seed_of_its_own(seen: Seen) -> None:
    seeds = [request.seed for request in seen["requests"]]
    assert len(set(seeds)) == len(seeds) == 3 * 1 + 2 * 3


def test_ray_is_asked_for_what_the_settings_say(seen: Seen) -> None:
    """The first three of five actors, and a CPU that reads prompts."""
    assert seen["demand"] == [[{"CPU": 1.0, "GPU": 0.5}] * 3 + [{"CPU": 1.0}]] and seen["cpus"] == [5 + 1]


def test_rows_are_those_of_the_published_algorithm(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The figure from outside for all tests that compare a run with another teacher of ours."""
    texts = ["Tom has 5 apples.", "How many apples?"]
    values = {"teacher": str(tiny_checkpoint), "texts": texts, "output": str(tmp_path / "out"), "max_tokens": 32}
    run_here(monkeypatch, build(TrajectorySettings, {**values, "decoder_settings": {"early_stop": False}}))
    model, family = load_model(tiny_checkpoint)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_checkpoint)
    assert family.mask_token_id is not None
    rules = Conventions(family.mask_token_id, family.eos_token_id, family.stop_token_ids, False, False, len(tokenizer))
    rows = read_trajectories(tmp_path / "out").to_pylist()
    assert [row["messages"] for row in rows] == [[{"role": "user", "content": text}] for text in texts]
    for row in rows:
        chat = tokenizer.apply_chat_template(row["messages"], tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(chat, add_special_tokens=False)["input_ids"]
        answer = vanilla_llada.decode(
            Network(model), prompt, 32, conventions=rules, block_size=family.block_size, early_stop=False
        )
        assert row["prompt_ids"] == prompt and row["forwards"] == answer.forwards == 32
        assert row["response_ids"] == answer.response_ids and row["reveal_step"] == answer.reveal_steps
        assert (row["temperature"], row["attempt"], row["is_correct"]) == (0.0, 0, None)


# Other values for those of `ARRIVES` that do not go along with `SOURCES`, or are its values.
OTHERS = {"prompts": "arith", "texts": ["three"], "split": "test", "teacher": "tiny-llada"}
OTHERS |= {"device": "cuda", "decoder_settings": {"steps": 16, "block_size": 8}, "min_actors": 1}
OTHERS |= {"temperatures": (0.0, 0.1, 0.2, 0.3, 0.9)}
SOURCES = {"file": {}, "texts": {"texts": ["one", "two", "three", "four", "five", "six"]}}
WITH = {"gpus_per_actor": 1.0, "decoder_settings": {"block_size": 8}}


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("name", [name for name in TrajectorySettings.model_fields if name != "output"])
def test_a_begun_folder_is_known_by_every_setting_that_changes_a_row(
    name: str, kind: str, given: dict[str, Any], tmp_path: Path
) -> None:
    """By its files and settings where the source has a version (a file), else by its prompts (texts)."""
    begun = {"teacher": given["teacher"], "prompts": given["prompts"], "output": str(tmp_path / "out"), **WITH}
    begun |= SOURCES[kind]
    plan = make_plan(build(TrajectorySettings, begun))
    stage(plan, QUIET)
    found = read_manifest(plan)
    assert found is not None and (found.inputs is not None) == (kind == "file")
    other = begun | {name: OTHERS.get(name, given[name])}
    changed = make_plan(build(TrajectorySettings, other))
    # A file has no splits, texts hide the prompts, and neither's rows are fewer than five.
    same = name in ANY_ROW or name == "split" or (name == "prompts" and kind == "texts")
    if same:
        assert stage(changed, QUIET) == found
    else:
        with pytest.raises(InputError, match="half-finished run of other prompts or settings"):
            stage(changed, QUIET)


def test_a_finished_folder_is_known_by_its_seed(given: dict[str, Any], tmp_path: Path) -> None:
    """Over a file that has not changed, whose prompts are not read again."""
    values = {"teacher": given["teacher"], "prompts": given["prompts"], "output": str(tmp_path / "out")}
    plan = make_plan(build(TrajectorySettings, values))
    manifest = stage(plan, QUIET)
    _commit(plan, range(7))
    publish.publish(plan, manifest, {}, QUIET)
    assert is_finished(plan, QUIET)
    with pytest.raises(InputError, match="a finished run of other prompts or settings"):
        is_finished(make_plan(build(TrajectorySettings, {**values, "seed": 1})), QUIET)
    assert read_metadata(tmp_path / "out")["seed"] == 0


def _commit(plan: Any, rows: range) -> None:
    """Parts that hold these prompts' rows."""
    plan.parts.make_folder()
    for prompt in plan.prompts():
        if prompt.row in rows:
            values = {"row": prompt.row, "prompt_id": prompt.prompt_id, "prompt_ids": [1], "response_ids": [5]}
            write_part(plan.parts, [{**values, "reveal_step": [0], "forwards": 1, "messages": prompt.messages}])


def test_prompts_that_were_lost_from_the_staging_are_missed(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every staged prompt has its row, but two of seven prompts are not staged any more."""
    monkeypatch.setattr(staging, "ROWS_PER_FILE", 5)
    values = {"teacher": given["teacher"], "prompts": given["prompts"], "output": str(tmp_path / "out")}
    plan = make_plan(build(TrajectorySettings, values))
    manifest = stage(plan, QUIET)
    assert manifest.prompts == 7
    _, second = plan.staged_prompts.files(".parquet")
    second.remove()
    _commit(plan, range(5))
    with pytest.raises(IncompleteRun, match="7 prompts, 5 staged, 5 distinct rows"):
        publish.publish(plan, manifest, {}, QUIET)
    assert not (tmp_path / "out" / "_SUCCESS").exists()


def test_a_part_has_its_name_when_all_of_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"row": 3, "prompt_id": "a" * 16, "error": "no"}]
    write, during = pq.write_table, []

    def watched(table: pa.Table, path: str, **options: Any) -> None:
        write(table, path, **options)
        during.append((Path(path).name, sorted(file.name for file in tmp_path.iterdir())))

    monkeypatch.setattr(pq, "write_table", watched)
    part = write_part(Location.of(tmp_path), rows)
    ((written, names),) = during
    final = Path(part.path).name
    assert written.startswith("_partial.") and written.endswith(f".{final}")  # which no reader takes for a part
    assert names == [written] and [file.name for file in tmp_path.iterdir()] == [final]
    assert pq.read_table(part.path).equals(build_table(rows, STAGED_SCHEMA))


def test_a_part_that_is_cut_short_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_table: pa.Table, path: str, **_options: Any) -> None:
        Path(path).write_bytes(b"PAR1")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    with pytest.raises(OSError, match="No space left"):
        write_part(Location.of(tmp_path), [{"row": 3, "prompt_id": "a" * 16, "error": "no"}])
    assert list(tmp_path.iterdir()) == []


EOS, MASK = 1, 2  # of the embedded tokenizer
ANSWER = [11, 12, 13, 14]
REVEALED = [2, 0, 3, 1]  # positions of the answer, in the order of their reveals


def published(question: str, prompt_ids: list[int], given_ids: list[int]) -> dict[str, Any]:
    """A row of d3LLM's layout, one reveal a step, whose column prompt_ids says `given_ids`."""
    sequence, steps = [*prompt_ids, *[MASK] * len(ANSWER)], []
    for position in REVEALED:
        sequence = list(sequence)
        sequence[len(prompt_ids) + position] = ANSWER[position]
        steps.append(sequence)
    return {"question": question, "prompt_ids": given_ids, "trajectory": steps, "idx": 1}


def answered(question: str, response: str) -> dict[str, Any]:
    """A row of dParallel's layout."""
    return {"question": question, "llm_response": response}


@pytest.fixture
def imported(tiny_checkpoint: Path, tmp_path: Path) -> Callable[..., Path]:
    """`imported(rows, **settings)`: the finished folder."""

    def import_rows(rows: list[dict[str, Any]], **settings: Any) -> Path:
        file = tmp_path / "source.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        values = {"source": str(file), "teacher": str(tiny_checkpoint), "output": str(tmp_path / "imported")}
        return Path(importer.run(build(ImportSettings, values | settings), QUIET))

    return import_rows


@pytest.mark.parametrize(("missing", "inferred"), [(0, 0), (1, 1), (2, 1)])
def test_prompts_that_are_cut_short_are_not_believed(
    missing: int, inferred: int, tiny_checkpoint: Path, imported: Callable[..., Path]
) -> None:
    """The prompt's end would be the answer's beginning, revealed in the first step beside the first token."""
    question = "Tom has 5 apples."
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_checkpoint)
    prompt = tokenizer(question, add_special_tokens=False)["input_ids"]
    folder = imported([published(question, prompt, prompt[: len(prompt) - missing])], retemplate=False)
    (row,) = read_trajectories(folder).to_pylist()
    assert row["prompt_ids"] == prompt and row["response_ids"] == ANSWER and row["reveal_step"] == [1, 3, 0, 2]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["template"]["inferred"] == inferred


def source_of(imported: Callable[..., Path], **_: Any) -> Any:
    (row,) = read_trajectories(imported([answered("one apple", "two")])).to_pylist()
    return row["messages"][0]["content"]


def teacher_of(imported: Callable[..., Path], **_: Any) -> Any:
    return Path(read_metadata(imported([answered("one apple", "two")]))["teacher"]).name


def prompt_ids(imported: Callable[..., Path], **settings: Any) -> Any:
    (row,) = read_trajectories(imported([published("Tom has 5 apples.", [5, 6], [5, 6])], **settings)).to_pylist()
    return row["prompt_ids"] == [5, 6]


def canvas(imported: Callable[..., Path], **settings: Any) -> Any:
    (row,) = read_trajectories(imported([answered("one apple", "two")], **settings)).to_pylist()
    return len(row["response_ids"])


def refused(imported: Callable[..., Path], **settings: Any) -> Any:
    """Whether two bad rows of three are more than the run may have; a single one never is."""
    try:
        imported([answered("one apple", "two"), *[answered(f"{n} apples", "") for n in "ab"]], **settings)
    except InputError as error:
        return "gave no trajectory" in str(error)
    except Exception:  # finished, with two rows fewer
        return False
    return False


def shard_sizes(imported: Callable[..., Path], **settings: Any) -> Any:
    folder = imported([answered(f"{n} apples", "two") for n in range(5)], **settings)
    return [pq.read_metadata(file).num_rows for file in sorted(folder.glob("trajectories-*"))]


def split_of(imported: Callable[..., Path], *, split: str, output: str) -> Any:
    """The question of the only row of a folder's file of that name."""
    folder = Path(output).parent / "splits"
    folder.mkdir(exist_ok=True)
    for name in ("train", "test"):
        (folder / f"{name}.jsonl").write_text(json.dumps(answered(f"of {name}", "two")) + "\n")
    (row,) = read_trajectories(imported([], source=str(folder), split=split, output=output)).to_pylist()
    return row["messages"][0]["content"]


TWO = ("apples", "has")


def response_of(
    imported: Callable[..., Path], *, output: str, responses: Any = ("apples", "has"), **settings: Any
) -> Any:
    """The training set's response to a trajectory whose idx is 1, and whose question two of its rows have."""
    question = "Tom has 5 apples."
    file = Path(output).parent / "responses.jsonl"
    file.write_text("".join(json.dumps(answered(question, response)) + "\n" for response in responses))
    folder = imported([published(question, [5, 6], [5, 6])], responses=str(file), output=output, **settings)
    (row,) = read_trajectories(folder).to_pylist()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(read_metadata(folder)["teacher"])
    return tokenizer.decode(row["reference_ids"]).strip()


# Setting -> (looks at an import, (value, figure) of two values)
IMPORT_ARRIVES: dict[str, tuple[Callable[..., Any], list[tuple[Any, Any]]]] = {
    "source": (source_of, [(None, "one apple")]),
    "teacher": (teacher_of, [(None, "tiny-random")]),
    "output": (lambda imported: imported([answered("one apple", "two")]).name, [(None, "imported")]),
    "split": (split_of, [("train", "of train"), ("test", "of test")]),
    "responses": (response_of, [(TWO, "has"), (TWO[::-1], "apples")]),
    "response_key": (response_of, [("idx", "has"), ("question", "apples")]),
    "retemplate": (prompt_ids, [(True, False), (False, True)]),
    "max_tokens": (canvas, [(16, 16), (48, 48)]),
    "max_error_fraction": (refused, [(0.4, True), (0.7, False)]),
    "rows_per_file": (shard_sizes, [(2, [2, 2, 1]), (4, [4, 1])]),
}


@pytest.mark.parametrize("name", ImportSettings.model_fields)
def test_every_setting_of_an_import_acts(name: str, imported: Callable[..., Path], tmp_path: Path) -> None:
    assert name in IMPORT_ARRIVES, f"{name}: a new setting needs two values and their figures in IMPORT_ARRIVES"
    look, cases = IMPORT_ARRIVES[name]
    for number, (value, figure) in enumerate(cases):
        given = {} if value is None else {name: value, "output": str(tmp_path / f"imported-{number}")}
        assert look(imported, **given) == figure, value
