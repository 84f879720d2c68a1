"""Search spaces: every mistake is found before a trial, and the embedded spaces are valid."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from d3llm_ray.decoding import decoder
from d3llm_ray.errors import InputError
from d3llm_ray.tuning.published import PUBLISHED, published_settings
from d3llm_ray.tuning.space import read_space

SPACES = sorted((Path(__file__).parents[2] / "tune_spaces").glob("*.yaml"))
GOOD = {
    "decoder": "d3llm",
    "parameters": {
        "entropy_threshold": {"type": "log_float", "low": 0.1, "high": 1.0},
        "refresh_interval": {"type": "choice", "values": [4, 10000]},
        "cache_delay": {"type": "int", "low": 1, "high": 3},
    },
    "decoder_settings": {"block_size": 16},
}

SUB_BLOCKS = {"decoder": "fast-dllm-v2", "decoder_settings": {}}
CONFIDENCE = {
    "decoder": "fast-dllm-dual",
    "parameters": {"confidence_threshold": {"type": "float", "low": 0.5, "high": 1.0}},
    "decoder_settings": {},
}


def _write(tmp_path: Path, **parts) -> Path:
    path = tmp_path / "space.yaml"
    path.write_text(yaml.safe_dump(GOOD | parts))
    return path


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.stem)
def test_embedded_spaces_hold_the_presets_own_settings(path):
    space = read_space(path)
    assert space.default_point() is not None
    assert "entropy_threshold" in space.parameters


def test_a_setting_that_another_sometimes_replaces_may_be_searched(tmp_path):
    parameters = CONFIDENCE["parameters"] | {"factor": {"type": "choice", "values": [None, 1.0, 2.0]}}
    assert read_space(_write(tmp_path, **CONFIDENCE | {"parameters": parameters})).default_point() == {
        "confidence_threshold": 0.9,
        "factor": None,
    }


def test_a_search_begins_at_the_own_the_given_and_the_published_settings(tmp_path):
    """The published ones as the table of the evaluation scripts has them, here for LLaDA with a cache."""
    start = [{"entropy_threshold": 0.7, "cache_delay": 3}, {"refresh_interval": 10000}]
    space = read_space(_write(tmp_path, start=start))
    points = space.first_points(published_settings("llada", "d3llm"), 9)
    columns = ("entropy_threshold", "cache_delay", "refresh_interval")
    assert [tuple(point[name] for name in columns) for point in points] == [
        (0.45, 1, 10000),  # the preset's own; the second start is the same
        (0.7, 3, 10000),
        (0.5, 1, 10000),  # (0.5, 2, 3) is not in this space
        (0.5, 2, 4),
        (0.4, 1, 10000),
        (0.4, 2, 10000),
    ]
    assert space.first_points(published_settings("llada", "d3llm"), 3) == points[:3]
    assert len(space.first_points(published_settings("llada", "vanilla"), 9)) == 2


@pytest.mark.parametrize(
    ("family", "preset", "settings"),
    [(family, preset, row) for family, rows in PUBLISHED.items() for preset, found in rows.items() for row in found],
)
def test_published_settings_are_settings(family, preset, settings):
    decoder(preset, **settings)


def test_the_default_point_and_the_settings_file_it_makes(tmp_path):
    space = read_space(_write(tmp_path))
    point = {"entropy_threshold": 0.45, "refresh_interval": 10000, "cache_delay": 1}
    assert space.default_point() == point
    assert space.decoding_settings(point) == {"decoder": "d3llm", "block_size": 16, **point}


def test_a_search_may_begin_at_a_settings_file(tmp_path):
    (tmp_path / "tuned.yaml").write_text("decoder: d3llm\nentropy_threshold: 0.3\ncache_delay: 2\nsuffix: cached\n")
    space = read_space(_write(tmp_path, decoder=str(tmp_path / "tuned.yaml")))
    point = {"entropy_threshold": 0.3, "refresh_interval": 10000, "cache_delay": 2}
    assert space.default_point() == point
    made = space.decoding_settings(point | {"cache_delay": 3})
    assert made == {"decoder": "d3llm", "suffix": "cached", "block_size": 16, **point, "cache_delay": 3}


def test_a_space_may_leave_the_presets_own_settings_out(tmp_path):
    parameters = GOOD["parameters"] | {"refresh_interval": {"type": "choice", "values": [4, 8]}}
    assert read_space(_write(tmp_path, parameters=parameters)).default_point() is None


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"decoder": "d4llm"}, "d4llm.*accepted.*d3llm"),
        ({"decoder": "vanilla"}, "entropy_threshold|block_size"),
        ({"parameters": {}}, "parameters"),
        (
            {"parameters": {"treshold": {"type": "float", "low": 0.1, "high": 1.0}}},
            "treshold.*accepted.*entropy_threshold",
        ),
        ({"parameters": {"entropy_threshold": {"type": "float", "low": 1.0, "high": 0.1}}}, "entropy_threshold.low"),
        (
            {"parameters": {"entropy_threshold": {"type": "log_float", "low": 0.0, "high": 1.0}}},
            "entropy_threshold.low",
        ),
        (
            {"parameters": {"entropy_threshold": {"type": "float", "low": -1.0, "high": 1.0}}},
            "entropy_threshold: got -1.0",
        ),
        ({"parameters": {"entropy_threshold": {"type": "gauss", "low": 0.0, "high": 1.0}}}, "entropy_threshold"),
        ({"parameters": {"cache_delay": {"type": "int", "low": 1.5, "high": 3}}}, "cache_delay.*whole"),
        ({"parameters": {"cache_delay": {"type": "int", "low": 0, "high": 3}}}, "cache_delay"),
        ({"parameters": {"refresh_interval": {"type": "choice", "values": []}}}, "refresh_interval.values"),
        ({"parameters": {"refresh_interval": {"type": "choice", "values": [4, "often"]}}}, "refresh_interval"),
        ({"parameters": {"refresh_interval": {"type": "choice", "values": [4], "low": 1}}}, "low"),
        ({"decoder_settings": {"cache_delay": 1}}, "cache_delay.*decoder_settings"),
        ({"decoder_settings": {"temperatur": 1}}, "temperatur"),
        ({"parameters": {"refresh_interval": {"type": "choice", "values": [4, 8, 4]}}}, "interval.values.*once"),
        ({"start": [{"cache_delay": 2}, {"cache_dely": 1}]}, "start.1.cache_dely: got 1; accepted: the param"),
        ({"start": [{"cache_delay": 4}]}, "start.0.cache_delay: got 4; accepted: a value in parameters.cache_delay"),
        ({"start": [{"refresh_interval": 10000.0}]}, "start.0.refresh_interval"),
        (
            {"decoder": "d3llm-nocache", "parameters": {"refresh_interval": {"type": "choice", "values": [4, 8]}}},
            "refresh_interval: no setting of decoder 'd3llm-nocache'; accepted: block_add",
        ),
        (
            SUB_BLOCKS | {"parameters": {"block_size": {"type": "int", "low": 8, "high": 32}}},
            "block_size: got 9; accepted: a multiple of sub_block_size 8",
        ),
        (
            SUB_BLOCKS
            | {
                "parameters": {
                    "block_size": {"type": "choice", "values": [16, 32]},
                    "sub_block_size": {"type": "choice", "values": [8, 32]},
                }
            },
            "parameters: block_size 16, sub_block_size 32 do not go together: block_size: got 16",
        ),
        (CONFIDENCE | {"decoder_settings": {"factor": 1.0}}, "confidence_threshold: has no effect with factor 1.0;"),
        (
            CONFIDENCE | {"parameters": CONFIDENCE["parameters"] | {"factor": {"type": "float", "low": 1, "high": 2}}},
            "confidence_threshold: has no effect with factor 1.0, 2.0",
        ),
        (
            {
                "decoder": "vanilla",
                "parameters": {"alg_temp": {"type": "float", "low": 0.0, "high": 1.0}},
                "decoder_settings": {"remasking": "random"},
            },
            "alg_temp: has no effect with remasking random",
        ),
        ({"fixed": {"block_size": 16}}, "fixed: is called decoder_settings now$"),
        ({"trials": 3}, "trials.*unknown"),
    ],
)
def test_a_mistake_is_named_with_its_file(tmp_path, parts, message):
    with pytest.raises(InputError, match=message) as caught:
        read_space(_write(tmp_path, **parts))
    assert "space.yaml" in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nowhere.yaml"):
        read_space(tmp_path / "nowhere.yaml")
