"""Static shapes: the same answers as eager steps, whatever padding adds; without capture on a CPU, with it on CUDA."""

from __future__ import annotations

import logging
import random
from dataclasses import asdict, replace
from typing import Any
from unittest.mock import MagicMock

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings

from d3llm_ray.benchmark.profile import CapturingRunner, profiled
from d3llm_ray.decoding import Completion, Decoder, Engine, Request, decoder, static
from d3llm_ray.decoding.batch import Span
from d3llm_ray.decoding.contracts import Window
from d3llm_ray.decoding.static import SCRATCH, Shape, bucket
from d3llm_ray.models import BlockCausal, Ragged
from tests.decoding.models import VOCABULARY, decode_all, engine_for, loaded

DECODERS = [
    *((kind, "d3llm", {"suffix": suffix}) for kind in ("llada", "dream") for suffix in ("recompute", "cached", "none")),
    *((kind, preset, {}) for kind in ("llada", "dream") for preset in ("fast-dllm-prefix", "fast-dllm-dual", "d2f")),
    ("dream", "fast-dllm-v2", {}),
    ("block_diffusion", "fast-dllm-v2", {}),
    ("causal", "autoregressive", {}),
]


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _requests(count: int, seed: int = 0, **options: Any) -> list[Request]:
    rng = random.Random(seed)
    return [
        Request([rng.randrange(2, 34) for _ in range(rng.randint(1, 40))], rng.randint(1, 48), seed=seed, **options)
        for _ in range(count)
    ]


def _engine(kind: str, chosen: Decoder, *, poison: bool = True, **options: Any) -> Engine:
    engine = engine_for(kind, chosen, **options)
    engine._cache.allocate()
    if poison:  # what was never written must not be seen, not even as a NaN that a mask cannot hide
        engine._cache.keys.fill_(torch.nan)
        engine._cache.values.fill_(torch.nan)
    return engine


