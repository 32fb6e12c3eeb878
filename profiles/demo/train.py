"""Train a small Mixture-of-Experts language model on labelled text, so that its routing is learned
and not random.

    python -m semmoe.profiles.demo.train TEXTS OUT --size 4m --steps 2400
    python -m semmoe.profiles.demo.train TEXTS OUT --size 16m --minutes 65

TEXTS is a folder of UTF-8 files, one per domain and named for it; OUT becomes a checkpoint that
Transformers loads: Qwen3-MoE, 16-bit weights, a byte-level BPE tokenizer, and training.json with
the facts of the run. Every step draws its sequences from the domains with equal chance, so small
domains count as much as large ones. The last tenth of every file is seen neither by the tokenizer
nor by the model; its loss is printed for each domain at the end.

The load-balancing term is the one of Switch Transformers (Fedus et al., 2021, arXiv:2101.03961,
section 2.2), in Transformers' form for top-k routing. With --steps the same texts, size, seed and
software give the same weights; with --minutes the clock decides how many steps there are.

Axis letters: B sequences of a batch, P positions of a sequence, T tokens of a domain.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from semmoe.profiles.document import indented
from semmoe.profiles.errors import InputError
from semmoe.profiles.files import new_directory

END_OF_TEXT = "<|endoftext|>"
HELD_OUT_SHARE = 0.1
HELD_OUT_SEQUENCES = 32  # per domain: enough for two digits of the loss, a few seconds of one core
CHUNK_CHARACTERS = 20_000  # texts are encoded in pieces, one long string would be slow


@dataclass(frozen=True)
class Size:
    """The dimensions of one model size."""

    vocab_size: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    experts: int
    top_k: int
    expert_width: int


SIZES = {
    "4m": Size(vocab_size=4096, hidden=128, layers=4, heads=4, kv_heads=2, experts=32, top_k=4, expert_width=64),
    "16m": Size(vocab_size=8192, hidden=192, layers=6, heads=6, kv_heads=3, experts=64, top_k=4, expert_width=64),
}


@dataclass(frozen=True)
class Budget:
    """How long to train: a number of steps, or minutes of wall-clock time; exactly one of the
    two is set."""

    steps: int | None
    minutes: float | None

    def share_used(self, step: int, seconds: float) -> float:
        """The share of the budget used after `step` steps and `seconds`, 1.0 or more when it is
        spent."""
        return step / self.steps if self.steps is not None else seconds / (60 * (self.minutes or 0.0))


@dataclass(frozen=True)
class Recipe:
    """How to train."""

    seed: int
    batch: int  # sequences of a step
    length: int  # tokens of a sequence
    peak_rate: float
    report_every: int  # steps between lines of progress


@dataclass(frozen=True)
class Progress:
    """Where training stands; `loss` is a running mean over about 30 steps, with the balance
    term."""

    step: int
    tokens: int
    seconds: float
    loss: float


# ---- text


def read_texts(folder: Path, max_characters: int) -> dict[str, str]:
    """The text of each domain, by file name without its ending; raises InputError for what
    cannot be trained on."""
    files = sorted(f for f in folder.iterdir() if f.is_file()) if folder.is_dir() else []
    if not files:
        raise InputError(f"{folder}: expected a folder with one text file per domain")
    texts: dict[str, str] = {}
    for file in files:
        if file.stem in texts:
            raise InputError(f"{file}: a second file of domain {file.stem}, expected one per domain")
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{file}: not UTF-8 at byte {error.start}") from None
        if len(text) > max_characters:
            say(f"{file.name}: using the first {max_characters} of {len(text)} characters")
        texts[file.stem] = text[:max_characters]
    return texts


def split_text(text: str) -> tuple[str, str]:
    """The part to train on and the held-out tail."""
    cut = int(len(text) * (1 - HELD_OUT_SHARE))
    return text[:cut], text[cut:]


def chunks(text: str, size: int) -> Iterator[str]:
    """The text in consecutive pieces of `size` characters."""
    return (text[i : i + size] for i in range(0, len(text), size))


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `vocab_size` tokens; token 0 is begin, end and
    padding at once."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # At most a million characters of each domain: the frequent pairs are known by then, and none
    # drowns the others.
    bpe.train_from_iterator((piece for text in texts for piece in chunks(text[:1_000_000], 2000)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> np.ndarray:
    """The token ids of a text, int64 [T]."""
    encodings = tokenizer.backend_tokenizer.encode_batch(list(chunks(text, CHUNK_CHARACTERS)), add_special_tokens=False)
    return np.concatenate([np.zeros(0, np.int64), *(np.asarray(e.ids, np.int64) for e in encodings)])


def check_lengths(ids_T_of_domain: dict[str, np.ndarray], length: int) -> None:
    """Raises InputError unless every domain holds at least one sequence of `length` tokens."""
    for domain, ids_T in ids_T_of_domain.items():
        if len(ids_T) < length:
            raise InputError(f"domain {domain}: {len(ids_T)} tokens to train on, expected at least {length}")


# ---- model and training


def build_model(size: Size, seed: int) -> Qwen3MoeForCausalLM:
    """A Qwen3-MoE model of the given size with random weights."""
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=size.vocab_size,
        hidden_size=size.hidden,
        intermediate_size=4 * size.hidden,
        moe_intermediate_size=size.expert_width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        num_experts=size.experts,
        num_experts_per_tok=size.top_k,
        norm_topk_prob=True,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        router_aux_loss_coef=0.02,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = Qwen3MoeForCausalLM(config)
    model.set_experts_implementation("grouped_mm")
    return model


def sample_batch(streams: list[np.ndarray], rng: np.random.Generator, batch: int, length: int) -> torch.Tensor:
    """Random sequences int64 [B, P]: the domain is drawn first, all alike, then the place in it."""
    rows = []
    for _ in range(batch):
        ids_T = streams[rng.integers(len(streams))]
        start = rng.integers(len(ids_T) - length + 1)
        rows.append(ids_T[start : start + length])
    return torch.from_numpy(np.stack(rows))


def learning_rate(peak: float, step: int, share_used: float) -> float:
    """A warm-up of 100 steps, then a cosine from `peak` down to a twentieth of it."""
    return peak * min(1.0, (step + 1) / 100) * (0.05 + 0.475 * (1 + math.cos(math.pi * min(1.0, share_used))))


def train_step(model: Qwen3MoeForCausalLM, optimizer: torch.optim.Optimizer, ids_BP: torch.Tensor) -> float:
    """One optimizer step on a batch; returns its loss with the balance term."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(input_ids=ids_BP, labels=ids_BP, use_cache=False, output_router_logits=True).loss
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def train(model: Qwen3MoeForCausalLM, streams: list[np.ndarray], budget: Budget, recipe: Recipe) -> Progress:
    """Trains the model in place until the budget is spent.

    `streams`: token ids of each domain, int64 [T].
    """
    rng = np.random.default_rng(recipe.seed)
    rate, batch, length = recipe.peak_rate, recipe.batch, recipe.length
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.05, fused=True)
    model.train()
    start, at = time.monotonic(), Progress(0, 0, 0.0, math.nan)
    while (share := budget.share_used(at.step, at.seconds)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(rate, at.step, share)
        loss = train_step(model, optimizer, sample_batch(streams, rng, batch, length))
        mean = loss if at.step == 0 else 0.97 * at.loss + 0.03 * loss
        at = Progress(at.step + 1, at.tokens + batch * length, time.monotonic() - start, mean)
        if at.step == 1 or at.step % recipe.report_every == 0:
            report(at, budget)
    return at


def held_out_loss(model: Qwen3MoeForCausalLM, ids_T: np.ndarray, length: int) -> float:
    """The mean loss per token, in nats and without the balance term, over the first held-out
    sequences of a domain.

    NaN where the held-out part has fewer than two tokens, for then there is nothing to predict.
    """
    length = min(length, len(ids_T))
    if length < 2:
        return math.nan
    num_sequences = min(HELD_OUT_SEQUENCES, len(ids_T) // length)
    ids_BP = torch.from_numpy(ids_T[: num_sequences * length].reshape(num_sequences, length))
    model.eval()
    with torch.inference_mode():
        return model(input_ids=ids_BP, labels=ids_BP, use_cache=False).loss.item()


# ---- results


def say(line: str) -> None:
    """A line for people, on stderr, at once."""
    print(line, file=sys.stderr, flush=True)


def report(at: Progress, budget: Budget) -> None:
    """One progress line."""
    whole = f"of {budget.steps} " if budget.steps is not None else ""
    of_minutes = f" of {budget.minutes:g}" if budget.minutes is not None else ""
    rate = at.tokens / at.seconds
    minutes = at.seconds / 60
    say(
        f"step {at.step} {whole}  {at.tokens} tokens  {rate:.0f} tokens/s  {minutes:.1f}{of_minutes} min  "
        f"loss {at.loss:.3f}"
    )


def save(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, facts: dict, out: Path) -> None:
    """Writes the checkpoint beside `out` and renames it, so that `out` is whole or absent."""
    with new_directory(out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "training.json").write_text(indented(facts), encoding="utf-8")


def train_folder(options: argparse.Namespace) -> dict:
    """Reads the texts, trains, measures the held-out loss, saves; returns the facts of
    training.json."""
    size, budget, length = SIZES[options.size], Budget(options.steps, options.minutes), options.length
    if options.out.exists():
        raise InputError(f"{options.out}: exists already, expected a new folder")
    # 1. Text to tokens, the tail of every domain apart.
    parts = {domain: split_text(text) for domain, text in read_texts(options.texts, options.max_characters).items()}
    tokenizer = train_tokenizer((seen for seen, _ in parts.values()), size.vocab_size)
    streams = {domain: encode(tokenizer, seen) for domain, (seen, _) in parts.items()}
    check_lengths(streams, length)
    # 2. Train.
    model = build_model(size, options.seed)
    recipe = Recipe(options.seed, options.batch, length, options.peak_rate, options.report_every)
    at = train(model, list(streams.values()), budget, recipe)
    # 3. The held-out loss is that of the 16-bit weights that are saved.
    model.bfloat16()
    losses = {}
    for domain, (_, held_out) in parts.items():
        losses[domain] = held_out_loss(model, encode(tokenizer, held_out), length)
        say(f"held out  {domain}  loss {losses[domain]:.3f}")
    known = [loss for loss in losses.values() if not math.isnan(loss)]
    facts = {
        "domains": list(parts),
        "size": options.size,
        "seed": options.seed,
        "steps": at.step,
        "tokens_seen": at.tokens,
        "loss_with_balance_term": at.loss,
        "held_out_loss": sum(known) / len(known) if known else None,
        "held_out_loss_of_domain": {domain: None if math.isnan(loss) else loss for domain, loss in losses.items()},
        "parameters": model.num_parameters(),
    }
    save(model, tokenizer, facts, options.out)
    return facts


def positive_int(text: str) -> int:
    """argparse type: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}, expected at least 1")
    return value


def positive_float(text: str) -> float:
    """argparse type: a finite number above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{value}, expected a number above 0")
    return value


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train a small Mixture-of-Experts language model on labelled text.")
    parser.add_argument("texts", type=Path, help="folder with one UTF-8 text file per domain")
    parser.add_argument("out", type=Path, help="new folder for the checkpoint")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--steps", type=positive_int, help="train for this many steps (reproducible)")
    budget.add_argument("--minutes", type=positive_float, help="train for this long")
    parser.add_argument("--size", choices=SIZES, default="4m", help="parameters (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--batch", type=positive_int, default=16, help="sequences per step (default: %(default)s)")
    parser.add_argument("--length", type=positive_int, default=256, help="tokens per sequence (default: %(default)s)")
    parser.add_argument("--peak-rate", type=positive_float, default=2e-3, help="learning rate (default: %(default)s)")
    parser.add_argument("--report-every", type=positive_int, default=100, help="steps (default: %(default)s)")
    parser.add_argument(
        "--max-characters", type=positive_int, default=5_000_000, help="of each file (default: %(default)s)"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0 done, 1 input cannot be used (2, wrong usage, is argparse's)."""
    try:
        facts = train_folder(parse(arguments))
    except InputError as error:
        say(f"train: {error}")
        return 1
    print(json.dumps(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
