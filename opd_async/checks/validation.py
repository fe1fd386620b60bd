"""Check a topology against models, files, devices and ports, before any process starts.

`validate` returns every error at once, `warnings` the settings that are allowed but unwise. Each text is
"path: found; what to write".
"""

from __future__ import annotations

from collections.abc import Iterator

from opd_async.checks.advantage import advantage_problems, advantage_warnings
from opd_async.checks.cluster import cluster_problems
from opd_async.checks.completions import completion_problems
from opd_async.checks.evaluation import evaluation_problems, set_file_problems
from opd_async.checks.hooks import hook_problems
from opd_async.checks.host import device_problems, network_problems, open_file_problems
from opd_async.checks.kernels import kernel_problems
from opd_async.checks.learner import learner_problems
from opd_async.checks.losses import loss_problems, loss_warnings
from opd_async.checks.reward import reward_problems
from opd_async.checks.teacher import opd_problems
from opd_async.checks.trackers import tracker_problems
from opd_async.checks.uploads import upload_problems
from opd_async.checks.vocabulary import taking_part, vocabulary_problems
from opd_async.checks.weights import weight_problems
from opd_async.config.topology import EngineKind, EngineSection, StepRule, Topology, TrainOn
from opd_async.data.chat_template import TEMPLATE_NAMES
from opd_async.data.model_folder import folder_problems, try_config, try_model
from opd_async.data.rope import rope_problem
from opd_async.data.rows import data_files
from opd_async.data.weight_files import file_problems, plain_problems
from opd_async.engines.sglang import version_problem
from opd_async.errors import InputError


def validate(topology: Topology) -> list[str]:
    """List every reason why this topology cannot run, in the order of the file; empty if it can.

    Reads the model folders' JSON files and weight headers, loads no weight. With an explicit `network.base_port` it
    binds each port for an instant. It starts four kinds of short processes: the Python of SGLang engines, to ask for
    their version, one that loads the rule of the reward, one that imports the learner's kernels, and one that writes a
    small file to `checkpoint.upload` and removes it.
    """
    return [
        *opd_problems(topology),
        *_model_problems(topology),
        *vocabulary_problems(topology),
        *_embedded_problems(topology),
        *_data_problems(topology),
        *_schedule_problems(topology),
        *_engine_problems(topology),
        *weight_problems(topology),
        *_sampling_problems(topology),
        *_rollout_problems(topology),
        *learner_problems(topology),
        *kernel_problems(topology),
        *loss_problems(topology),
        *completion_problems(topology),
        *cluster_problems(topology),
        *device_problems(topology),
        *reward_problems(topology),
        *evaluation_problems(topology),
        *advantage_problems(topology),
        *hook_problems(topology),
        *tracker_problems(topology),
        *upload_problems(topology),
        *network_problems(topology),
        *open_file_problems(topology),
    ]


def warnings(topology: Topology) -> list[str]:
    """List the settings of a valid topology that are probably a mistake."""
    schedule, optimizer = topology.schedule, topology.learner.optimizer
    doubtful = list(loss_warnings(topology))
    if topology.evaluation.every_steps and not topology.evaluation_sets:
        doubtful.append(
            "evaluation.every_steps: there are no held-out prompts, so nothing is evaluated; write data.held_out.path"
        )
    if optimizer.warmup_steps >= schedule.steps:
        doubtful.append(
            f"learner.optimizer.warmup_steps: {optimizer.warmup_steps} of {schedule.steps} steps, so the learning rate "
            f"never reaches lr; write less than {schedule.steps}"
        )
    return [*doubtful, *advantage_warnings(topology)]


def _model_problems(topology: Topology) -> Iterator[str]:
    free = {id(model) for side, model, engine in topology.engine_sides if side != "student" and _reads_any_name(engine)}
    for side, model in taking_part(topology):
        problems = folder_problems(model.path, any_name=id(model) in free)
        yield from (f"models.{side}.path: {problem}" for problem in problems)


def _reads_any_name(engine: EngineSection) -> bool:
    """Tell whether the engine reads weights under any file name: SGLang does, transformers does not."""
    return engine.kind is not EngineKind.EMBEDDED


