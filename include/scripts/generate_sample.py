#!/usr/bin/env python3
"""Write a synthetic legal corpus and instructions for it, to try the pipeline out."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fastcpt.corpus.sample import generate_sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--output_dir",
        type=Path,
        required=True,
        help="Folder for parsed/ and instructions.jsonl.",
    )
    parser.add_argument("--documents", type=int, default=400, help="Readable documents.")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        generate_sample(arguments.output_dir, arguments.documents, arguments.seed)
    except ValueError as error:
        sys.exit(str(error))
    print(f"{arguments.documents} documents in {arguments.output_dir / 'parsed'}")


if __name__ == "__main__":
    main()
