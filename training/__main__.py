"""`python -m training --data DIR --out DIR`: trains the demonstration checkpoint."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch

from training.recipe import Recipe
from training.run import Training


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the sets in BEIR layout")
    parser.add_argument("--out", type=Path, required=True, help="where the checkpoint goes")
    parser.add_argument("--start-from", type=Path, help="checkpoint whose weights to start from")
    parser.add_argument("--compile", action="store_true", help="compile the layers: faster, needs a C++ compiler")
    parser.add_argument("--threads", type=int, help="threads of torch, default all cores")
    parser.add_argument(
        "--first-round", type=int, default=0, help="the round of ranking to start with (with --start-from)"
    )
    parser.add_argument("--share", type=float, default=1.0, help="share of the recipe's steps, to try it out")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("bm25s").setLevel(logging.WARNING)
    if options.threads:
        torch.set_num_threads(options.threads)
    recipe = Recipe() if options.share == 1.0 else Recipe().shortened(options.share)
    Training(options.data, options.out, recipe, options.start_from, options.compile).run(options.first_round)


if __name__ == "__main__":
    main()
