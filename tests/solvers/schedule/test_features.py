"""Places of features: one table of weights says what the parts of the predictor say."""

import numpy as np
import pytest

from semmoe.profiles.synthetic import SyntheticWorld, write_synthetic
from semmoe.profiles.trace import RoutingTrace
from semmoe.solvers.schedule.context import ContextPredictor, context_scores_TR
from semmoe.solvers.schedule.features import GENERATED, NUM_POSITION_IDS, PROMPT, Places, Seen, choices_before

LAYERS, EXPERTS, TOP_K = 5, 8, 2


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    path = tmp_path_factory.mktemp("features") / "t"
    write_synthetic(
        path, SyntheticWorld(num_layers=LAYERS, num_experts=EXPERTS, top_k=TOP_K, num_requests=6, tokens_per_request=20)
    )
    return Seen.of(RoutingTrace.open(path).load(), EXPERTS)


def made_up(depth: int, num_ranks: int = 3) -> ContextPredictor:
    """A predictor with other weights everywhere; rows that say nothing are zero."""
    rng = np.random.default_rng(depth)
    own_LDER = rng.normal(size=(LAYERS, depth, EXPERTS + 1, num_ranks)).astype(np.float16)
    previous_LPER = rng.normal(size=(LAYERS, 2, EXPERTS + 1, num_ranks)).astype(np.float16)
    position_LQR = rng.normal(size=(LAYERS, NUM_POSITION_IDS + 1, num_ranks)).astype(np.float16)
    for weights in (own_LDER, previous_LPER, position_LQR):
        weights[..., -1, :] = 0
    bias_LR, share_LRR = np.zeros((LAYERS, num_ranks), np.float32), np.zeros((LAYERS, *[num_ranks] * 2), np.float32)
    return ContextPredictor(bias_LR, share_LRR, own_LDER, previous_LPER, position_LQR)


def test_a_layer_reads_what_is_known_by_then():
    assert choices_before(0, 3) == [("previous", PROMPT, -1), ("previous", GENERATED, 0)]
    own = [("own", 0, 3), ("own", 1, 2)]
    assert choices_before(4, 2) == [*own, ("previous", PROMPT, 3), ("previous", GENERATED, 4)]


@pytest.mark.parametrize("depth", [1, 3])
def test_one_table_scores_as_the_predictor_does(seen, depth):
    predictor = made_up(depth)
    weight_LFR, places = predictor.weight_LFR, predictor.places
    assert weight_LFR.shape == (LAYERS, places.num_features, 3)
    for layer in range(LAYERS):
        ids_TX = places.ids_TX(layer, seen)
        assert ids_TX.shape == (len(seen.chosen_TLK), places.num_columns(layer, TOP_K))
        scores_TR = context_scores_TR(predictor, layer, np.zeros((len(ids_TX), 3), np.float32), seen)
        np.testing.assert_allclose(weight_LFR[layer][ids_TX].sum(1), scores_TR, atol=1e-5)


def test_places_of_fewer_layers_are_the_end_of_those_of_more(seen):
    more, fewer = Places(4, EXPERTS), Places(2, EXPERTS)
    for layer in range(LAYERS):
        columns = fewer.num_columns(layer, TOP_K)
        end_TX = more.ids_TX(layer, seen)[:, -columns:] - (more.num_features - fewer.num_features)
        np.testing.assert_array_equal(end_TX, fewer.ids_TX(layer, seen))
