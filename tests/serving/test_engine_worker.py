"""The engine's thread: same answers as the offline API, slots freed, failures and limits told."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from d3llm_ray.decoding import DiffusionLLM, Request
from d3llm_ray.metrics import ServingMetrics
from d3llm_ray.serving import worker as worker_module
from d3llm_ray.serving.deadline import Deadline, DeadlinePassed
from d3llm_ray.serving.worker import EngineFailure, EngineWorker, Overloaded, Submission


@pytest.fixture(scope="module")
def llm(tiny_checkpoint: Any) -> DiffusionLLM:
    return DiffusionLLM.from_pretrained(tiny_checkpoint, max_batch_size=2)


def run_worker(llm: DiffusionLLM, test: Callable[[EngineWorker], Awaitable[None]], **settings: Any) -> None:
    async def main() -> None:
        worker = EngineWorker(
            llm.engine, settings.get("capacity", 64), ServingMetrics("m"), settings.get("timeout", 60.0)
        )
        worker.start()
        try:
            await asyncio.wait_for(test(worker), 60)
        finally:
            worker.stop()

    asyncio.run(main())


@pytest.fixture
def steps(llm: DiffusionLLM, monkeypatch: pytest.MonkeyPatch) -> threading.Semaphore:
    """Holds the engine before every forward until the test releases one."""
    step, permits = llm.engine.step, threading.Semaphore(0)

    def permitted() -> Any:
        assert permits.acquire(timeout=30)
        return step()

    monkeypatch.setattr(llm.engine, "step", permitted)
    return permits


async def read(submission: Submission) -> tuple[list[int], int, int]:
    """Token ids of all events, forwards counted by the worker and by the engine."""
    ids: list[int] = []
    while True:
        event = await submission.next_event()
        ids += event.token_ids
        if event.completion is not None:
            assert ids == event.completion.token_ids
            return ids, event.forwards, event.completion.forwards


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it did not happen within 10 s"
        await asyncio.sleep(0.005)


def test_concurrent_requests_get_the_offline_answers(llm: DiffusionLLM) -> None:
    prompts = [llm.encode(f"{count} + {count} ?") for count in range(6)]
    lengths = [16, 40, 24, 64, 8, 33]
    alone = [llm.generate([ids], max_tokens=length)[0] for ids, length in zip(prompts, lengths, strict=True)]

    async def test(worker: EngineWorker) -> None:
        requests = [Request(ids, length) for ids, length in zip(prompts, lengths, strict=True)]
        answers = await asyncio.gather(*(read(worker.submit(request)) for request in requests))
        for (ids, counted, forwards), output in zip(answers, alone, strict=True):
            assert ids == output.token_ids
            # Two slots for six requests: waiting forwards must not be counted.
            assert counted == forwards == output.forwards
        assert worker.in_flight == 0

    run_worker(llm, test)


def test_closed_request_frees_its_slot_within_a_forward(llm: DiffusionLLM, steps: threading.Semaphore) -> None:
    async def test(worker: EngineWorker) -> None:
        leaving = worker.submit(
            Request(llm.encode("1"), 64, decoder=llm.engine.decoder.override(entropy_threshold=0.0))
        )
        await until(lambda: llm.engine.waiting == 1)
        steps.release()
        await until(lambda: llm.engine.active == 1)
        leaving.close()
        leaving.close()
        assert worker.in_flight == 0
        steps.release()  # the forward that may already have begun
        await until(lambda: llm.engine.active == 0)
        assert llm.engine.waiting == 0

    run_worker(llm, test)


def test_waiting_request_that_is_closed_never_runs(llm: DiffusionLLM, steps: threading.Semaphore) -> None:
    async def test(worker: EngineWorker) -> None:
        begun = llm.engine.steps
        running = [worker.submit(Request(llm.encode("1"), 16)) for _ in range(2)]
        waiting = worker.submit(Request(llm.encode("2"), 64))
        await until(lambda: llm.engine.waiting > 0)
        steps.release()  # before it all three might not have arrived
        await until(lambda: llm.engine.waiting == 1)
        waiting.close()
        steps.release(1000)
        answers = [await read(submission) for submission in running]
        longest = max(forwards for _, _, forwards in answers)
        assert llm.engine.steps - begun <= longest + 1  # the first may have started a forward before the second
        assert not waiting.events

    run_worker(llm, test)


def test_a_deadline_frees_the_slot_also_when_nobody_reads(llm: DiffusionLLM, steps: threading.Semaphore) -> None:
    async def test(worker: EngineWorker) -> None:
        begun = llm.engine.steps
        submission = worker.submit(Request(llm.encode("1"), 64), Deadline(0.2))
        await until(lambda: worker.in_flight == 0)
        steps.release(1000)  # a forward has begun
        await until(lambda: llm.engine.active == llm.engine.waiting == 0)
        assert llm.engine.steps <= begun + 2
        with pytest.raises(DeadlinePassed, match="not complete after 0.2 s"):
            while True:
                await submission.next_event()

    run_worker(llm, test)


def test_full_queue_refuses(llm: DiffusionLLM) -> None:
    async def test(worker: EngineWorker) -> None:
        accepted = [worker.submit(Request(llm.encode("1"), 64)) for _ in range(3)]
        with pytest.raises(Overloaded):
            worker.submit(Request(llm.encode("1"), 64))
        accepted[0].close()
        accepted[0] = worker.submit(Request(llm.encode("1"), 8))
        await asyncio.gather(*(read(submission) for submission in accepted))

    run_worker(llm, test, capacity=3)


def test_engine_exception_fails_all_in_flight(llm: DiffusionLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    submitted = threading.Event()

    def broken() -> Any:
        assert submitted.wait(10)
        raise RuntimeError("out of memory")

    async def test(worker: EngineWorker) -> None:
        assert worker.problem() is None
        monkeypatch.setattr(llm.engine, "step", broken)
        request = Request(llm.encode("1"), 8)
        submissions = [worker.submit(request) for _ in range(3)]
        submitted.set()
        for submission in submissions:
            with pytest.raises(EngineFailure):
                await submission.next_event()
        assert worker.in_flight == 0
        assert worker.problem() == "the engine has failed"
        with pytest.raises(EngineFailure):
            worker.submit(Request(llm.encode("1"), 8))

    run_worker(llm, test)
    for request_id in range(1000):  # the fixture's engine is shared
        llm.engine.cancel(request_id)


@pytest.mark.parametrize("urgent", [False, True])
def test_events_gather_between_the_first_and_the_last_unless_they_are_urgent(
    llm: DiffusionLLM, monkeypatch: pytest.MonkeyPatch, urgent: bool
) -> None:
    monkeypatch.setattr(worker_module, "GATHER_S", 60.0)
    slow = llm.decoder(entropy_threshold=0.0)  # a token a forward

    async def test(worker: EngineWorker) -> None:
        deliver, told = worker._deliver, []
        monkeypatch.setattr(worker, "_deliver", lambda batch: (told.append(len(batch)), deliver(batch)))
        _, forwards, _ = await read(
            worker.submit(Request(llm.encode("1 + 2"), 16, decoder=slow, reveals=True), urgent=urgent)
        )
        assert forwards > 10 and sum(told) > 10
        assert len(told) == (sum(told) if urgent else 2)
        assert told[0] == 1

    run_worker(llm, test)


@pytest.mark.parametrize("is_stopped", [True, False])
def test_a_forward_that_hangs_fails_all_in_flight_and_the_worker(
    llm: DiffusionLLM, monkeypatch: pytest.MonkeyPatch, is_stopped: bool
) -> None:
    step, release, limit = llm.engine.step, threading.Event(), 0.5
    told = f"a forward has not ended for {limit} s"

    def hanging() -> Any:
        assert release.wait(30)
        return step()

    async def test(worker: EngineWorker) -> None:
        monkeypatch.setattr(llm.engine, "step", hanging)
        began = time.monotonic()  # before the worker can have begun its forward
        submissions = [worker.submit(Request(llm.encode("1"), 8)) for _ in range(3)]
        assert worker.problem() is None
        for submission in submissions:
            with pytest.raises(EngineFailure, match=told):
                await submission.next_event()
        assert limit <= time.monotonic() - began < limit + 1
        assert worker.in_flight == 0
        if is_stopped:
            worker.stop()  # waits for nobody
        assert time.monotonic() - began < limit + 2
        release.set()
        await until(lambda: not worker._thread.is_alive())
        # It is replaced: a forward that ends at last mends nothing.
        assert worker.problem() == told
        with pytest.raises(EngineFailure, match=told):
            worker.submit(Request(llm.encode("1"), 8))

    run_worker(llm, test, timeout=limit)
    for request_id in range(1000):  # the fixture's engine is shared
        llm.engine.cancel(request_id)
