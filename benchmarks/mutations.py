"""Read damaged files of every kind, and count how that ends: success, a sentence, or what must not be.

    python benchmarks/mutations.py [--seed 0] [--count 1000] [--reader NAME]

Each is read in a process of its own, which may take 30 s and 2 GB, and start no other; what must not be is printed.
"""

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from mutations import READERS, campaign


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--reader", help="a part of the name of the only readers that are tried")
    given = parser.parse_args()
    readers = [reader for reader in READERS if not given.reader or given.reader in reader.name]
    ends: Counter[tuple[str, str]] = Counter()
    longest, largest = 0.0, 0
    with tempfile.TemporaryDirectory() as folder:
        for reader, number, how, found in campaign(Path(folder), given.seed, given.count, readers):
            ends[reader.name, found.verdict if found.is_right else "wrong"] += 1
            longest, largest = max(longest, found.seconds), max(largest, found.bytes)
            if not found.is_right:
                print(f"--- {reader.name}, mutation {number}, {how}: {found.verdict}\n{found.said}\n", flush=True)
    print(f"{'reader':40} success sentence wrong")
    for reader in readers:
        print(
            f"{reader.name:40} " + " ".join(f"{ends[reader.name, end]:7}" for end in ("success", "sentence", "wrong"))
        )
    wrong = sum(count for (_, end), count in ends.items() if end == "wrong")
    print(f"{given.count} mutations, {wrong} wrong; {longest:.1f} s and {largest / 2**30:.2f} GB at most")
    raise SystemExit(wrong > 0)


if __name__ == "__main__":
    main()
