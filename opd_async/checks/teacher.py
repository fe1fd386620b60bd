"""Check that the teacher is where the section `opd` says: in engines, or in the learner.

use_opd  type      needs                                      is started
true     sglang    models.teacher, engines.teacher            teacher engines and teacher actors
                   or models.teachers, engines.teachers       the same for each
true     megatron  opd.teacher_load                           neither: the learner holds the teacher
true     self      data.privileged_key or teacher_prompt      neither, or, with opd.self.place engines, both
false    -         a reward and an advantage estimator        neither
"""

from __future__ import annotations

from collections.abc import Iterator

from opd_async.config.learning import OpdType, SelfSection
from opd_async.config.topology import Topology
from opd_async.data.model_folder import try_model
from opd_async.errors import InputError
from opd_async.run.checkpoints import shards


def opd_problems(topology: Topology) -> Iterator[str]:
    """List every combination of the `opd` keys that cannot run; reads a checkpoint's names and sizes, no weights."""
    opd = topology.opd
    yield from _prompt_problems(topology)
    if opd.teacher_mix:
        yield (
            f"opd.teacher_mix: {opd.teacher_mix:g}, but to sample from a mixture of student and teacher an engine must "
            "run both models for each token, and neither SGLang nor the embedded engine does; write 0, and to train "
            "prefixes of the teacher write its responses into data.completions"
        )
    if not opd.use_opd:
        if opd.teacher_load is not None:
            yield "opd.teacher_load: given, but opd.use_opd is false; remove it, or write use_opd: true (--use-opd)"
    elif "use_opd" in opd.model_fields_set and "type" not in opd.model_fields_set:
        yield (
            "opd.type: missing although opd.use_opd is written; write sglang for a teacher on engines of its own, "
            "megatron for one inside the learner, or self for the student itself (--opd-type)"
        )
    elif opd.type is OpdType.SELF:
        yield from _self_problems(topology)
    elif opd.type is OpdType.SGLANG:
        yield from _sglang_problems(topology)
    else:
        yield from _megatron_problems(topology)
    yield from _unused_problems(topology)
    if opd.teacher_ckpt_step is not None and opd.teacher_load is None:
        yield "opd.teacher_ckpt_step: a step of no checkpoint; remove it, or write opd.teacher_load"


def teacher_limits(topology: Topology, response_tokens: int) -> dict[str, tuple[int, str]]:
    """By teacher, the most tokens of a prompt of its own that leave room for a response, and the key that bounds them.

    The teacher inside the learner has the name "" and the bound of its positions.
    """
    room, models = response_tokens, topology.models
    if topology.opd.on_student_engines:
        bound = (topology.engines.student.context_tokens - room, "engines.student.context_tokens")
        return dict.fromkeys(topology.teachers, bound)
    if topology.teachers:
        sides = [(key, model, section) for key, model, section in topology.engine_sides[1:]]
        return {
            name: (section.context_tokens - room, f"engines.{key}.context_tokens")
            for name, (key, _, section) in zip(topology.teachers, sides, strict=True)
        }
    facts = try_model((models.teacher or models.student).path)
    return {} if facts is None else {"": (facts.max_tokens - room, "max_position_embeddings of the teacher's model")}


def _prompt_problems(topology: Topology) -> Iterator[str]:
    """List prompts of teachers that nobody reads."""
    data = topology.data
    if not topology.opd.use_opd:
        for key in ("teacher_prompt", "privileged_key", "contrast_prompt"):
            if getattr(data, key) is not None:
                yield f"data.{key}: given, but opd.use_opd is false and no teacher reads it; remove it"
    elif data.contrast_prompt is not None and topology.opd.function is None:
        yield (
            "data.contrast_prompt: given, but no loss here looks at a second score; write opd.function, a loss of your "
            "own, which has it as contrast_R, or remove it"
        )
    if not data.informs_teachers and data.teacher_prompt_missing != "refuse":
        yield (
            f"data.teacher_prompt_missing: {data.teacher_prompt_missing}, but teachers read what the student reads; "
            "write data.teacher_prompt or data.privileged_key, or remove it"
        )


def _sglang_problems(topology: Topology) -> Iterator[str]:
    if topology.opd.teacher_load is not None:
        yield (
            "opd.teacher_load: given, but opd.type is sglang, whose teacher is models.teacher.path on engines of its "
            "own; remove it, or write type: megatron (--opd-type megatron)"
        )
    yield from _teachers_problems(topology)
    if topology.models.teacher is None and not topology.models.teachers:
        yield (
            "models.teacher: missing, but opd.type is sglang and somebody must score; write the teacher's path and "
            "its engines (engines.teacher), or use_opd: false"
        )