def _data_problems(topology: Topology) -> Iterator[str]:
    data = topology.data
    if data.train is None and data.function is None:
        yield "data.train: no prompts to train on; write a path, or data.function: module:name in its place"
    elif data.train is not None and data.function is not None:
        yield "data.train: there is data.function as well; remove one of them"
    if data.train is not None:
        try:
            data_files(data.train.path)
        except InputError as error:
            yield f"data.train.path: {error}"
    yield from set_file_problems(topology)
    if own := sorted(TEMPLATE_NAMES & set(data.chat_template_kwargs)):
        yield f"data.chat_template_kwargs: {', '.join(own)}, which every template gets from the run; remove it"
    if data.chat_template and not data.chat_template.is_file():
        yield f"data.chat_template: no file {data.chat_template}; write the path of a Jinja file, or null"


def _schedule_problems(topology: Topology) -> Iterator[str]:
    samples, group = topology.schedule.samples_per_step, topology.rollout.group_size
    if topology.schedule.max_staleness is None:
        fits = {
            "rule: filled": topology.schedule.rule is not StepRule.DEADLINE,
            "train_on: tokens": topology.schedule.train_on is TrainOn.TOKENS,
        }
        for change in (change for change, fitting in fits.items() if not fitting):
            yield (
                f"schedule.max_staleness: null, but only filled steps of tokens can do without a bound; write a "
                f"number of steps, or {change}"
            )
    if topology.schedule.train_on is TrainOn.SAMPLES and topology.schedule.step_rule is StepRule.FILLED:
        yield from _part_problems(topology)
    if topology.schedule.train_on is TrainOn.SAMPLES and samples % group:
        yield (
            f"schedule.samples_per_step: {samples} is not a multiple of rollout.group_size {group}, and a step takes "
            f"whole groups; write {max(samples - samples % group, group)}"
        )


def _part_problems(topology: Topology) -> Iterator[str]:
    """What has to know a whole step before it can weigh the first of its responses."""
    facts = topology.advantage.estimator.facts
    if facts.whitened and not facts.critic:  # a learner with a critic keeps the parts and trains them together
        yield (
            f"schedule.rule: filled, but advantage.estimator {topology.advantage.estimator} compares all tokens of a "
            "step; write rule: deadline, or the estimator grpo"
        )
    if topology.learner.loss_mean == "responses":
        yield (
            "schedule.rule: filled, but learner.loss_mean: responses weighs a token by the tokens of the whole step; "
            "write rule: deadline, or loss_mean: tokens"
        )


def _embedded_problems(topology: Topology) -> Iterator[str]:
    """List the models that the embedded engine cannot compute: rotary angles, teachers with quantised weights."""
    for side, model, section in topology.engine_sides:
        if section.kind is not EngineKind.EMBEDDED:
            continue
        if problem := rope_problem(try_config(model.path)):
            yield f"models.{side}.path: {problem}"
        if side != "student" and try_model(model.path) and not file_problems(model.path):
            yield from (f"models.{side}.path: {problem}" for problem in plain_problems(model.path))


def _engine_problems(topology: Topology) -> Iterator[str]:
    for side, model, section in topology.engine_sides:
        yield from _url_problems(f"engines.{side}", section)
        yield from _sglang_problems(f"engines.{side}", section)
        facts = try_model(model.path)
        if facts and section.context_tokens > facts.max_tokens:
            yield (
                f"engines.{side}.context_tokens: {section.context_tokens}, but the {side} has "
                f"{facts.limit} {facts.max_tokens}; write at most {facts.max_tokens}"
            )
        if facts and facts.has_experts and side == "student" and section.kind is EngineKind.EMBEDDED:
            yield "engines.student.kind: the embedded engine takes no updates of mixtures of experts; write sglang"
        if section.started and section.kv_tokens < section.context_tokens:
            yield (
                f"engines.{side}.kv_tokens: {section.kv_tokens} cannot hold one full sample of "
                f"engines.{side}.context_tokens {section.context_tokens}; write at least {section.context_tokens}"
            )
    student = topology.engines.student
    taken = {url.rstrip("/"): "a student engine" for url in student.urls}
    for side, _, teacher in topology.engine_sides[1:]:
        if teacher.context_tokens < student.context_tokens:
            yield (
                f"engines.{side}.context_tokens: {teacher.context_tokens} is less than engines.student.context_tokens "
                f"{student.context_tokens}, so long samples could not be scored; write at least "
                f"{student.context_tokens}"
            )
        urls = [url.rstrip("/") for url in teacher.urls]
        for url in urls:
            if url in taken:
                yield f"engines.{side}.urls: {url} is {taken[url]} too; write the teacher's own"
        taken |= dict.fromkeys(urls, "another teacher's engine")


