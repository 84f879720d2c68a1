"""The transformer against a literal per-row computation: ragged batches, attention patterns, the KV cache."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from d3llm_ray.errors import InputError
from d3llm_ray.models import BlockCausal, KVCache, ModelConfig, Ragged, Transformer
from d3llm_ray.models.attention import choose_attention, flash_attention, sdpa_attention


def _model(kv_heads: int = 2, bias: bool = True, seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(ModelConfig(37, 32, 2, 4, kv_heads, 48, 128, 1e4, 1e-5, bias, False))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model.eval()


def _literal(model: Transformer, ids: list[int], allowed: torch.Tensor) -> torch.Tensor:
    """One sequence, float64, head by head and straight from the formulas. `allowed`: [L, L] bool."""
    state = {name: parameter.double() for name, parameter in model.named_parameters()}
    config, length = model.config, len(ids)
    size, group = config.head_dim, config.num_heads // config.num_kv_heads
    x = state["embed_tokens.weight"][torch.tensor(ids)]

    def norm(value: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return value / (value.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weight

    def rotary(value: torch.Tensor) -> torch.Tensor:
        out = value.clone()
        for position in range(length):
            for pair in range(size // 2):
                angle = position * config.rope_theta ** (-2 * pair / size)
                a, b = value[position, pair], value[position, pair + size // 2]
                out[position, pair] = a * math.cos(angle) - b * math.sin(angle)
                out[position, pair + size // 2] = b * math.cos(angle) + a * math.sin(angle)
        return out

    for layer in range(config.num_layers):
        prefix = f"layers.{layer}."
        n = norm(x, state[prefix + "input_layernorm.weight"])
        project = {}
        for name in ("q_proj", "k_proj", "v_proj"):
            project[name] = n @ state[f"{prefix}self_attn.{name}.weight"].T
            if config.qkv_bias:
                project[name] = project[name] + state[f"{prefix}self_attn.{name}.bias"]
        heads = []
        for head in range(config.num_heads):
            kv = slice(head // group * size, (head // group + 1) * size)
            q = rotary(project["q_proj"][:, head * size : (head + 1) * size])
            scores = q @ rotary(project["k_proj"][:, kv]).T / math.sqrt(size)
            weights = scores.masked_fill(~allowed, -math.inf).softmax(-1)
            heads.append(weights @ project["v_proj"][:, kv])
        x = x + torch.cat(heads, -1) @ state[prefix + "self_attn.o_proj.weight"].T
        n = norm(x, state[prefix + "post_attention_layernorm.weight"])
        gate = n @ state[prefix + "mlp.gate_proj.weight"].T
        up = n @ state[prefix + "mlp.up_proj.weight"].T
        x = x + (gate * gate.sigmoid() * up) @ state[prefix + "mlp.down_proj.weight"].T
    return norm(x, state["norm.weight"])


def _pattern(length: int, block: int | None, origin: int) -> torch.Tensor:
    if block is None:
        return torch.ones(length, length, dtype=torch.bool)
    blocks = [0 if position < origin else 1 + (position - origin) // block for position in range(length)]
    return torch.tensor([[k <= q for k in blocks] for q in blocks])


@pytest.mark.parametrize(("kv_heads", "bias"), [(4, False), (2, True), (1, True)])
@pytest.mark.parametrize("block", [None, 1, 4])
def test_ragged_rows_equal_each_row_alone(kv_heads: int, bias: bool, block: int | None) -> None:
    model = _model(kv_heads, bias)
    rows = [list(range(1, 10)), [3, 1, 4], [36] * 17, [5]]
    origins = [4, 0, 6, 0]
    patterns = None if block is None else [BlockCausal(block, origin) for origin in origins]
    ragged = Ragged.build([len(row) for row in rows], patterns=patterns)
    packed = torch.tensor([token for row in rows for token in row])
    hidden = model(packed, ragged).split(list(ragged.lengths))
    for row, origin, result in zip(rows, origins, hidden, strict=True):
        expected = _literal(model, row, _pattern(len(row), block, origin))
        torch.testing.assert_close(result.double(), expected, atol=2e-4, rtol=1e-4)


@given(st.lists(st.integers(1, 24), min_size=1, max_size=6), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_neighbours_never_change_a_row(lengths: list[int], seed: int) -> None:
    model, generator = _model(), torch.Generator().manual_seed(seed)
    rows = [torch.randint(0, 37, (length,), generator=generator) for length in lengths]
    together = model(torch.cat(rows), Ragged.build(lengths)).split(lengths)
    for row, result in zip(rows, together, strict=True):
        alone = model(row, Ragged.build([len(row)]))
        torch.testing.assert_close(result, alone, atol=2e-5, rtol=1e-5)


def test_windows_against_a_cache_equal_full_forwards() -> None:
    """Two spans of different lengths: write everything, then recompute a window each against frozen keys."""
    model = _model()
    rows = [torch.arange(20) % 37, torch.arange(9) + 5]
    cache = KVCache(model.config, 64, dtype=torch.float32, device="cpu").allocate()
    # What lies around the spans must not be seen, not even as a NaN that a mask cannot hide.
    cache.keys.fill_(torch.nan)
    cache.values.fill_(torch.nan)
    bases = [40, 3]
    full = model(torch.cat(rows), Ragged.build([20, 9], bases=bases), cache)
    torch.testing.assert_close(full, model(torch.cat(rows), Ragged.build([20, 9])), atol=2e-5, rtol=1e-5)
    starts, ends = [12, 3], [20, 7]
    window = torch.cat([row[a:b] for row, a, b in zip(rows, starts, ends, strict=True)])
    ragged = Ragged.build([8, 4], starts, key_lengths=[20, 9], bases=bases)
    result = model(window, ragged, cache)
    expected = torch.cat((full[12:20], full[20 + 3 : 20 + 7]))
    torch.testing.assert_close(result, expected, atol=2e-5, rtol=1e-5)
    alone = model(rows[1][3:7], Ragged.build([4], [3], key_lengths=[9], bases=[3]), cache)
    torch.testing.assert_close(alone, expected[8:], atol=2e-5, rtol=1e-5)


def test_the_last_layer_computes_only_the_rows_asked_for() -> None:
    model = _model(2, True)
    ids, ragged, rows = torch.arange(25), Ragged.build([9, 16]), torch.tensor([0, 8, 9, 24, 3])
    torch.testing.assert_close(model(ids, ragged, rows=rows), model(ids, ragged)[rows], atol=1e-6, rtol=1e-5)


def _varlen_oracle(q, k, v, query_offsets, key_offsets, longest_query, longest_key, causal):
    """flash_attn_varlen_func's contract in float64, a sequence at a time."""
    assert not causal and longest_query == int(query_offsets.diff().max())
    assert longest_key == int(key_offsets.diff().max()) and int(key_offsets[-1]) == len(k)
    parts = []
    for row in range(len(query_offsets) - 1):
        queries = q[query_offsets[row] : query_offsets[row + 1]].double()
        group = q.shape[1] // k.shape[1]
        keys = k[key_offsets[row] : key_offsets[row + 1]].double().repeat_interleave(group, dim=1)
        values = v[key_offsets[row] : key_offsets[row + 1]].double().repeat_interleave(group, dim=1)
        weights = torch.einsum("qhd,khd->hqk", queries, keys).div(q.shape[-1] ** 0.5).softmax(-1)
        parts.append(torch.einsum("hqk,khd->qhd", weights, values))
    return torch.cat(parts).to(q.dtype)


