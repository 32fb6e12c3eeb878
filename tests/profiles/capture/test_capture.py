"""`semmoe trace` on a tiny model: what ends in the trace, what the command says of bad input,
and what a kill leaves."""

import gzip
import io
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import VOCAB_SIZE, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from semmoe.main import app
from semmoe.options import Dtype, Repetition, TraceKind
from semmoe.profiles.capture.batches import TokenRequest, length_batches
from semmoe.profiles.capture.hash_layers import HASH_FORMAT
from semmoe.profiles.capture.hooks import record_generation, record_prefill, start_recording
from semmoe.profiles.capture.requests import encode_requests, read_requests
from semmoe.profiles.capture.sources import open_dataset, open_source
from semmoe.profiles.errors import InputError
from semmoe.profiles.trace import RoutingTrace

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[3]
WORDS = [f"w{i}" for i in range(VOCAB_SIZE - 3)]
TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"


def save_tokenizer(folder: Path, *, template: str | None = None) -> None:
    """Words w0, w1, ... are tokens 3, 4, ...; anything else is token 0."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {w: i + 3 for i, w in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
    fast.chat_template = template
    fast.save_pretrained(folder)


def words(count: int, start: int = 0) -> str:
    return " ".join(WORDS[(start + 7 * i) % len(WORDS)] for i in range(count))


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("qwen3_moe")
    tiny_model("qwen3_moe").save_pretrained(folder)
    save_tokenizer(folder, template=TEMPLATE)
    return folder


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def prompts(tmp_path) -> Path:
    rows = [{"id": f"p{i}", "domain": "ab"[i % 2], "text": words(3 + i % 9, i)} for i in range(24)]
    return write_lines(tmp_path / "prompts.jsonl", rows)


def run(*arguments: object):
    """`semmoe trace` in this process, which has imported everything already."""
    done = CliRunner().invoke(app, ["trace", *map(str, arguments)])
    assert done.exit_code == 0, (done.exception, done.stderr)
    return done


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | more


def refused(*arguments: object) -> str:
    """The one line with which the command refuses."""
    result = CliRunner().invoke(app, ["trace", *map(str, arguments)])
    assert isinstance(result.exception, InputError), (result.exception, result.output)
    line = str(result.exception)
    assert line and "\n" not in line
    return line


def test_trace_holds_every_request_with_its_routing(model_folder, prompts, tmp_path):
    done = run(model_folder, "--data", prompts, "-o", tmp_path / "t")
    assert "text from field 'text', domain from 'domain'" in done.stderr and done.stdout == ""
    trace = RoutingTrace.open(tmp_path / "t")
    batch = trace.load()
    assert sorted(batch.request_ids) == sorted(f"p{i}" for i in range(24))
    assert batch.is_prompt_T.all()
    model = tiny_model("qwen3_moe")
    recording = start_recording(model, "m")
    for b in range(batch.num_requests):
        i = int(batch.request_ids[b][1:])
        assert batch.domains[b] == "ab"[i % 2]
        expected = np.array([3 + WORDS.index(w) for w in words(3 + i % 9, i).split()], np.int32)
        np.testing.assert_array_equal(batch.sequence(b), expected)
        (alone,) = record_prefill(model, recording, [TokenRequest("", "", expected)])
        rows = slice(batch.starts_B1[b], batch.starts_B1[b + 1])
        np.testing.assert_array_equal(np.sort(batch.expert_ids_TLK[rows]), np.sort(alone.expert_ids_TLK))


def test_embedding_reference_leads_to_the_matrix(model_folder, prompts, tmp_path):
    from safetensors.numpy import load_file

    run(model_folder, "--data", prompts, "--max-requests", 2, "-o", tmp_path / "t")
    info = RoutingTrace.open(tmp_path / "t").info
    place = info.embedding
    stored = load_file(Path(place["checkpoint"]) / place["file"])[place["key"]]
    assert list(stored.shape) == place["shape"] == [VOCAB_SIZE, 32]
    expected = tiny_model("qwen3_moe").get_input_embeddings().weight.detach().numpy()
    np.testing.assert_array_equal(stored, expected)


def test_limits_choose_the_first_requests(model_folder, prompts, tmp_path):
    done = run(model_folder, "--data", prompts, "--max-requests", 5, "--max-length", 4, "-o", tmp_path / "a")
    assert "3 cut to --max-length" in done.stderr  # 3 and 4 tokens fit; what was only read ahead does not count
    batch = RoutingTrace.open(tmp_path / "a").load()
    assert sorted(batch.request_ids) == [f"p{i}" for i in range(5)]
    assert np.diff(batch.starts_B1).max() == 4
    run(model_folder, "--data", prompts, "--max-tokens", 30, "-o", tmp_path / "b")
    trace = RoutingTrace.open(tmp_path / "b")
    assert sorted(trace.load().request_ids) == [
        f"p{i}" for i in range(5)
    ]  # 3 + 4 + 5 + 6 + 7 tokens, 8 more would pass 30
    assert trace.num_tokens == 25


def test_generation_records_decode_rows_and_is_reproducible(model_folder, prompts, tmp_path):
    options = ("--data", prompts, "--generate", 6, "--temperature", 1.0, "--seed", 3, "--max-requests", 8)
    run(model_folder, *options, "-o", tmp_path / "a")
    run(model_folder, *options, "--batch-tokens", 24, "-o", tmp_path / "b")
    one, two = (RoutingTrace.open(tmp_path / name).load() for name in "ab")
    order = [two.request_ids.index(r) for r in one.request_ids]
    for b, other in enumerate(order):
        np.testing.assert_array_equal(one.sequence(b), two.sequence(other))  # not a matter of the batch
        length = one.starts_B1[b + 1] - one.starts_B1[b]
        assert length == len(one.sequence(b)) - 1  # the last token was never read
    assert one.is_prompt_T.sum() == one.num_prompt_tokens_B.sum() < one.num_tokens
    run(model_folder, *options[:-4], "--seed", 4, "--max-requests", 8, "-o", tmp_path / "c")
    three = RoutingTrace.open(tmp_path / "c").load()
    assert any(
        not np.array_equal(one.sequence(b), three.sequence(three.request_ids.index(r)))
        for b, r in enumerate(one.request_ids)
    )


def test_generation_ends_at_the_end_token(model_folder):
    model = tiny_model("qwen3_moe")
    recording = start_recording(model, "m")
    request = TokenRequest("r", "", np.array([5, 9, 23, 40], np.int32))
    (free,) = record_generation(model, recording, [request], 8)
    end = int(free.token_ids[6])
    model.generation_config.eos_token_id = end
    longer = TokenRequest("s", "", np.array([5, 9, 23, 40, 41, 60, 7], np.int32))
    (ended, _) = record_generation(model, recording, [request, longer], 8)
    first = 4 + list(free.token_ids[4:]).index(end)
    np.testing.assert_array_equal(ended.token_ids, free.token_ids[: first + 1])
    assert len(ended.expert_ids_TLK) == first


def test_sampling_follows_the_softmax():
    from semmoe.profiles.capture.hooks import Sampler

    logits = torch.tensor([1.0, 0.0, -1.0])
    requests = [TokenRequest(str(i), "", np.zeros(1, np.int32)) for i in range(6000)]
    drawn = Sampler(requests, 0.5, 0, torch.device("cpu"))(None, logits.expand(6000, 3).clone()).argmax(-1)
    share = torch.bincount(drawn, minlength=3) / 6000
    torch.testing.assert_close(share, torch.softmax(logits / 0.5, 0), atol=0.02, rtol=0)


def test_weights_are_recorded_on_request(model_folder):
    model = tiny_model("qwen3_moe")
    request = TokenRequest("r", "", np.array([5, 9, 23, 40], np.int32))
    (recorded,) = record_prefill(model, start_recording(model, "m", weights=True), [request])
    assert recorded.expert_weights_TLK.dtype == np.float16
    with torch.inference_mode():
        logits = model(torch.from_numpy(request.token_ids)[None].long(), output_router_logits=True).router_logits
    for i, layer in enumerate(logits):  # this family does not renormalise the top-k
        probability_TE = torch.softmax(layer.float(), -1)
        expected = probability_TE.gather(1, torch.from_numpy(recorded.expert_ids_TLK[:, i].astype(np.int64)))
        np.testing.assert_allclose(recorded.expert_weights_TLK[:, i], expected, atol=1e-3)


def test_weights_reach_the_trace(model_folder, prompts, tmp_path):
    import pyarrow.parquet as pq

    run(model_folder, "--data", prompts, "--record-weights", "--max-requests", 3, "-o", tmp_path / "t")
    (part,) = (tmp_path / "t").glob("*.parquet")
    table = pq.read_table(part)
    assert table.column("expert_weights").type.value_type == "halffloat"
    lengths = [len(row) for row in table.column("expert_weights").to_pylist()]
    assert lengths == [len(row) for row in table.column("expert_ids").to_pylist()]


def test_batches_keep_every_request_under_the_budget():
    lengths = np.random.default_rng(0).integers(1, 60, 500)
    requests = [TokenRequest(str(i), "", np.zeros(n, np.int32)) for i, n in enumerate(lengths)]
    batches = list(length_batches(iter(requests), 128, extra_tokens=4))
    assert sorted(int(r.request_id) for b in batches for r in b) == list(range(500))
    for batch in batches:
        assert len(batch) == 1 or max(len(r.token_ids) + 4 for r in batch) * len(batch) <= 128
    padded = sum(max(len(r.token_ids) for r in b) * len(b) for b in batches)
    assert padded < 1.05 * lengths.sum()


def records(path) -> list:
    return list(read_requests(open_source(str(path))))


def test_sources_of_every_kind_hold_the_same_texts(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"id": "a", "text": "w1 w2"}, {"id": "b", "text": "w3, \u00e9"}]
    write_lines(tmp_path / "x.jsonl", rows)
    (tmp_path / "x.json").write_text(json.dumps(rows))
    (tmp_path / "y.json").write_text(json.dumps({"data": rows}))
    (tmp_path / "x.csv").write_text('id,text\na,w1 w2\nb,"w3, \u00e9"\n', encoding="utf-8-sig")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress((tmp_path / "x.jsonl").read_bytes()))
    for name in ("x.jsonl", "x.json", "y.json", "x.csv", "x.parquet", "x.jsonl.gz"):
        assert [(r.request_id, r.text) for r in records(tmp_path / name)] == [("a", "w1 w2"), ("b", "w3, \u00e9")], name
    (tmp_path / "x.txt").write_text("w1 w2\n\nw3, \u00e9\n", encoding="utf-8")
    assert [(r.request_id, r.text) for r in records(tmp_path / "x.txt")] == [
        ("x.txt:1", "w1 w2"),
        ("x.txt:3", "w3, \u00e9"),
    ]


def test_directories_give_file_names_as_domains_and_repeated_ids_stay_apart(tmp_path):
    write_lines(tmp_path / "law.jsonl", [{"id": 1, "text": "w1"}, {"id": 1, "text": "w2"}])
    (tmp_path / "sub").mkdir()
    write_lines(tmp_path / "sub" / "code.jsonl", [{"id": 1, "text": "w3"}])
    found = records(tmp_path)
    assert [r.domain for r in found] == ["law", "law", "code"]
    assert len({r.request_id for r in found}) == 3 and found[0].request_id == "1"


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"prompt": "w1"}, "w1"),
        ({"question": "w1", "choices": ["w2", "w3"], "subject": "law"}, "w1\nA. w2\nB. w3\nAnswer:"),
        ({"question": "w1", "choices": {"text": ["w2"], "label": ["A"]}}, "w1\nA. w2\nAnswer:"),
    ],
)
def test_common_text_shapes_are_found(tmp_path, row, text):
    (request,) = records(write_lines(tmp_path / "x.jsonl", [row]))
    assert request.text == text and request.domain == row.get("subject", "")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]},
        {"conversations": [{"from": "human", "value": "w1"}, {"from": "gpt", "value": "w2"}]},
        {
            "prompt": [
                {"role": "user", "content": [{"type": "text", "text": "w1"}]},
                {"role": "assistant", "content": "w2"},
            ]
        },
    ],
)
def test_chats_go_through_the_template(tmp_path, model_folder, row):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    (request,) = records(write_lines(tmp_path / "x.jsonl", [row]))
    (whole,) = encode_requests([request], tokenizer)
    np.testing.assert_array_equal(whole, [0, 4, 0, 5])  # user w1 assistant w2
    (open_end,) = encode_requests([request], tokenizer, answer=True)
    np.testing.assert_array_equal(open_end, [0, 4])  # the reply is the model's to write


def test_standard_input_is_json_lines_or_plain_text(model_folder, tmp_path, monkeypatch):
    for content, ids in (
        (b'{"text": "w1"}\n{"text": "w2"}\n', ["stdin:1", "stdin:2"]),
        (b"\nw1 w2\nw3\n", ["stdin:1", "stdin:2"]),
    ):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        assert [r.request_id for r in read_requests(open_source("-"))] == ids


def test_data_sets_are_streamed(tmp_path):
    write_lines(tmp_path / "train.jsonl", [{"text": "w1"}, {"text": "w2"}])
    found = list(read_requests(open_dataset(str(tmp_path))))
    assert [(r.request_id, r.text) for r in found] == [("train:0", "w1"), ("train:1", "w2")]
    with pytest.raises(InputError, match="nowhere"):
        open_dataset(str(tmp_path / "nowhere"))


def test_bad_input_is_refused_in_one_line(model_folder, prompts, tmp_path):
    out = tmp_path / "t"
    dense = tmp_path / "dense"
    from transformers import LlamaConfig, LlamaForCausalLM

    small = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=VOCAB_SIZE
    )
    LlamaForCausalLM(LlamaConfig(**small)).save_pretrained(dense)
    save_tokenizer(dense)
    line = refused(dense, "--data", prompts, "-o", out)
    assert "'llama' is dense" in line
    assert "no field 'body'; it has id, domain, text" in refused(
        model_folder, "--data", prompts, "--text-field", "body", "-o", out
    )
    tiny_model("qwen3_moe").save_pretrained(tmp_path / "mute")
    assert "has no tokenizer" in refused(tmp_path / "mute", "--data", prompts, "-o", out)
    empty = write_lines(tmp_path / "empty.jsonl", [])
    assert "no request" in refused(model_folder, "--data", empty, "-o", out)
    blank = write_lines(tmp_path / "blank.jsonl", [{"text": "  "}])
    assert "no request with text" in refused(model_folder, "--data", blank, "-o", tmp_path / "blank")
    later = write_lines(tmp_path / "later.jsonl", [{"text": "w1"}, {"other": "w1"}])
    assert "later.jsonl:2 has no field 'text'" in refused(model_folder, "--data", later, "-o", tmp_path / "later")
    chat = write_lines(tmp_path / "chat.jsonl", [{"messages": [{"role": "user", "content": "w1"}]}])
    save_tokenizer(tmp_path / "bare")
    for file in model_folder.iterdir():
        if not file.name.startswith(("token", "chat")):
            (tmp_path / "bare" / file.name).write_bytes(file.read_bytes())
    assert "no chat template" in refused(tmp_path / "bare", "--data", chat, "-o", out)
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(b'{"text": "w1"}\n{"text": "caf\xe9"}\n')
    assert "line 2: not UTF-8 (byte 0xe9 at column 14)" in refused(
        model_folder, "--data", latin, "-o", tmp_path / "latin"
    )
    torn = write_lines(tmp_path / "torn.jsonl", [{"text": "w1"}, {"text": "cut \ud83d"}])
    assert r"line 2: not JSON (\ud83d is half" in refused(model_folder, "--data", torn, "-o", tmp_path / "torn")
    (tmp_path / "torn.json").write_text('[{"text": "w1"},\n {"text": "cut \\ud83d"}]')
    assert r"not JSON (\ud83d is" in refused(model_folder, "--data", tmp_path / "torn.json", "-o", out)
    assert "neither a file nor a directory" in refused(model_folder, "--data", tmp_path / "none.jsonl", "-o", out)
    assert "does not exist: expected a checkpoint directory" in refused(
        tmp_path / "nomodel", "--data", prompts, "-o", out
    )
    assert "expected auto, cpu, cuda" in refused(model_folder, "--data", prompts, "--device", "tpu", "-o", out)
    if not torch.cuda.is_available():
        assert "0 usable CUDA devices" in refused(model_folder, "--data", prompts, "--device", "cuda", "-o", out)
    assert "128 positions" in refused(model_folder, "--data", prompts, "--generate", 128, "-o", out)
    assert not out.exists()


def test_checkpoint_without_a_tensor_is_refused(model_folder, prompts, tmp_path):
    from safetensors.numpy import load_file, save_file

    broken = tmp_path / "broken"
    broken.mkdir()
    for file in model_folder.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.1.mlp.gate.weight"]
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    assert "lacks 1 tensors" in refused(broken, "--data", prompts, "-o", tmp_path / "t")


def test_existing_traces_are_kept_and_long_texts_lose_nothing(model_folder, tmp_path):
    rows = [{"id": f"p{i}", "text": words(5, i)} for i in range(200)] + [{"id": "long", "text": words(300)}]
    data = write_lines(tmp_path / "x.jsonl", rows)
    out = tmp_path / "t"
    options = ("--batch-tokens", 20)
    assert "request long has 300 tokens, the model reads 128: cut texts with --max-length" in refused(
        model_folder, "--data", data, *options, "-o", out
    )
    with pytest.raises(InputError, match="unfinished trace"):
        RoutingTrace.open(out)
    done = run(model_folder, "--data", data, *options, "--max-length", 100, "--resume", "-o", out)
    trace = RoutingTrace.open(out)
    assert sorted(trace.load().request_ids) == sorted(r["id"] for r in rows)
    assert "were there already" in done.stderr and "1 cut to --max-length" in done.stderr
    before = trace.fingerprint
    assert "there already" in refused(model_folder, "--data", data, "-o", out)
    assert RoutingTrace.open(out).fingerprint == before


def test_full_disk_is_one_line_and_the_trace_goes_on_elsewhere(model_folder, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small tmpfs needs the right to mount")
    rng = np.random.default_rng(0)
    rows = [{"id": str(i), "text": " ".join(WORDS[w] for w in rng.integers(0, len(WORDS), 100))} for i in range(400)]
    data = write_lines(tmp_path / "x.jsonl", rows)
    try:
        assert "No space left" in refused(model_folder, "--data", data, "-o", disk / "t")
        assert not list((disk / "t").glob(".*parquet*"))
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        run(model_folder, "--data", data, "--resume", "-o", disk / "t")
        assert RoutingTrace.open(disk / "t").num_requests == 400
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def slow_process(model_folder, data, out, *options) -> subprocess.Popen:
    """The command in its own process, with parts flushed after every batch."""
    code = (
        "import faulthandler, semmoe.profiles.capture.run, semmoe.main; semmoe.profiles.capture.run.FLUSH_SECONDS = 0;"
        "faulthandler.dump_traceback_later(200); semmoe.main.main()"  # a process that hangs tells where
    )
    arguments = [
        sys.executable,
        "-c",
        code,
        "trace",
        str(model_folder),
        "--data",
        str(data),
        "-o",
        str(out),
        *map(str, options),
    ]
    return subprocess.Popen(arguments, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)


def wait_for_parts(out: Path, count: int, process: subprocess.Popen) -> None:
    limit = time.monotonic() + 240
    while len(list(out.glob("*.parquet"))) < count:
        assert process.poll() is None and time.monotonic() < limit
        time.sleep(0.02)


@pytest.fixture
def many(tmp_path) -> Path:
    return write_lines(tmp_path / "many.jsonl", [{"id": f"p{i}", "text": words(20 + i % 7, i)} for i in range(2000)])


def test_kill_loses_one_part_and_resume_repeats_nothing(model_folder, many, tmp_path):
    out = tmp_path / "t"
    process = slow_process(model_folder, many, out, "--batch-tokens", 40)
    wait_for_parts(out, 5, process)
    process.kill()
    process.wait()
    kept = sum(1 for _ in out.glob("*.parquet"))
    with pytest.raises(InputError, match="unfinished"):
        RoutingTrace.open(out)
    done = run(model_folder, "--data", many, "--resume", "-o", out)
    batch = RoutingTrace.open(out).load()
    assert sorted(batch.request_ids) == sorted(f"p{i}" for i in range(2000))
    assert kept >= 5 and f"({kept} were there already)" in done.stderr  # every batch was one request
    run(model_folder, "--data", many, "-o", tmp_path / "whole")
    whole = RoutingTrace.open(tmp_path / "whole").load()
    for b in (0, 700, 1999):
        other = whole.request_ids.index(batch.request_ids[b])
        one, two = (
            np.sort(t.expert_ids_TLK[t.starts_B1[i] : t.starts_B1[i + 1]]) for t, i in ((batch, b), (whole, other))
        )
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_ends_with_a_finished_trace(model_folder, many, tmp_path, stop):
    out = tmp_path / "t"
    process = slow_process(model_folder, many, out, "--batch-tokens", 40)
    wait_for_parts(out, 3, process)
    process.send_signal(stop)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 130 and "interrupted: wrote" in errors and "Traceback" not in errors
    trace = RoutingTrace.open(out)
    assert 3 <= trace.num_requests < 2000 and trace.info.notes["interrupted"] is True
    run(model_folder, "--data", many, "--resume", "-o", out)
    trace = RoutingTrace.open(out)
    assert sorted(trace.load().request_ids) == sorted(f"p{i}" for i in range(2000))
    assert trace.info.notes == {}


def test_interrupt_waits_for_the_next_router_only(model_folder):
    """A signal in a pass is held until a router is called, which raises; what was recorded
    before stays whole."""
    from semmoe.profiles.capture.loading import find_model, load_model
    from semmoe.profiles.capture.run import TraceProgress, interruptible

    model = load_model(find_model(str(model_folder)), dtype="float32", device=torch.device("cpu"))
    recording = start_recording(model, "m")
    request = TokenRequest("a", "", np.arange(4, dtype=np.int32))
    passes = (record_prefill, partial(record_generation, num_tokens=2))
    after: list[str] = []
    first, second = (layer.module for layer in recording.layers[:2])
    handles = [
        first.register_forward_pre_hook(lambda *_: (signal.raise_signal(signal.SIGINT), after.append("held"))),
        second.register_forward_hook(lambda *_: after.append("second")),
    ]
    for record in passes:
        progress = TraceProgress()
        with pytest.raises(KeyboardInterrupt), interruptible(progress) as (hold, check), hold():
            record(model, recording, [request], check=check)
        assert after == ["held"] and progress.interrupted
        after.clear()
    for handle in handles:
        handle.remove()
    for record in passes:
        with interruptible(TraceProgress()) as (hold, check), hold():
            (recorded,) = record(model, recording, [request], check=check)
        assert len(recorded.expert_ids_TLK) >= 4


def test_ranks_share_the_requests_of_one_trace(model_folder, prompts, tmp_path):
    out = tmp_path / "t"
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "semmoe",
        "trace",
    ]
    subprocess.run(
        [*launch, str(model_folder), "--data", str(prompts), "-o", str(out)],
        check=True,
        cwd=ROOT,
        env=environment(),
        timeout=240,
    )
    assert {p.name.split("-")[0] for p in out.glob("*.parquet")} == {"rank0", "rank1"}
    together = RoutingTrace.open(out)
    assert sorted(together.load().request_ids) == sorted(f"p{i}" for i in range(24))
    run(model_folder, "--data", prompts, "-o", tmp_path / "one")
    assert together.num_tokens == RoutingTrace.open(tmp_path / "one").num_tokens


def test_hash_layers_are_copied_exactly_and_recorded_alike(prompts, tmp_path):
    from safetensors import safe_open

    model = tiny_model("deepseek_v4")
    model.save_pretrained(tmp_path / "v4")
    save_tokenizer(tmp_path / "v4")
    run(tmp_path / "v4", "--hash-layers", "-o", tmp_path / "hash.safetensors")
    run(tmp_path / "v4", "--data", prompts, "-o", tmp_path / "t")
    batch = RoutingTrace.open(tmp_path / "t").load()
    with safe_open(str(tmp_path / "hash.safetensors"), framework="numpy") as tables:
        assert tables.metadata()["format"] == HASH_FORMAT and json.loads(tables.metadata()["model_layers"]) == [0]
        table_VK = tables.get_tensor("layer.0")
    np.testing.assert_array_equal(table_VK, model.model.layers[0].mlp.gate.tid2eid.numpy())
    np.testing.assert_array_equal(np.sort(batch.expert_ids_TLK[:, 0]), np.sort(table_VK[batch.token_ids_T]))
    assert "no layer of the checkpoint is routed by a hash table" in refused(
        "demo", "--hash-layers", "-o", tmp_path / "h"
    )


def test_choices_of_the_command_are_those_of_the_modules():
    from semmoe.profiles.capture.loading import DTYPES
    from semmoe.profiles.engines.imports import KINDS, REPETITION

    assert [k.value for k in TraceKind] == list(KINDS)
    assert {r.value for r in Repetition} == set(REPETITION)
    assert tuple(d.value for d in Dtype) == DTYPES
