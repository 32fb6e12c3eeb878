"""Every MoE family of Transformers, as a tiny random model: what is recorded is what its router
chose, whatever the batch.

The router's own output is read apart from the recorder, at the router's module, and compared with
the recorded ids as sets per token (an experts module may get its choices in another order). Routers
that return no indices are named below with what they return.
"""

import functools

import numpy as np
import pytest
import torch
import transformers
from tiny_models import FAMILIES, tiny_input_ids, tiny_model

from semmoe.profiles.capture.batches import TokenRequest
from semmoe.profiles.capture.hooks import record_generation, record_prefill, start_recording
from semmoe.profiles.capture.layers import find_moe_layers, trace_info
from semmoe.profiles.config import moe_facts
from semmoe.profiles.errors import InputError

transformers.utils.logging.set_verbosity_error()
torch.set_num_threads(1)  # tiny matrices: a second thread only waits

family_model = functools.cache(tiny_model)  # no test changes a model
LENGTHS = (23, 40, 9)
READS_ALL_AT_ONCE = ("diffusion_gemma", "openai_privacy_filter")  # no causal model: they do not generate


def requests_of(model_type: str) -> list[TokenRequest]:
    ids = tiny_input_ids(model_type, batch=len(LENGTHS), length=max(LENGTHS)).numpy().astype(np.int32)
    return [TokenRequest(f"r{b}", "", ids[b, :n]) for b, n in enumerate(LENGTHS)]


def router_of(model, layer):
    """The module whose output holds the choice of an experts module: its sibling named gate or
    router."""
    if layer.after:
        return layer.module
    parent = model.get_submodule(layer.name.rpartition(".")[0])
    return next(m for n, m in parent.named_children() if n in ("gate", "router"))


def chosen_by_router(model_type: str, output, layer, top_k: int) -> torch.Tensor:
    """Expert ids [T, K] from the router's own output."""
    if isinstance(output, torch.Tensor):  # logits only: softmax keeps their order
        return output.topk(top_k, dim=-1).indices
    if model_type == "llama4":  # scores and logits, no bias: the top of the logits
        return output[1].topk(top_k, dim=-1).indices
    if model_type == "jetmoe":  # sorted pairs, logits last
        return output[-1].topk(top_k, dim=-1).indices
    index = next(part for part in output if not part.is_floating_point())  # third, except in old releases
    if model_type == "longcat_flash":
        return index.clamp(max=layer.num_experts)
    if model_type == "zaya":  # the last of the router's classes is "skip"; it is returned as expert 0 with weight 0
        return torch.where(output[1] == 0, layer.num_experts, index)
    return index


def test_at_least_fifty_families_are_covered():
    assert len(FAMILIES) >= 50


@pytest.mark.parametrize("model_type", FAMILIES)
def test_recorded_ids_are_the_routers_choice(model_type):
    model = family_model(model_type)
    recording = start_recording(model, model_type)
    requests = requests_of(model_type)
    seen = [[] for _ in recording.layers]
    handles = [
        router_of(model, layer).register_forward_hook(lambda m, a, out, into=into: into.append(out))
        for layer, into in zip(recording.layers, seen, strict=True)
    ]
    try:
        for request in requests:
            (recorded,) = record_prefill(model, recording, [request])
            ids_TLK = recorded.expert_ids_TLK
            assert ids_TLK.shape == (len(request.token_ids), len(recording.layers), recording.top_k)
            for i, layer in enumerate(recording.layers):
                expected = chosen_by_router(model_type, seen[i].pop(), layer, recording.top_k)
                expected = expected.reshape(len(request.token_ids), recording.top_k).numpy()
                np.testing.assert_array_equal(np.sort(ids_TLK[:, i]), np.sort(expected))
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_batches_route_like_single_requests(model_type):
    model = family_model(model_type)
    recording = start_recording(model, model_type, weights=True)
    requests = requests_of(model_type)
    for together, request in zip(record_prefill(model, recording, requests), requests, strict=True):
        (alone,) = record_prefill(model, recording, [request])
        assert together.request_id == alone.request_id
        np.testing.assert_array_equal(np.sort(together.expert_ids_TLK), np.sort(alone.expert_ids_TLK))
        np.testing.assert_allclose(
            np.sort(together.expert_weights_TLK), np.sort(alone.expert_weights_TLK), atol=5e-3, rtol=5e-3
        )


@pytest.mark.parametrize("model_type", FAMILIES)
def test_generated_rows_are_those_of_reading_the_whole_sequence(model_type):
    model = family_model(model_type)
    recording = start_recording(model, model_type)
    if not model.can_generate():
        assert model_type in READS_ALL_AT_ONCE
        return
    for recorded in record_generation(model, recording, requests_of(model_type), 5):
        assert recorded.num_prompt_tokens < len(recorded.token_ids) <= recorded.num_prompt_tokens + 5
        read = TokenRequest("", "", recorded.token_ids[:-1])
        (whole,) = record_prefill(model, recording, [read])
        np.testing.assert_array_equal(np.sort(recorded.expert_ids_TLK), np.sort(whole.expert_ids_TLK))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_facts_agree_with_the_configuration(model_type):
    model = family_model(model_type)
    recording = start_recording(model, model_type)
    info = trace_info(model, list(recording.layers), recording.top_k, name="m", embedding=None, made_by="")
    facts = moe_facts(model.config.to_dict())
    assert {name: getattr(info, name) for name in facts} == facts


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Llama", "dense"),
        ("SwitchTransformers", "capacity"),
        ("NllbMoe", "capacity"),
        ("Doge", "product keys"),
    ],
)
def test_unsupported_models_are_named_with_a_reason(name, reason):
    config = getattr(transformers, f"{name}Config")()
    module = {
        "SwitchTransformers": "SwitchTransformersForConditionalGeneration",
        "NllbMoe": "NllbMoeForConditionalGeneration",
    }
    with torch.device("meta"):
        model = getattr(transformers, module.get(name, f"{name}ForCausalLM"))(config)
    assert not find_moe_layers(model)
    with pytest.raises(InputError, match=reason) as refused:
        start_recording(model, "some/model")
    assert config.model_type in str(refused.value) and "\n" not in str(refused.value)
