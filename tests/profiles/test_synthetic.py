"""The synthetic trace holds what it promises: planted groups, distinct ids, unequal loads,
domains, the same bytes."""

import numpy as np
import pytest

from semmoe.profiles.errors import InputError
from semmoe.profiles.synthetic import SyntheticWorld, plant_structure, synthetic_requests, write_synthetic
from semmoe.profiles.trace import RoutingTrace


def test_picks_stay_in_the_planted_group(tmp_path):
    group_of_LE = write_synthetic(tmp_path / "t", SyntheticWorld(num_requests=40))
    batch = RoutingTrace.open(tmp_path / "t").load()
    assert batch.expert_ids_TLK.shape == (40 * 64, 4, 4)
    assert (np.bincount(group_of_LE[0]) == 8).all() and not np.array_equal(group_of_LE[0], group_of_LE[1])
    group_TLK = group_of_LE[np.arange(4)[:, None], batch.expert_ids_TLK]
    modal_TL = (group_TLK[..., None] == np.arange(4)).sum(axis=2)  # picks per group
    assert modal_TL.max(axis=-1).mean() / 4 > 0.85
    # One group for the whole depth: where layer 0 went, layer 3 went too, and a token mostly goes
    # where it went before.
    home_TL = modal_TL.argmax(axis=-1)
    assert (home_TL[:, 0] == home_TL[:, 3]).mean() > 0.9
    votes = np.zeros((500, 4))
    np.add.at(votes, (batch.token_ids_T, home_TL[:, 0]), 1)
    assert votes.max(axis=1).sum() / votes.sum() > 0.85


def test_rows_are_distinct_and_loads_and_domains_differ(tmp_path):
    group_of_LE = write_synthetic(tmp_path / "t", SyntheticWorld(num_requests=80, noise=0.3))
    batch = RoutingTrace.open(tmp_path / "t").load()
    assert (np.diff(batch.expert_ids_TLK.astype(int), axis=2) > 0).all()
    load_E = np.bincount(batch.expert_ids_TLK[:, 0].ravel(), minlength=32)
    assert load_E.max() > 1.5 * load_E.mean() and load_E.min() > 0
    in_domain = np.array(batch.domains)[batch.request_of_T] == "domain-2"
    share = (group_of_LE[0][batch.expert_ids_TLK[in_domain, 0]] == 2).mean()
    assert share > 0.4
    assert len(batch.sequence(0)) == 65 and batch.is_prompt_T[:64].sum() == 32


@pytest.mark.parametrize(("top_k", "num_groups"), [(12, 4), (4, 1), (1, 32), (32, 4)])
def test_groups_smaller_than_k_and_other_extremes(top_k, num_groups):
    sizes = {"num_layers": 2, "top_k": top_k, "num_groups": num_groups, "num_requests": 3, "tokens_per_request": 9}
    world = SyntheticWorld(**sizes, vocab_size=64, noise=0.5, num_domains=3, seed=1)
    for request in synthetic_requests(plant_structure(world), world):
        assert (np.diff(request.expert_ids_TLK, axis=2) > 0).all()
        assert request.expert_ids_TLK.min() >= 0 and request.expert_ids_TLK.max() < 32


def test_same_seed_same_bytes_other_seed_other_routing(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_synthetic(tmp_path / name, SyntheticWorld(num_requests=5, seed=seed))
    a, b, c = (RoutingTrace.open(tmp_path / name).fingerprint for name in "abc")
    assert a == b != c


def test_uneven_groups_are_refused(tmp_path):
    with pytest.raises(InputError, match="32 experts do not divide into 5 groups"):
        write_synthetic(tmp_path / "t", SyntheticWorld(num_groups=5))
    with pytest.raises(InputError, match="top-33 of 32 experts"):
        write_synthetic(tmp_path / "t", SyntheticWorld(top_k=33))
