"""Several processes at one adapter folder: two that save at once, and one that reads while another one saves.

python tests/saving_together.py --rounds 400 --reads 30000
"""

import argparse
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path

import torch
from models import Tower

import unilora_ext as ul

CONTEXT = multiprocessing.get_context("spawn")
PATIENCE = 120
"""Seconds that a process waits for the others."""


def _adapted():
    model = Tower()
    config = ul.UniLoRAConfig(r=8, d=900, target_modules=["up", "down"], modules_to_save=["head"])
    return model, ul.attach(model, config)


def _save(model, adapter, folder, value):
    with torch.no_grad():
        adapter.theta_d.fill_(value)
        model.head.bias.fill_(value)
    adapter.save(folder, {"value": value})


def _value(folder):
    """Of the adapter in a folder, all of whose parts must be of one save."""
    file = ul.read(folder)
    value = file.metadata["value"]
    assert (file.theta_d == value).all() and (file.modules_to_save["head.bias"] == value).all(), value
    return value


def _saver(folder, rounds, own, start, done, errors):
    torch.set_num_threads(1)
    model, adapter = _adapted()
    for number in range(rounds):
        start.wait(PATIENCE)
        try:
            _save(model, adapter, folder, 2 * number + own)
        except (OSError, ul.UniLoRAError) as error:
            errors.put(f"round {number}: a save: {type(error).__name__}: {error}")
        done.wait(PATIENCE)


def two_savers(folder, rounds):
    """Failures of `rounds` rounds: in each, two processes save at the same moment, then the folder is read."""
    start, done, errors = CONTEXT.Barrier(3), CONTEXT.Barrier(3), CONTEXT.Queue()
    processes = [CONTEXT.Process(target=_saver, args=(folder, rounds, own, start, done, errors)) for own in (0, 1)]
    for process in processes:
        process.start()
    failures = []
    try:
        for number in range(rounds):
            start.wait(PATIENCE)
            done.wait(PATIENCE)
            try:
                assert _value(folder) // 2 == number
                assert len(list(folder.iterdir())) == 3
            except (ul.UniLoRAError, AssertionError) as error:
                failures.append(f"round {number}: {type(error).__name__}: {error}")
            while not errors.empty():
                failures.append(errors.get())
    finally:
        _end(processes)
    return failures


def _save_until(folder, value, begun, stop):
    """Saves on and on, three adapters in turn: their files come and go under the same names."""
    torch.set_num_threads(1)
    model, adapter = _adapted()
    while not stop.is_set():
        value.value += 1
        _save(model, adapter, folder, value.value % 3)
        begun.set()


def reads_beside_a_saver(folder, reads):
    """(failures of `reads` reads, saves done meanwhile)"""
    begun, stop, value = CONTEXT.Event(), CONTEXT.Event(), CONTEXT.Value("l", 0)
    process = CONTEXT.Process(target=_save_until, args=(folder, value, begun, stop))
    process.start()
    failures = []
    try:
        assert begun.wait(PATIENCE)
        before = value.value
        for number in range(reads):
            try:
                _value(folder)
            except (ul.UniLoRAError, AssertionError) as error:
                failures.append(f"read {number}: {type(error).__name__}: {error}")
        saves = value.value - before
    finally:
        stop.set()
        _end([process])
    return failures, saves


def _end(processes):
    for process in processes:
        process.join(10)
        process.kill()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--reads", type=int, default=30_000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        together = two_savers(Path(folder) / "two", arguments.rounds)
        seconds = time.perf_counter() - started
        print(f"{len(together)} failures in {arguments.rounds} rounds of two savers ({seconds:.0f} s)")
        started = time.perf_counter()
        beside, saves = reads_beside_a_saver(Path(folder) / "one", arguments.reads)
        seconds = time.perf_counter() - started
        print(f"{len(beside)} failures in {arguments.reads} reads beside {saves} saves ({seconds:.0f} s)")
    for failure in [*together[:10], *beside[:10]]:
        print(failure)
    sys.exit(bool(together or beside))


if __name__ == "__main__":
    main()
