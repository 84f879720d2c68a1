"""The shipped YAML files: what Serve, our settings and our policy take; with placeholders for absent weights."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve._private.build_app import build_app
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import ServeDeploySchema

from d3llm_ray.serving.app import build
from d3llm_ray.serving.autoscaling import CanvasDemand
from d3llm_ray.serving.front import PROXY_OPTIONS

FOLDER = Path(__file__).parents[2] / "serve_configs"
NAMES = ["dream-7b", "llada-8b", "multi-model", "tiny"]
EMBEDDED = {"/models/LLaDA-8B-Instruct": "tiny-llada", "/models/Dream-v0-Instruct-7B": "tiny-dream"}
QUESTION: list[Any] = [{"role": "user", "content": "Tom has 5 apples and buys 7 more. How many now?"}]


def content_of(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    return content


def deployments_of(application: Any) -> dict[str, Any]:
    return {one.name: one for one in build_app(application, name="checked").deployments}


def test_all_are_tested() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.yaml")) == NAMES


@pytest.fixture
def placed(tmp_path: Path) -> Any:
    """The arguments of a file with weights and tuned settings that are here."""

    def place(args: dict[str, Any]) -> dict[str, Any]:
        model, settings = args.get("model"), args.get("decoder")
        if model not in EMBEDDED:
            return args
        assert settings == f"{model}/settings.yaml"
        file = tmp_path / "settings.yaml"
        file.write_text("decoder: d3llm\nentropy_threshold: 0.625\n")
        return args | {"model": EMBEDDED[model], "decoder": str(file), "device": "cpu"}

    return place


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_what_serve_and_our_builder_take(placed: Any, name: str) -> None:
    content = content_of(name)
    schema = ServeDeploySchema(**content)
    assert schema.controller_options is not None
    assert schema.controller_options.runtime_env == PROXY_OPTIONS["runtime_env"]
    (application,) = schema.applications
    module, _, attribute = application.import_path.partition(":")
    assert getattr(import_module(module), attribute) is build
    built = deployments_of(build(placed(application.args)))
    assert {one.name for one in application.deployments} == set(built)
    for deployment in application.deployments:
        if deployment.name == "router":
            continue
        scaling = deployment.autoscaling_config
        assert isinstance(scaling, dict)
        settings = built[deployment.name].init_args[0]
        if name in ("llada-8b", "dream-7b"):
            assert settings.decoding().settings()["entropy_threshold"] == 0.625  # the tuned settings are read
            assert deployment.ray_actor_options.num_gpus == 1
        assert scaling["min_replicas"] < scaling["max_replicas"]
        # The defaults (10 s between metrics, 30 s of delay) would sleep through a burst.
        assert scaling["metrics_interval_s"] <= 1 < scaling["look_back_period_s"]
        assert scaling["target_ongoing_requests"] <= settings.max_batch_size
        policy = AutoscalingConfig(**scaling).policy
        kind = policy.get_policy()
        assert kind.__name__ == CanvasDemand.__name__
        kind(**policy.policy_kwargs)


def test_a_replica_more_during_a_redeploy_unless_a_file_says_otherwise() -> None:
    """Serve rounds up: 25 % of one replica is one."""
    for name in ("tiny", "multi-model"):
        for deployment in deployments_of(build(content_of(name)["applications"][0]["args"])).values():
            config = deployment._deployment_config
            assert (config.max_surge_percent, config.rolling_update_percentage) == (25, 0.25)
    for name in ("llada-8b", "dream-7b"):
        (deployment,) = content_of(name)["applications"][0]["deployments"]
        assert (deployment["max_surge_percent"], deployment["rolling_update_percentage"]) == (25, 0.25)
