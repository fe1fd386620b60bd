"""Check that given completions can be mixed in as the topology says."""

from __future__ import annotations

from collections.abc import Iterator

from opd_async.config.losses import GIVEN_LOSSES, LOSSES, RATIO_LOSSES
from opd_async.config.topology import Topology
from opd_async.data.rows import data_files
from opd_async.errors import InputError

PREFIX_LOSSES = tuple(loss for loss in LOSSES if loss not in RATIO_LOSSES)
"""Those that look at the prefix alone, so that it does not matter who wrote the token."""


def completion_problems(topology: Topology) -> Iterator[str]:
    """List every impossible setting of `data.completions` and `opd.gkd_lambda`; looks at file names, reads no row."""
    section, opd = topology.data.completions, topology.opd
    if opd.use_opd and opd.loss in GIVEN_LOSSES and opd.gkd_lambda > 0.0:
        yield (
            f"opd.loss: {opd.loss}, but a share of {opd.gkd_lambda:g} of the samples is the student's own, on which "
            "its expected gradient is zero; write opd.gkd_lambda 0 and data.completions, or another loss"
        )
    if section is None:
        if opd.gkd_lambda < 1.0:
            yield f"opd.gkd_lambda: {opd.gkd_lambda:g}, but nothing is given to mix in; write data.completions, or 1"
        return
    try:
        data_files(section.path)
    except InputError as error:
        yield f"data.completions.path: {error}"
    if opd.gkd_lambda == 1.0:
        yield "data.completions: given, but opd.gkd_lambda is 1, so that none is taken; write less than 1, or remove it"
    if not opd.use_opd:
        yield "opd.use_opd: false, but given responses are there to be distilled on; write true, or remove them"
    elif opd.loss not in PREFIX_LOSSES:
        yield (
            f"opd.loss: {opd.loss}, but given responses were not sampled by the student and have no importance ratio; "
            f"write {', '.join(PREFIX_LOSSES)}, or remove data.completions"
        )
    if pull := topology.advantage.reference_kl_coef:
        yield (
            f"advantage.reference_kl_coef: {pull:g}, but the pull towards a reference is on sampled tokens, and given "
            "ones are none; write 0, or remove data.completions"
        )
    if topology.advantage.estimator.facts.rewards:
        yield (
            f"advantage.estimator: {topology.advantage.estimator.value}, but given responses are no samples of the "
            "student; write none, or remove data.completions"
        )
