"""What importing the package adds to importing torch, and how soon the command answers.

    python scripts/bench/imports.py [--rounds 5]

Goals: below 0.15 s, and below 1 s. Wall-clock seconds of fresh processes, in turns; the median of the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time


def seconds(*command: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    rounds = [
        (
            seconds("-c", "import torch"),
            seconds("-c", "import torch, hf_transfer"),
            seconds("-m", "hf_transfer", "--help"),
        )
        for _ in range(options.rounds)
    ]
    added = statistics.median(both - torch for torch, both, _ in rounds)
    print(f"import hf_transfer adds {added:.3f} s to import torch (goal < 0.15)")
    print(f"hf-transfer --help answers in {statistics.median(each[2] for each in rounds):.2f} s (goal < 1)")


if __name__ == "__main__":
    main()
