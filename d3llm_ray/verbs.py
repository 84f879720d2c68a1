"""The verbs of the command line. Names only: what stands behind one is imported when it is called."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Verb:
    """Where a verb's settings and function are, as `module:name`, and one line about it."""

    settings: str
    run: str
    help: str
    resumes: bool = False  # the same command goes on from what an interrupted one has finished


VERBS = {
    "quickstart": Verb(
        "d3llm_ray.quickstart.settings:QuickstartSettings",
        "d3llm_ray.quickstart.run:run",
        "the whole pipeline on one machine: trajectories, student, tuned settings, report, a served answer",
        resumes=True,
    ),
    "generate": Verb("d3llm_ray.generate:GenerateSettings", "d3llm_ray.generate:run", "answer prompts offline"),
    "trajectories": Verb(
        "d3llm_ray.trajectories.settings:TrajectorySettings",
        "d3llm_ray.trajectories.pipeline:run",
        "let a teacher decode prompts and keep the order in which it revealed every token (Ray Data)",
        resumes=True,
    ),
    "trajectories import": Verb(
        "d3llm_ray.trajectories.importer:ImportSettings",
        "d3llm_ray.trajectories.importer:run",
        "turn a published trajectory or distillation dataset into trajectory rows",
    ),
    "trajectories inspect": Verb(
        "d3llm_ray.trajectories.inspection:InspectSettings",
        "d3llm_ray.trajectories.inspection:run",
        "say what a trajectory dataset holds, draw one row and play it in the terminal",
    ),
    "distill": Verb(
        "d3llm_ray.distillation.settings:DistillSettings",
        "d3llm_ray.distillation.run:run",
        "train a student on a teacher's trajectories (Ray Train, DeepSpeed, LoRA)",
        resumes=True,
    ),
    "ablate": Verb(
        "d3llm_ray.ablation.settings:AblateSettings",
        "d3llm_ray.ablation.run:run",
        "distil with and without each part of a recipe, several seeds each, and compare (Ray Tune)",
        resumes=True,
    ),
    "evaluate": Verb(
        "d3llm_ray.evaluation.settings:EvaluateSettings",
        "d3llm_ray.evaluation.run:run",
        "measure accuracy, tokens per forward, tokens per second and AUP",
        resumes=True,
    ),
    "leaderboard": Verb(
        "d3llm_ray.leaderboard.settings:LeaderboardSettings",
        "d3llm_ray.leaderboard.run:run",
        "measure every system, each with its own best settings, and rank them by AUP beside the published tables",
        resumes=True,
    ),
    "aup": Verb(
        "d3llm_ray.leaderboard.anyone:AupSettings",
        "d3llm_ray.leaderboard.anyone:run",
        "score anyone's points of accuracy and tokens per forward, or the published ones",
    ),
    "check": Verb(
        "d3llm_ray.checks.settings:CheckSettings",
        "d3llm_ray.checks.run:run",
        "ask one of the paper's claims about decoding again, with intervals and a verdict",
        resumes=True,
    ),
    "check transfer": Verb(
        "d3llm_ray.checks.transfer:TransferSettings",
        "d3llm_ray.checks.transfer:run",
        "tune on two tasks and compare, on the second, what each search chose",
        resumes=True,
    ),
    "benchmark": Verb(
        "d3llm_ray.benchmark.settings:BenchmarkSettings",
        "d3llm_ray.benchmark.run:run",
        "measure decoding speed against what the machine allows, on a model or on a published shape",
    ),
    "benchmark host": Verb(
        "d3llm_ray.benchmark.settings:HostBenchmarkSettings",
        "d3llm_ray.benchmark.run:run_host",
        "measure the host's share of a decoding step, with a model that costs nothing",
    ),
    "benchmark refresh": Verb(
        "d3llm_ray.benchmark.settings:RefreshBenchmarkSettings",
        "d3llm_ray.benchmark.run:run_refresh",
        "measure what refreshing a cache costs by length and block size, and where it breaks even",
    ),
    "benchmark step": Verb(
        "d3llm_ray.benchmark.settings:StepBenchmarkSettings",
        "d3llm_ray.benchmark.run:run_step",
        "measure one optimizer step of a distillation, on a model or on a published shape",
    ),
    "benchmark distill": Verb(
        "d3llm_ray.benchmark.distill:DistillBenchmarkSettings",
        "d3llm_ray.benchmark.distill:run",
        "measure samples a second of a bare loop, of the job, and of the job with more workers",
    ),
    "benchmark trajectories": Verb(
        "d3llm_ray.benchmark.trajectories:TrajectoryBenchmarkSettings",
        "d3llm_ray.benchmark.trajectories:run",
        "measure rows a second of one process, of the job, and of the job with more actors",
    ),
    "benchmark serve": Verb(
        "d3llm_ray.benchmark.serving_settings:ServeBenchmarkSettings",
        "d3llm_ray.benchmark.serving:run",
        "measure what users see of a served model at every load, and how far its engine is from that",
    ),
    "tune": Verb(
        "d3llm_ray.tuning.settings:TuneSettings",
        "d3llm_ray.tuning.run:run",
        "search decoding settings on validation problems (Ray Tune, Optuna)",
        resumes=True,
    ),
    "serve": Verb(
        "d3llm_ray.serving.settings:ServeSettings",
        "d3llm_ray.serving.server:run",
        "serve a model behind an OpenAI-compatible API (Ray Serve)",
    ),
    "batch": Verb(
        "d3llm_ray.clients.settings:BatchSettings",
        "d3llm_ray.clients.batch:run",
        "answer a file of requests in OpenAI's batch format",
        resumes=True,
    ),
    "chat": Verb(
        "d3llm_ray.clients.settings:ChatSettings",
        "d3llm_ray.clients.chat:run",
        "talk to a model in the terminal and watch its canvas fill",
    ),
}

RENAMED = {"distill benchmark": "benchmark distill", "trajectories benchmark": "benchmark trajectories"}
