"""Processes that are killed outright (SIGKILL): in the middle of a save, and in the middle of training.

    python tests/benchmarks/bench_kills.py [--saves 40] [--ranks 3]

Saves: a process writes one checkpoint after another into one folder, every tensor of the n-th filled with n, and is
killed at a random moment. Afterwards the folder must load, with one n in all tensors of model and optimizer, and that
the n of the last save that had ended or of the one under way. Ranks: four processes train, started as by mpirun or
Slurm, and then by torchrun; one is killed. A line each: how long the others took to end, and what they said last.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import autopar

NUM_RANKS = 4
PORT = 29_533
LIMIT_S = 120.0


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        num_hidden_layers=2, hidden_size=128, intermediate_size=256, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=512, max_position_embeddings=32, use_cache=False,
    ))


def make_batch() -> dict[str, Tensor]:
    tokens = torch.randint(0, 512, (8, 32), generator=torch.Generator().manual_seed(1))
    return {"input_ids": tokens, "labels": tokens}


def make_trainer() -> Any:
    return autopar.parallelize(
        make_model(), make_batch(), optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3), timeout_s=60.0
    )


# -- in the middle of a save


def floats(trainer: Any) -> list[Tensor]:
    """Every tensor of numbers of the trainer's state that a save keeps."""
    state = [value for own in trainer.optimizer.state.values() for value in own.values() if isinstance(value, Tensor)]
    return [*trainer.named_parameters().values(), *(value for value in state if value.dim())]


def save_for_ever(trainer: Any, folder: Path, number: int, ended: Any) -> None:
    while True:
        number += 1
        with torch.no_grad():
            for value in floats(trainer):
                value.fill_(number)
        trainer.save(folder)
        ended.value = number


def kill_saves(count: int) -> None:
    torch.set_num_threads(1)
    trainer = make_trainer()
    trainer.step(make_batch())  # so that the optimizer has its state
    forked = multiprocessing.get_context("fork")
    draw, wrong, seen_new, took = random.Random(0), [], 0, []
    with tempfile.TemporaryDirectory() as place:
        folder, number = Path(place) / "state", 0
        for _ in range(count):
            ended = forked.Value("l", number)
            child = forked.Process(target=save_for_ever, args=(trainer, folder, number, ended))
            child.start()
            began = time.monotonic()
            while ended.value == number:  # the first save of all has none before it
                time.sleep(0.001)
            took.append(time.monotonic() - began)
            time.sleep(draw.uniform(0.0, 2.0) * took[-1])
            child.kill()
            child.join()
            last = ended.value
            trainer.load(folder)
            values = {float(number) for value in floats(trainer) for number in value.detach().unique()}
            if len(values) != 1 or not values <= {float(last), float(last + 1)}:
                wrong.append((last, sorted(values)[:5]))
            seen_new += values == {float(last + 1)}
            number = int(max(values))
        left = sorted(path.name for path in Path(place).iterdir())
    print(f"saves: killed {count} times, a save takes {median(took) * 1e3:.0f} ms; {count - len(wrong)} loaded whole, "
          f"{seen_new} of them the save under way, whose files were all there; wrong: {wrong or 'none'}; files left "
          f"beside the checkpoint: {[name for name in left if name != 'state'] or 'none'}", flush=True)
    if wrong:
        raise SystemExit(1)


# -- in the middle of training


def train_for_ever() -> None:
    torch.set_num_threads(1)
    trainer, batch = make_trainer(), make_batch()
    for step in range(10**6):
        trainer.step(batch)
        print(f"rank {os.environ['RANK']} process {os.getpid()} step {step}", flush=True)


def kill_a_rank(victim: int, *, torchrun: bool) -> None:
    script = [str(Path(__file__)), "--worker"]
    with tempfile.TemporaryDirectory() as place:
        log = Path(place) / "log"
        with log.open("wb") as out:
            if torchrun:
                started = [subprocess.Popen(
                    [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--nproc-per-node", str(NUM_RANKS),
                     "--master-port", str(PORT), *script], stdout=out, stderr=subprocess.STDOUT)]
            else:
                started = [subprocess.Popen(
                    [sys.executable, "-W", "ignore", *script], stdout=out, stderr=subprocess.STDOUT,
                    env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(NUM_RANKS),
                         "LOCAL_WORLD_SIZE": str(NUM_RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(PORT)},
                ) for rank in range(NUM_RANKS)]
        try:
            pid = wait_for(log, rf"rank {victim} process (\d+) step 3\n", started)
            os.kill(int(pid), signal.SIGKILL)
            began = time.monotonic()
            while any(process.poll() is None for process in started):
                if time.monotonic() - began > LIMIT_S:
                    raise SystemExit(f"rank {victim} was killed, and the others did not end within {LIMIT_S:.0f} s")
                time.sleep(0.05)
            took = time.monotonic() - began
        finally:
            for process in started:
                if process.poll() is None:
                    process.kill()
                process.wait()
        text = log.read_text(errors="replace")
        said = sorted(set(re.findall(r"autopar\.errors\.RankFailedError: .*", text)))
        how = "torchrun" if torchrun else "processes"
        statuses = [process.returncode for process in started]
        print(f"{how}: rank {victim} killed; all ended after {took:.1f} s with statuses {statuses}", flush=True)
        for line in said or re.findall(r" *(?:rank|exitcode) *: .*", text)[-2:]:
            print(f"    {line.strip()}", flush=True)
        if torchrun:
            return
        if any(f"rank {victim} died" not in line and "with it most likely rank 0" not in line for line in said):
            raise SystemExit("a rank that was alive was named")
        if len(said) < NUM_RANKS - 1 or 0 in statuses:
            raise SystemExit("a rank ended without saying why")


def wait_for(log: Path, pattern: str, started: list[subprocess.Popen[bytes]]) -> str:
    """The first group of the pattern, once it is in the log."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline and all(process.poll() is None for process in started):
        found = re.search(pattern, log.read_text(errors="replace"))
        if found is not None:
            return found.group(1)
        time.sleep(0.05)
    raise SystemExit(f"training did not begin:\n{log.read_text(errors='replace')[-2000:]}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--saves", type=int, default=40)
    parser.add_argument("--ranks", type=int, default=3, help="how many kills of ranks without torchrun; then one with")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        train_for_ever()
        return
    if options.saves:
        kill_saves(options.saves)
    for kill in range(options.ranks):
        kill_a_rank((NUM_RANKS - 1, 1, 0)[kill % 3], torchrun=False)
    if options.ranks:
        kill_a_rank(2, torchrun=True)


if __name__ == "__main__":
    main()