def _teachers_problems(topology: Topology) -> Iterator[str]:
    """List what several teachers lack: each needs a model, engines, and prompts."""
    names, key = topology.models.teachers, topology.data.teacher_key
    if names and topology.models.teacher is not None:
        yield "models.teachers: given beside models.teacher; write one of the two"
    if names and "teacher" in topology.engines.model_fields_set:
        yield "engines.teacher: the engines of models.teacher, which is not there; write engines.teachers, by name"
    for name in topology.engines.teachers:
        if name not in names:
            yield f"engines.teachers.{name}: no such teacher; write models.teachers.{name}, or remove it"
    if len(names) > 1 and key is None:
        yield (
            f"data.teacher_key: missing, but there are {len(names)} teachers; write the key in the metadata of each "
            "prompt that names its teacher"
        )
    if key is not None and not names:
        yield "data.teacher_key: given, but there is one teacher; remove it, or write models.teachers"


def _self_problems(topology: Topology) -> Iterator[str]:
    """List what a student that is its own teacher lacks, and what has no part in it."""
    opd, models = topology.opd, topology.models
    if not topology.data.informs_teachers:
        yield (
            "data.privileged_key: missing, but opd.type is self, and from a teacher that reads the same the student "
            "learns nothing; write the key of the rows that holds what only the teacher is shown "
            "(--opsd-privileged-info-key), or data.teacher_prompt"
        )
    for key, given in (("models.teacher", models.teacher is not None), ("models.teachers", bool(models.teachers))):
        if given:
            yield f"{key}: given, but opd.type is self and the teacher is the student; remove it, or write another type"
    if opd.self.weights == "live":
        for key in ("teacher_load", "teacher_offload"):
            if getattr(opd, key):
                yield f"opd.{key}: given, but live weights are the student's own, there is no second model; remove it"
    if opd.self.place == "engines":
        yield from _engine_problems(topology)
        return
    if opd.teacher_load is not None:
        yield from _load_problems(topology)


def _engine_problems(topology: Topology) -> Iterator[str]:
    """List why engines could not serve the student's first weights, or those of the step."""
    opd = topology.opd
    if opd.self.weights == "ema":
        yield "opd.self.weights: ema, but no engine holds an average; write frozen or live, or opd.self.place: learner"
    if opd.on_student_engines:
        yield from _live_problems(topology)
        return
    for key, given in (("opd.teacher_load", opd.teacher_load), ("learner.load", topology.learner.load)):
        if given is not None:
            yield (
                f"{key}: given, but opd.self.place is engines, which read the folder models.student.path; write "
                "opd.self.place: learner, or export the checkpoint (opd convert megatron-to-hf) and begin with that"
            )


def _live_problems(topology: Topology) -> Iterator[str]:
    """List why the student's engines could not score beside what they generate."""
    student = topology.engines.student
    if "teacher" in topology.engines.model_fields_set:
        yield "engines.teacher: given, but live weights are scored on the student's engines; remove it"
    room, slots = student.replicas * student.max_running, topology.rollout.slots
    if student.started and 2 * slots > room:
        yield (
            f"engines.student.max_running: {student.max_running}, but the engines generate {slots} responses "
            f"(rollout.slots) and score as many; write at least {-(-2 * slots // student.replicas)}, or fewer slots"
        )
    if topology.teacher.replicas > student.replicas:
        yield (
            f"teacher.replicas: {topology.teacher.replicas} actors for {student.replicas} student engines; write at "
            f"most {student.replicas}"
        )


def _unused_problems(topology: Topology) -> Iterator[str]:
    """List keys of self-distillation that nothing reads."""
    opd, usual = topology.opd, SelfSection()
    if opd.type is not OpdType.SELF and opd.self != usual:
        yield f"opd.self: given, but opd.type is {opd.type.value}; remove it, or write type: self (--opd-type self)"
    elif opd.self.weights != "ema" and opd.self.decay != usual.decay:
        yield f"opd.self.decay: {opd.self.decay:g}, but the weights are {opd.self.weights}; write weights: ema"
    plain = not topology.data.informs_teachers
    if opd.plain_kl_every and (plain or not opd.in_learner or opd.self.weights == "live"):
        what = "teacher in the learner that reads other prompts, and has weights of its own"
        yield f"opd.plain_kl_every: {opd.plain_kl_every}, but it is for a {what}; write 0"


def _megatron_problems(topology: Topology) -> Iterator[str]:
    opd = topology.opd
    if topology.models.teachers:
        yield "models.teachers: the learner holds one teacher; write models.teacher, or opd.type: sglang"
    if opd.teacher_load is None:
        yield (
            "opd.teacher_load: missing, but opd.type is megatron; write the folder of the teacher's Megatron "
            "checkpoint (--opd-teacher-load), as `opd convert hf-to-megatron` makes one"
        )
        return
    yield from _load_problems(topology)


def _load_problems(topology: Topology) -> Iterator[str]:
    opd = topology.opd
    assert opd.teacher_load is not None
    try:
        shards(opd.teacher_load, opd.teacher_ckpt_step, thorough=True)
    except InputError as error:
        yield f"opd.teacher_load: {error}"
