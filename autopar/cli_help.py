"""The examples that --help of each command ends with; the tests parse every one of them."""

from __future__ import annotations

EXAMPLES: dict[str, tuple[str, ...]] = {
    "demo": ("autopar demo", "autopar demo -o somewhere --json"),
    "plan": (
        "autopar plan llama-3.1-8b --cluster 4x8xH100-80GB --global-batch 512 --seq-len 8192 -o plan.json",
        "autopar plan model.py:factory --cluster local:4 --global-batch 16 --dtype fp32 --profile profile.json",
        "autopar plan gpt2 --cluster 2x4xA100-80GB --global-batch 64 --mesh pp=2,tp=2 --explain transformer.h.0",
        "autopar plan gpt2-xl --cluster lab.yaml --global-batch 256 --objective cost --deadline-hours 72 --tokens 3e10",
    ),
    "simulate": (
        "autopar simulate llama-3.1-8b --cluster 4x8xH100-80GB --global-batch 512 --plan plan.json --trace trace.json",
        "autopar simulate gpt2-xl --cluster 8xA100-80GB --global-batch 64 --tp 2 --pp 2 --dp-shard 2 --zero 1",
        "autopar simulate --requests many.jsonl --json",
    ),
    "sweep": (
        "autopar sweep llama-3.1-8b --cluster 4x8xH100-80GB --global-batch 512,1024 --seq-len 4096,8192 -o sweep.csv",
        "autopar sweep gpt2-xl --cluster 1x8xA100-80GB --nodes 1,2,4,8 --global-batch 256 -o sweep.csv",
        "autopar sweep gpt2-xl --cluster 1x8xA100-80GB --nodes 1,2,4,8 --global-batch 64 --scaling weak -o weak.csv",
    ),
    "show": ("autopar show plan.json", "autopar show --compare old.json new.json"),
    "viz": (
        "autopar viz plan.json -o plan.html", "autopar viz --compare old.json new.json -o compare.html",
        "autopar viz plan.json --live run.json -o plan.html",
    ),
    "verify": (
        "autopar verify plan.json --model gpt2 --seq-len 64",
        "autopar verify plan.json --model model.py:factory --steps 3 --trace run.json",
    ),
    "export": ("autopar export plan.json --to torchtitan -o settings.toml", "autopar export plan.json --to megatron"),
    "profile": (
        "autopar profile all --model gpt2 -o profile.json",
        "autopar profile links --num-processes 4 --merge profile.json -o profile.json",
    ),
    "doctor": ("autopar doctor", "autopar doctor --num-processes 8 --measure"),
    "cluster show": (
        "autopar cluster show 16x8xA100-80GB@800Gbps", "autopar cluster show topo.txt:H100-80GB -o node.json",
        "autopar cluster show auto --json",
    ),
}


def examples(command: str) -> str:
    """What --help of a command says at its end: its examples, each on a line of its own."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in EXAMPLES[command])
