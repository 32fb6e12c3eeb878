"""The embedded demo: its prompts, its model, and the script that trains such a model."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3MoeForCausalLM

from semmoe.profiles.demo import train
from semmoe.profiles.demo.paths import demo_model_path, demo_prompts_path


@pytest.fixture(scope="module")
def prompts() -> list[dict]:
    return [json.loads(line) for line in demo_prompts_path().read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(demo_model_path())


@pytest.fixture(scope="module")
def model() -> Qwen3MoeForCausalLM:
    return AutoModelForCausalLM.from_pretrained(demo_model_path(), dtype=torch.float32).eval()


def test_prompts_are_whole_and_distinct(prompts):
    assert all(list(prompt) == ["id", "domain", "text"] for prompt in prompts)
    assert len({prompt["id"] for prompt in prompts}) == len(prompts)
    assert len({prompt["text"].strip() for prompt in prompts}) == len(prompts)
    assert all(prompt["id"].startswith(prompt["domain"] + "-") for prompt in prompts)


def test_every_domain_has_enough_prompts_to_split(prompts):
    count_of_domain = Counter(prompt["domain"] for prompt in prompts)
    assert len(count_of_domain) >= 14
    assert min(count_of_domain.values()) >= 15
    assert len(prompts) >= 220


def test_prompts_are_short_and_come_to_many_tokens(prompts, tokenizer):
    lengths = [len(ids) for ids in tokenizer([prompt["text"] for prompt in prompts]).input_ids]
    assert sum(lengths) >= 25_000
    assert min(lengths) >= 60
    assert max(lengths) <= 400


def test_prompts_survive_the_tokenizer(prompts, tokenizer):
    for prompt in prompts:
        assert tokenizer.decode(tokenizer(prompt["text"]).input_ids) == prompt["text"]


def expert_share_LE(model, tokenizer, texts: list[str]) -> torch.Tensor:
    """The share of the activations that go to each expert, float [L, E]; every layer's row sums
    to 1."""
    counts_LE = torch.zeros(model.config.num_hidden_layers, model.config.num_experts)
    for text in texts:
        with torch.inference_mode():
            out = model(**tokenizer(text, return_tensors="pt"), output_router_logits=True)
        assert torch.isfinite(out.logits).all()
        for layer, logits_TE in enumerate(out.router_logits):
            chosen_TK = logits_TE.topk(model.config.num_experts_per_tok).indices
            counts_LE[layer] += torch.bincount(chosen_TK.flatten(), minlength=model.config.num_experts)
    return counts_LE / counts_LE.sum(1, keepdim=True)


def test_model_is_the_one_of_its_card(model):
    facts = json.loads((demo_model_path() / "training.json").read_text())
    card = (demo_model_path() / "README.md").read_text(encoding="utf-8")
    assert isinstance(model, Qwen3MoeForCausalLM)
    assert model.num_parameters() == facts["parameters"]
    assert f"{facts['parameters']:,}" in card
    assert f"{facts['tokens_seen']:,}" in card
    assert f"{facts['loss_with_balance_term']:.2f} per token" in card
    assert all(domain in card for domain in facts["domains"])


def test_routing_was_learned(model, tokenizer, prompts):
    """Experts specialise: a domain loads its favourites well above the mean, and domains differ
    in their favourites."""
    share_LE = {
        domain: expert_share_LE(model, tokenizer, [p["text"] for p in prompts if p["domain"] == domain][:4])
        for domain in ("python", "chinese")
    }
    for domain in share_LE:
        assert (share_LE[domain].amax(1) > 2 / model.config.num_experts).all()
    variation_L = (share_LE["python"] - share_LE["chinese"]).abs().sum(1) / 2
    assert (variation_L > 0.3).all()


@pytest.fixture
def texts(tmp_path: Path, prompts) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for domain in ("python", "russian"):
        text = "\n\n".join(prompt["text"] for prompt in prompts if prompt["domain"] == domain)
        (folder / f"{domain}.txt").write_text(text, encoding="utf-8")
    return folder


TINY = ["--steps", "2", "--batch", "2", "--length", "32", "--report-every", "1"]


def test_train_makes_the_same_model_twice(texts, tmp_path, capsys):
    for name in ("one", "two"):
        assert train.main([str(texts), str(tmp_path / name), *TINY]) == 0
    captured = capsys.readouterr()
    facts = json.loads(captured.out.splitlines()[0])
    assert facts["tokens_seen"] == 2 * 2 * 32
    assert set(facts["held_out_loss_of_domain"]) == {"python", "russian"}
    assert 7 < facts["held_out_loss"] < 10  # about log(4096) = 8.3, for nothing is learned in two steps
    assert "step 2 of 2" in captured.err
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "texts", "two"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert isinstance(model, Qwen3MoeForCausalLM)
    assert model.num_parameters() == facts["parameters"]
    assert AutoTokenizer.from_pretrained(tmp_path / "one").decode([0]) == train.END_OF_TEXT


def test_train_refuses_what_it_cannot_use(texts, tmp_path, capsys):
    out = tmp_path / "out"

    def error_of(*arguments: str) -> str:
        assert train.main([*arguments, *TINY]) == 1
        return capsys.readouterr().err.splitlines()[-1]

    assert "expected a new folder" in error_of(str(texts), str(texts))
    assert "one text file per domain" in error_of(str(tmp_path / "absent"), str(out))
    (texts / "tiny.txt").write_text("too short")
    assert "domain tiny" in error_of(str(texts), str(out))
    (texts / "tiny.txt").write_bytes(b"caf\xe9")
    assert "not UTF-8 at byte 3" in error_of(str(texts), str(out))
    assert not out.exists()


def test_sampling_draws_domains_alike_and_reaches_both_ends():
    streams = [np.arange(0, 5), np.arange(100, 1000)]
    rows = train.sample_batch(streams, np.random.default_rng(0), batch=2000, length=4)
    starts = rows[:, 0]
    assert rows.shape == (2000, 4)
    assert abs((starts < 100).float().mean() - 0.5) < 0.05
    assert set(starts[starts < 100].tolist()) == {0, 1}
    assert (rows[:, 1:] - rows[:, :-1] == 1).all()