def _assert_equal(left: list[Completion], right: list[Completion]) -> None:
    for one, other in zip(left, right, strict=True):
        a, b = asdict(one), asdict(other)
        for field in ("reveal_entropies", "reveal_logprobs"):
            np.testing.assert_allclose(a.pop(field), b.pop(field), atol=2e-4, rtol=1e-3)
        assert a == b


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Model calls by kind of layout."""
    count = {"static": 0, "eager": 0}
    for name, method in (("static", "static"), ("eager", "build")):
        original = getattr(Ragged, method)

        def counted(*args: Any, _name: str = name, _original: Any = original, **options: Any) -> Ragged:
            count[_name] += 1
            return _original(*args, **options)

        monkeypatch.setattr(Ragged, method, staticmethod(counted))
    return count


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize(("kind", "preset", "options"), DECODERS)
def test_answers_equal_those_of_eager_steps(kind, preset, options, batch_size, calls) -> None:
    chosen, requests = decoder(preset, **options), _requests(10)
    eager_engine = _engine(kind, chosen, max_batch_size=batch_size)
    with profiled(eager_engine) as asked:
        eager = decode_all(eager_engine, requests)
    assert calls["static"] == 0
    padded_engine = _engine(kind, chosen, max_batch_size=batch_size, cuda_graphs=True)
    with profiled(padded_engine) as padded:
        _assert_equal(decode_all(padded_engine, requests), eager)
    assert calls["static"] > 10
    # Padding is not work: the profile counts what was asked for.
    assert (padded.forwards, padded.rows, padded.work) == (asked.forwards, asked.rows, asked.work)


@pytest.mark.parametrize("kind", ["llada", "dream"])
def test_other_buckets_change_nothing(kind: str, monkeypatch: pytest.MonkeyPatch, calls) -> None:
    chosen, requests = decoder("d3llm"), _requests(8, 1)
    answers = []
    for batches, windows, spans, scored in [
        (static.BATCHES, static.WINDOWS, static.SPANS, static.SCORED),
        ((8,), (200,), (192,), (512,)),
        (tuple(range(1, 65)), tuple(range(1, 200)), tuple(range(1, 200)), tuple(range(2049))),  # no padding at all
    ]:
        monkeypatch.setattr(static, "BATCHES", batches)
        monkeypatch.setattr(static, "WINDOWS", windows)
        monkeypatch.setattr(static, "SPANS", spans)
        monkeypatch.setattr(static, "SCORED", scored)
        monkeypatch.setattr(static, "MOST_PADDING", 1e9)
        engine = _engine(kind, chosen, max_batch_size=4, cuda_graphs=True)
        monkeypatch.setattr(engine.runner, "_max_graphs", 10000)
        calls["eager"] = 0
        answers.append(decode_all(engine, requests))
        assert calls["eager"] == 0
    _assert_equal(answers[1], answers[0])
    _assert_equal(answers[2], answers[0])


def test_steps_that_a_graph_cannot_hold_are_eager(calls) -> None:
    kinds = {
        "sampling": (decoder("d3llm"), {"temperature": 1.0}),
        "no cache": (decoder("d3llm-nocache"), {}),
        "guidance": (decoder("vanilla", cfg_scale=1.5), {}),
    }
    for chosen, options in kinds.values():
        requests = _requests(3, 2, **options)
        eager = decode_all(_engine("llada", chosen, poison=False), requests)
        _assert_equal(decode_all(_engine("llada", chosen, poison=False, cuda_graphs=True), requests), eager)
    assert calls["static"] == 0
    span = Span(0, np.arange(5), Window(0, 5, 9), 3, np.arange(2))
    assert Shape.of([span], 1000) == Shape(1, 32, 64, 64)
    others = [replace(span, twin=True), replace(span, base=None), replace(span, window=Window(0, 5, 8193))]
    assert all(Shape.of([span, other], 1000) is None for other in others)
    assert Shape.of([span], static.MAX_CHUNK_ELEMENTS // 64 + 1) is None  # logits that eager steps would chunk
    # One neighbour that samples makes the step eager, and only while it is there.
    mixed = [*_requests(2, 3), Request([5, 6], 1, temperature=1.0)]
    decode_all(_engine("llada", decoder("d3llm"), cuda_graphs=True), mixed)
    assert calls["static"] > 0


def test_recorded_forwards_are_eager() -> None:
    """The benchmark replays them one by one."""
    engine = _engine("llada", decoder("d3llm"), cuda_graphs=True)
    engine.runner = captured = CapturingRunner(engine.eager)
    with profiled(engine) as profile:
        decode_all(engine, _requests(2))
    assert len(captured.calls) == profile.forwards > 0
    assert all(call.layout.starts for call in captured.calls)  # a static layout leaves them out


def test_a_nan_stays_in_its_row(monkeypatch: pytest.MonkeyPatch, calls) -> None:
    """Also in the first row, which padding rows repeat."""
    engine, alone = (_engine("llada", decoder("d3llm"), cuda_graphs=True, max_batch_size=n) for n in (3, 1))
    model, forward = engine.model, engine.model.forward
    poison = 35  # the first id that is never predicted

    def poisoned(*args: Any) -> torch.Tensor:
        kept = model.embed_tokens.weight[poison].clone()
        model.embed_tokens.weight[poison] = torch.nan
        hidden = forward(*args)
        model.embed_tokens.weight[poison] = kept
        return hidden

    others = [Request([3, 4, 5, 6], 12), Request([9, 8, 7, 6, 5], 16)]
    expected = decode_all(alone, others)
    monkeypatch.setattr(model, "forward", poisoned)
    ids = [engine.submit(request) for request in (Request([3, poison], 16), *others)]
    done, errors, calls["eager"] = {}, [], 0
    while engine.active or engine.waiting:
        for event in engine.step():
            errors += [event.request_id] if event.error else []
            done |= {event.request_id: event.completion} if event.completion else {}
    assert errors == ids[:1] and calls["eager"] == 0
    _assert_equal([done[request_id] for request_id in ids[1:]], expected)


def test_a_failing_capture_is_logged_once_and_harms_no_request(monkeypatch, caplog, calls) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    for name in ("current_stream", "stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(torch.cuda, "graph", refuse)
    chosen, requests = decoder("d3llm"), _requests(6)
    engine = _engine("llada", chosen, cuda_graphs=True)
    engine.runner._stream = MagicMock()
    with caplog.at_level(logging.WARNING):
        answers = decode_all(engine, requests)
    assert ["CUDA graphs are off" in record.message for record in caplog.records] == [True]
    assert calls["eager"] > 0
    _assert_equal(answers, decode_all(_engine("llada", chosen), requests))


def test_one_copy_to_the_device_a_model_call(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = _engine("dream", decoder("d3llm"), cuda_graphs=True)
    copies, original = [], torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda to, *a, **k: copies.append(to.shape) or original(to, *a, **k))

    def refuse(*_: Any) -> None:
        raise AssertionError("host data outside the packed buffer")

    monkeypatch.setattr(torch, "from_numpy", refuse)
    monkeypatch.setattr(torch, "tensor", refuse)
    decode_all(engine, [Request([3, 4, 5], 24)])
    assert len(copies) == engine.steps > 0


def test_the_number_of_graphs_is_bounded(calls) -> None:
    chosen, requests = decoder("d3llm"), _requests(10)
    engine = _engine("llada", chosen, max_batch_size=3, cuda_graphs=True)
    engine.runner._max_graphs = 2
    answers = decode_all(engine, requests)
    assert len(engine.runner._runs) == 2 and calls["static"] > 2 and calls["eager"] > 0
    _assert_equal(answers, decode_all(_engine("llada", chosen, max_batch_size=3), requests))


def test_graphs_are_for_cuda_unless_asked_for() -> None:
    plain = engine_for("llada", decoder("d3llm"))
    assert plain.runner is plain.eager and plain._cache.keys.shape[1] == plain._cache.positions
    padded = engine_for("llada", decoder("d3llm"), cuda_graphs=True)
    assert padded._cache.keys.shape[1] == padded._cache.positions + SCRATCH
    assert padded.memory_plan().kv_positions == plain.memory_plan().kv_positions
    assert padded.memory_plan().activations > plain.memory_plan().activations


@given(st.integers(1, 10000), st.sampled_from([static.BATCHES, static.WINDOWS, static.SPANS, static.SCORED]))
def test_a_bucket_is_the_smallest_size_that_holds(value: int, sizes: tuple[int, ...]) -> None:
    assert list(sizes) == sorted(set(sizes))
    chosen = bucket(value, sizes)
    if chosen is None:
        assert value > sizes[-1]
    else:
        assert chosen >= value and all(size < value for size in sizes if size < chosen)


@st.composite
def _spans(draw: Any) -> list[Span]:
    spans, base = [], draw(st.integers(0, 50))
    count, longest = draw(st.sampled_from([(1, 600), (3, 330), (7, 140), (15, 64), (70, 32)]))
    shortest = draw(st.sampled_from([1, 2 * longest // 3]))  # windows of one size are padded least
    for row in range(draw(st.integers(1, count))):
        start, length = draw(st.integers(0, 300)), draw(st.integers(shortest, longest))
        key_length = start + length + draw(st.integers(0, 100))
        pattern = draw(st.sampled_from([None, BlockCausal(8), BlockCausal(5, start + 3), BlockCausal(1)]))
        scored = np.flatnonzero(np.random.default_rng(row).random(length) < 0.3)
        tokens = np.arange(length) % 37
        spans.append(Span(row, tokens, Window(start, start + length, key_length, pattern), base, scored))
        base += key_length
    return spans


@given(_spans())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow])
def test_a_layout_says_what_the_ragged_one_says(spans: list[Span]) -> None:
    shape = Shape.of(spans, 1000)
    tokens = sum(len(span.tokens) for span in spans)
    assume(shape is not None)
    padded = shape.rows * shape.window
    assert padded <= static.STATIC_TOKENS and padded <= max(static.FREE_TOKENS, static.MOST_PADDING * tokens)
    packed, scratch = np.full(shape.size, -7), 99999
    shape.fill(packed, spans, scratch)
    (ids, positions, write, visible), (bases, key_lengths), scored = shape.sections(packed)
    windows = [span.window for span in spans]
    oracle = Ragged.build(
        [window.end - window.start for window in windows],
        [window.start for window in windows],
        [window.key_length for window in windows],
        patterns=[window.pattern for window in windows],
        bases=[span.base for span in spans],
    )
    layout = Ragged.static(*(torch.from_numpy(a) for a in (positions, write, visible, bases, key_lengths)), shape.span)
    where = np.concatenate([row * shape.window + np.arange(len(span.tokens)) for row, span in enumerate(spans)])
    assert (ids.ravel()[where] == np.concatenate([span.tokens for span in spans])).all()
    assert (layout.positions[where] == oracle.positions).all()
    expected_writes = np.concatenate(
        [span.base + np.arange(w.start, w.end) for span, w in zip(spans, windows, strict=True)]
    )
    assert (write.ravel()[where] == expected_writes).all()
    assert (np.delete(write.ravel(), where) == scratch).all()
    offsets = np.cumsum([0] + [len(span.tokens) for span in spans])
    wanted = np.concatenate([where[span.scored + begin] for span, begin in zip(spans, offsets, strict=False)])
    assert (scored[: wanted.size] == wanted).all() and (scored[wanted.size :] == 0).all()
    for row, (span, window) in enumerate(zip(spans, windows, strict=True)):
        n, keys = len(span.tokens), window.key_length
        assert (layout.read[row, :keys].numpy() == span.base + np.arange(keys)).all()
        assert layout.read[row].max() == span.base + keys - 1  # cells beyond repeat a key of the row
        mask = np.ones((n, keys), dtype=bool)
        if oracle.mask is not None:
            mask = oracle.mask[row, 0].expand(max(map(len, [s.tokens for s in spans])), -1)[:n, :keys].numpy()
        assert (layout.mask[row, 0, :n, :keys].numpy() == mask).all() and not layout.mask[row, 0, :, keys:].any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize(("kind", "preset", "options"), DECODERS)
def test_graphs_equal_eager_steps(kind, preset, options, monkeypatch) -> None:
    model, family, _, _ = loaded(kind)
    model, chosen, requests = model.to("cuda"), decoder(preset, **options), _requests(10)
    try:
        eager, graphs = (
            Engine(model, family, chosen, max_batch_size=4, vocabulary_size=VOCABULARY, cuda_graphs=on)
            for on in (False, True)
        )
        expected = decode_all(eager, requests)
        for _ in range(2):  # capturing, then replaying alone
            _assert_equal(decode_all(graphs, requests), expected)
        assert graphs.runner._runs and not graphs.runner._failed
    finally:
        model.to("cpu")
