"""The engines of a rollout actor: which it drives, how it speaks to each, and whether each may be asked now."""

from __future__ import annotations

import aiohttp

from opd_async.actors.client.engine_client import Endpoint, EngineClient
from opd_async.actors.client.guard import Guard
from opd_async.actors.client.routed_client import RoutedClient
from opd_async.actors.rollout.generation import Student
from opd_async.role import Role


class Engines:
    """Its student engines, and every teacher engine, which generates in evaluations of teachers."""

    def __init__(self, role: Role, session: aiohttp.ClientSession) -> None:
        self._role = role
        self._session = session
        self.students = self._find_students()
        self.teachers = {name: [self._client(url) for url in urls] for name, urls in role.plan.teacher_urls.items()}
        gauge = role.metrics["opd_rollout_breaker_open"]
        clients = [student.client for student in self.students]
        clients += [client for teacher in self.teachers.values() for client in teacher]
        self.guards = {client.url: Guard(client.url, gauge.labels(client.url), role.clock) for client in clients}

    def _find_students(self) -> list[Student]:
        """Every `replicas`-th engine, so that all are driven by exactly one actor; all of them as one where a router
        decides which of them a request meets."""
        plan, mine = self._role.plan, self._role.mine
        urls, router = plan.student_engines, plan.topology.engines.student.router
        if router is None:
            return [Student(client=self._client(url), urls=(url,)) for url in plan.students_of(mine)]
        engines = [self._client(url) for url in urls]
        return [Student(client=RoutedClient(self._client(router.rstrip("/")), engines), urls=urls)]

    def _client(self, url: str) -> EngineClient:
        section = self._role.plan.section(url)
        endpoint = Endpoint(
            url=url,
            api_key=section.api_key,
            admin_api_key=section.admin_api_key,
            deadline_s=self._role.plan.topology.rollout.request_deadline_s,
        )
        plan = self._role.plan
        return EngineClient(self._session, endpoint, plan.vocab_size, rows=plan.table_rows(url))

    def student_of(self, prompt_id: int) -> Student:
        """The student engine of a prompt: all samples of its group meet one prefix cache.

        By remainder, which spreads prompts evenly: a student that is gone comes back, and its responses wait for it.
        Teachers are dealt prompts by load instead (`scheduling/routing.py`): another one takes over at once, and a step
        waits for the slowest.
        """
        return self.placed(self.students[prompt_id % len(self.students)], prompt_id)

    def placed(self, student: Student, prompt_id: int) -> Student:
        """`student` itself, or another one in place of a slow one, if there is any that can be used."""
        usable = [other for other in self.students if not other.slow and not other.down] if student.slow else []
        return usable[prompt_id % len(usable)] if usable else student

    def slow(self, url: str, is_slow: bool) -> Student | None:
        """Note that an engine is far slower than its peers, or is to be tried again; returns one that turned slow."""
        for student in self.students:
            if student.client.url == url and student.slow != is_slow:
                student.slow = is_slow
                return student if is_slow else None
        return None

    def teacher_of(self, teacher: str, sample_id: int) -> EngineClient:
        """The engine of `teacher` that generates for an evaluation: one of those that can be asked, if any can."""
        engines = self.teachers[teacher]
        usable = [engine for engine in engines if self.guards[engine.url].closed] or engines
        return usable[sample_id % len(usable)]
