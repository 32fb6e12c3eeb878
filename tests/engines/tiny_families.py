#!/usr/bin/env python3
"""tiny_families.py FOLDER FAMILY...: a tiny model of each family as FOLDER/FAMILY/source, a random
placement of its experts as FOLDER/FAMILY/p, another one as p2, with the delta that leads there from
p where single experts may move, and a step from p2 as p3. Needs the test extra, no engine."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from random_plans import random_plan
from stepped_plans import save_stepped
from tiny_models import tiny_model

# Sizes that the CPU kernels of vLLM take: heads of 32 (some families: hidden size / heads).
SIZES = {
    "hidden_size": 128,
    "head_dim": 32,
    "moe_intermediate_size": 32,
    "intermediate_size": 64,
    "shared_expert_intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "v_head_dim": 32,
}


# What published checkpoints say and Transformers does not ask for, or leaves out where it is the
# default: vLLM has DeepSeek-V3's bias of the router only with it, and reads GLM's head size there.
SAID = {"deepseek_v3": {"topk_method": "noaux_tc"}, "glm4_moe": {"head_dim": 32}}


def write(folder: Path, family: str) -> None:
    import tiny_models

    tiny_models.SMALL.update(SIZES)
    folder.mkdir(parents=True, exist_ok=True)
    model = tiny_model(family)
    model.save_pretrained(folder / "source")
    config = json.loads((folder / "source" / "config.json").read_text())
    (folder / "source" / "config.json").write_text(
        json.dumps(config | SAID.get(family, {}) | {"torch_dtype": "float32"}, indent=2)
    )
    plan = random_plan(folder / "source")
    plan.save(folder / "p")
    if plan.model.n_group > 1:  # moves of single experts would split the groups
        after = random_plan(folder / "source", seed=1)
        after.save(folder / "p2")
    else:
        after, _ = save_stepped(plan, folder / "p2", swaps=1)
    save_stepped(after, folder / "p3", swaps=1)


if __name__ == "__main__":
    for name in sys.argv[2:]:
        write(Path(sys.argv[1]) / name, name)
        print(name)
