"""The structure check tells planted groups from noise."""

from dataclasses import replace

import numpy as np

from semmoe.profiles.synthetic import SyntheticWorld, write_synthetic
from semmoe.profiles.trace import RoutingTrace
from semmoe.solvers.health.structure import measure_structure


def lift_of(path, **options) -> tuple[float, str]:
    write_synthetic(path, SyntheticWorld(num_requests=60, **options))
    trace = RoutingTrace.open(path)
    structure = measure_structure(trace.load(), trace.info, seed=0)
    assert structure is not None and len(structure.lift_L) == 4
    return float(structure.lift_L.mean()), structure.verdict


def test_planted_groups_are_structure_and_noise_is_not(tmp_path):
    planted, verdict = lift_of(tmp_path / "planted", noise=0.1)
    assert planted > 1.5 and verdict.startswith("structured")
    noise, verdict = lift_of(tmp_path / "noise", num_groups=1, noise=0.0)
    assert abs(noise - 1) < 0.1 and verdict.startswith("no structure")


def test_too_little_to_tell(tmp_path):
    write_synthetic(tmp_path / "t", SyntheticWorld(num_requests=3))
    trace = RoutingTrace.open(tmp_path / "t")
    assert measure_structure(trace.load(), trace.info, seed=0) is None
    assert measure_structure(trace.load(np.zeros(3, bool)), trace.info, seed=0) is None


def test_a_few_tokens_are_too_few(tmp_path):
    """Ratios of a handful of pairs pass for structure, and a shuffle without any such pair for a
    lift without end."""
    write_synthetic(tmp_path / "t", SyntheticWorld(num_requests=60, noise=0.1))
    trace = RoutingTrace.open(tmp_path / "t")
    batch = trace.load()
    first = np.arange(0, 5 * 8, 8)
    few = replace(batch, starts_B1=first, request_ids=batch.request_ids[:4], domains=batch.domains[:4])
    few = replace(few, expert_ids_TLK=batch.expert_ids_TLK[:32])
    assert measure_structure(few, trace.info, seed=0) is None
