"""Search spaces: every mistake is found before a trial, and the embedded spaces are valid."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from d3llm_ray.errors import InputError
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


def _write(tmp_path: Path, **parts) -> Path:
    path = tmp_path / "space.yaml"
    path.write_text(yaml.safe_dump(GOOD | parts))
    return path


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.stem)
def test_embedded_spaces_hold_the_presets_own_settings(path):
    space = read_space(path)
    assert space.default_point() is not None
    assert {"entropy_threshold", "refresh_interval"} <= space.parameters.keys()


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