def _url_problems(path: str, section: EngineSection) -> Iterator[str]:
    urls = len(section.urls)
    if section.started and urls:
        yield (
            f"{path}.urls: {urls} given, but the run starts {section.kind} engines itself; remove them, or write "
            "kind: external"
        )
    if not section.started and urls != section.replicas:
        yield f"{path}.urls: {urls} given for {section.replicas} replicas; write one URL for each external engine"
    if section.router and path != "engines.student":
        yield (
            f"{path}.router: requests to a teacher are routed by their prompt, so that they find it in the prefix "
            "cache; remove it"
        )
    if section.router and section.router.rstrip("/") in {url.rstrip("/") for url in section.urls}:
        yield f"{path}.router: {section.router} is one of the engines; write the router's own address"
    if len({url.rstrip("/") for url in section.urls}) < urls:
        yield f"{path}.urls: the same URL twice; write one for each engine"


KEY_ARGUMENTS = {"--api-key": "api_key of the section", "--admin-api-key": "admin_api_key of the section"}
"""SGLang's options that hold a secret, and what stands for them."""


def _sglang_problems(path: str, section: EngineSection) -> Iterator[str]:
    if section.kind is not EngineKind.SGLANG:
        if section.python is not None or section.args:
            yield f"{path}.python, {path}.args: only for kind sglang, this is {section.kind}; remove them"
        return
    given = {arg.partition("=")[0] for arg in section.args}
    for flag, key in KEY_ARGUMENTS.items():
        if flag in given:
            yield (
                f"{path}.args: {flag}, which every process of this machine could read in the server's command line; "
                f"write {key}"
            )
    if "--config" in given:
        yield f"{path}.args: --config, by which the run hands over its keys; write its settings as arguments"
    if section.python is None:
        yield f"{path}.python: missing; write the Python that has SGLang, such as .venv-sglang/bin/python"
    elif problem := version_problem(section.python):
        yield f"{path}.python: {problem}"


def _sampling_problems(topology: Topology) -> Iterator[str]:
    sampling, student = topology.rollout.sampling, topology.engines.student
    if sampling.temperature != 1.0:
        scores = "teacher scores" if topology.opd.use_opd else "the learner's logprobs"
        yield (
            f"rollout.sampling.temperature: {sampling.temperature:g}, but {scores} are at temperature 1 and the two "
            "would not compare; write 1"
        )
    truncated = "the behaviour logprobs would not be those of the truncated distribution that was sampled from"
    if sampling.top_p != 1.0:
        yield f"rollout.sampling.top_p: {sampling.top_p:g}, but {truncated}; write 1"
    if sampling.top_k != -1:
        yield f"rollout.sampling.top_k: {sampling.top_k}, but {truncated}; write -1 (off)"
    if sampling.max_response_tokens >= student.context_tokens:
        yield (
            f"rollout.sampling.max_response_tokens: {sampling.max_response_tokens} leaves no room for a prompt in "
            f"engines.student.context_tokens {student.context_tokens}; write less than {student.context_tokens}"
        )


def _rollout_problems(topology: Topology) -> Iterator[str]:
    student = topology.engines.student
    room = student.replicas * student.max_running
    if student.started and topology.rollout.slots > room:
        yield (
            f"rollout.slots: {topology.rollout.slots}, but the student engines run {room} requests at once "
            f"(replicas x max_running); write at most {room}, or raise engines.student.max_running"
        )
    if topology.rollout.slots < topology.rollout.group_size:
        yield (
            f"rollout.slots: {topology.rollout.slots} cannot hold one group of rollout.group_size "
            f"{topology.rollout.group_size}; write at least {topology.rollout.group_size}"
        )
    for side, _, section in topology.engine_sides:
        actor, actors = "rollout" if side == "student" else "teacher", topology.teacher.replicas
        actors = topology.rollout.replicas if side == "student" else actors
        if actors > section.replicas:
            engines = f"{section.replicas} {side} engines"
            yield f"{actor}.replicas: {actors} actors for {engines}; write at most {section.replicas}"
