"""Kills a run at random moments with SIGKILL, lets it end, and compares its weights with those of an undisturbed run.

    python tools/kills.py --kills 10 --out runs/kills                     of `kilter demo`
    python tools/kills.py --out runs/kills -- rl --model ... --reward ...  of any command that takes --out

Long; never in CI.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path


def weights(run: Path) -> dict[str, str]:
    """Hash of every weight file of the run: results and snapshots."""
    files = sorted(path for path in run.glob("stages/**/*.safetensors") if "checkpoints" not in path.parts)
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def main() -> int:
    """Exit 0 when it was killed as often as asked for and the weights are equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, default=Path("runs/kills"))
    parser.add_argument("--least", type=float, default=8.0, help="seconds that every life has")
    parser.add_argument("command", nargs="*", default=["demo"], help="words of `kilter`, after --")
    options = parser.parse_args()
    shutil.rmtree(options.out, ignore_errors=True)
    words = [sys.executable, "-m", "kilter.cli", *options.command, "--out"]
    begun = time.monotonic()
    subprocess.run([*words, str(options.out / "whole")], check=True, capture_output=True)
    seconds = time.monotonic() - begun
    print(f"undisturbed: {seconds:.0f} s", flush=True)
    moments = random.Random(options.seed)
    stages = options.out / "killed" / "stages"
    kills = 0
    for number in range(options.kills):
        process = subprocess.Popen([*words, str(options.out / "killed")], stdout=-3, stderr=-3)
        # Long enough to reach the work behind the start, short enough that ten kills meet most stages.
        after = options.least + moments.random() * seconds / options.kills * 2.5
        try:
            process.wait(after)
            print(f"  it ended before kill {number + 1}", flush=True)
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
        kills += 1
        begun = [path.name for path in sorted(stages.glob("*")) if not (path / "done.json").exists()]
        print(f"  kill {kills} after {after:.1f} s; not ended: {', '.join(begun) or 'whatever was begun'}", flush=True)
    subprocess.run([*words, str(options.out / "killed")], check=True, capture_output=True)
    whole, killed = weights(options.out / "whole"), weights(options.out / "killed")
    different = [name for name in whole if killed.get(name) != whole[name]]
    print(f"{kills} kills, {len(whole)} weight files, {len(different)} differ: {different}")
    return 1 if kills < options.kills or different or whole.keys() != killed.keys() else 0


if __name__ == "__main__":
    sys.exit(main())
