"""Loads a model of Transformers and its tokenizer by hub id or directory, refusing what cannot
be traced before weights are read."""

import os
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils.hub import cached_file

from semmoe.profiles.capture.layers import explain_unsupported, find_moe_layers
from semmoe.profiles.config import hub_in_reach, is_hub_id
from semmoe.profiles.embedding import embedding_reference
from semmoe.profiles.errors import InputError, raised_by_us
from semmoe.profiles.numbering import config_folder

LONGEST_REASON = 400  # characters of what Transformers says
DTYPES = ("auto", "bfloat16", "float16", "float32")


@dataclass(frozen=True, eq=False)
class ModelSource:
    """A model before its weights are read: what was asked for, its configuration, and where its
    files lie."""

    name: str  # as the user gave it
    path: str  # hub id or directory
    revision: str | None  # the commit for a hub id
    folder: Path
    config: Any
    trust_remote_code: bool


def find_model(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> ModelSource:
    """Read the configuration of a hub id, a directory, or "demo". Raises InputError where there
    is no model."""
    path = name
    if name == "demo":
        from semmoe.profiles.demo.paths import demo_model_path

        path = str(demo_model_path())
    elif os.path.isdir(name) and not (Path(name) / "config.json").is_file():
        if config_folder(name) != name:
            raise InputError(
                f"{name} is a reshard of layout ranks, whose weights lie apart for every rank: trace the checkpoint that it was "
                f"made from, or put that together again with semmoe reshard --undo"
            )
        raise InputError(f"{name} is not a model: it holds no config.json")
    elif not os.path.isdir(name) and not is_hub_id(name):
        raise InputError(f"{name} does not exist: expected a checkpoint directory, a hub id or demo")
    offline = not os.path.isdir(path) and not hub_in_reach()
    if offline and not isinstance(try_to_load_from_cache(path, "config.json", revision=revision), str):
        raise InputError(f"{name} is no directory here, and the hub cannot be reached to look for it")
    with refusals(f"{name} cannot be read as a model"):
        config = AutoConfig.from_pretrained(
            path, revision=revision, trust_remote_code=trust_remote_code, local_files_only=offline
        )
        if os.path.isdir(path):
            folder, commit = Path(path).resolve(), None
        else:
            folder = Path(str(cached_file(path, "config.json", revision=revision, local_files_only=offline))).parent
            commit = getattr(config, "_commit_hash", None) or revision
    return ModelSource(name, str(folder) if commit is None else path, commit, folder, config, trust_remote_code)


@contextmanager
def refusals(what: str):
    """Turns the errors with which Transformers refuses a model into one line; what our own code
    raises inside stays what it is."""
    try:
        yield
    except InputError:
        raise
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"{what}: out of device memory ({str(error).splitlines()[0]}); try --device-map auto or fewer --batch-tokens"
        ) from None
    except Exception as error:  # of whatever type: tokenizers raises Exception itself, configs a dozen others
        if raised_by_us(error):
            raise
        text = str(error)
        if "trust_remote_code" in text:
            raise InputError(f"{what}: it comes with code of its own; add --trust-remote-code to run that") from None
        lines = [" ".join(line.split()) for line in text.strip().split("\n")]
        reason = " ".join(lines[: 2 if lines[0].endswith(":") else 1]) or type(error).__name__
        raise InputError(
            f"{what}: {reason if len(reason) <= LONGEST_REASON else reason[:LONGEST_REASON] + '...'}"
        ) from None


def load_tokenizer(source: ModelSource) -> Any:
    """The model's tokenizer. Raises InputError where it has none."""
    with refusals(f"{source.name} has no tokenizer that can be read"):
        tokenizer = AutoTokenizer.from_pretrained(
            source.path, revision=source.revision, trust_remote_code=source.trust_remote_code
        )
    # Some families make a tokenizer of special tokens alone where a directory holds no tokenizer
    # files.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise InputError(f"{source.name} has no tokenizer: it knows special tokens only")
    return tokenizer


def model_class(source: ModelSource) -> Any:
    """The class that the checkpoint names, so that a multimodal checkpoint finds its weights;
    else the causal model of its type."""
    for name in getattr(source.config, "architectures", None) or []:
        named = getattr(transformers, name, None)
        if named is not None and getattr(named, "config_class", None) is type(source.config):
            return named
    return AutoModelForCausalLM


def refuse_untraceable(source: ModelSource) -> None:
    """Raise InputError for a model without readable experts, by building it without weights."""
    chosen = model_class(source)
    with refusals(f"{source.name}: model type {source.config.model_type!r} is not supported"):
        with torch.device("meta"):
            if chosen is AutoModelForCausalLM:
                skeleton = chosen.from_config(source.config, trust_remote_code=source.trust_remote_code)
            else:
                skeleton = chosen(source.config)
    if not find_moe_layers(skeleton):
        raise explain_unsupported(skeleton, source.name)


def choose_device(device: str, local_rank: int | None = None) -> torch.device:
    """ "auto", "cpu", "cuda" or "cuda:N" as a device that is there; under torchrun "cuda" is the
    GPU of the local rank."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = torch.device("meta")
    if chosen.type not in ("cpu", "cuda"):
        raise InputError(f"--device {device}: expected auto, cpu, cuda or cuda:N")
    if chosen.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = chosen.index if chosen.index is not None else (local_rank or 0)
        if index >= count:
            raise InputError(f"--device {device}: this machine has {count} usable CUDA devices")
        chosen = torch.device("cuda", index)
    return chosen


def load_model(source: ModelSource, *, dtype: str = "auto", device: torch.device, device_map: str | None = None) -> Any:
    """The model in eval mode, on `device`, or spread over all devices with device_map "auto".

    Raises InputError where it does not fit or the checkpoint lacks weights.
    """
    if dtype not in DTYPES:
        raise InputError(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}")
    if device_map not in (None, "auto"):
        raise InputError(f"--device-map {device_map}: expected auto")
    with refusals(f"{source.name} cannot be loaded"):
        model, loading = model_class(source).from_pretrained(
            source.path,
            revision=source.revision,
            trust_remote_code=source.trust_remote_code,
            dtype="auto" if dtype == "auto" else getattr(torch, dtype),
            device_map=device_map or device,
            output_loading_info=True,
        )
    missing = sorted(loading["missing_keys"])
    if missing:
        raise InputError(
            f"{source.name}: the checkpoint lacks {len(missing)} tensors of the model, {missing[0]} among them"
        )
    return getattr(model, "thinker", model).eval()  # Qwen-Omni: the part that reads text


def find_embedding(source: ModelSource, model: Any) -> dict[str, Any] | None:
    """Where the checkpoint keeps the input embedding of `model`; None where no safetensors file
    holds it."""
    vectors = model.get_input_embeddings().weight
    name = next((n for n, p in model.named_parameters() if p is vectors), "")
    return embedding_reference(source.path, source.folder, source.revision, name, list(vectors.shape))