def test_flash_attention_gets_the_layout_of_its_contract() -> None:
    """With a stand-in that implements flash-attn's signature literally: ragged windows, with and without a cache."""
    model = _model(2).bfloat16()
    rows, bases = [torch.arange(20) % 37, torch.arange(9) + 5], [40, 3]
    layouts = [
        ([20, 9], Ragged.build([20, 9]), False),
        ([20, 9], Ragged.build([20, 9], bases=bases), True),
        ([8, 4], Ragged.build([8, 4], [12, 3], [20, 9], bases=bases), True),
    ]
    results = []
    for attend in (sdpa_attention, partial(flash_attention, _varlen_oracle)):
        model.use_attention(attend)
        cache = KVCache(model.config, 64, dtype=torch.bfloat16, device="cpu").allocate()
        parts = []
        for lengths, ragged, cached in layouts:
            ids = torch.cat([row[-length:] for row, length in zip(rows, lengths, strict=True)])
            parts.append(model(ids, ragged, cache if cached else None).float())
        results.append(parts)
    for plain, flash in zip(*results, strict=True):
        torch.testing.assert_close(plain, flash, atol=0.05, rtol=0.05)


def test_attention_backends_are_chosen_and_refused() -> None:
    assert choose_attention("auto", torch.device("cpu")) is sdpa_attention
    with pytest.raises(InputError, match=r"attention.*accepted: auto, flash-attn, sdpa"):
        choose_attention("fast", torch.device("cpu"))
    with pytest.raises(InputError, match="flash-attn is not installed"):
        choose_attention("flash-attn", torch.device("cpu"))


def test_norm_and_rotary_are_computed_in_float32() -> None:
    model = _model().bfloat16()
    ids = torch.tensor([1, 2, 3, 4])
    n = model.layers[0].input_layernorm
    x = torch.randn(4, 32).bfloat16() * 100
    wide = x.float() / (x.float().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    assert torch.equal(n(x), wide.bfloat16() * n.weight)
    assert model(ids, Ragged.build([4])).dtype == torch.bfloat16


def test_bad_shapes_are_refused() -> None:
    with pytest.raises(InputError, match="num_kv_heads"):
        ModelConfig(10, 32, 1, 4, 3, 8, 16, 1e4, 1e-5, False, False)
    with pytest.raises(InputError, match="lengths"):
        Ragged.build([3, 0])
    with pytest.raises(InputError, match="block_size"):
        BlockCausal(0)
