"""`python -m finetune RECIPE [key=value …]`, which is also what `accelerate launch -m finetune` runs."""

import sys
from collections.abc import Sequence

from resunet.exits import exit_code_of, is_main_rank


def main(arguments: Sequence[str]) -> None:
    """Fine-tune by a recipe; the run directory is the last line on standard output."""
    from finetune.cross_validation.folds import train
    from finetune.recipe import FinetuneRecipe
    from resunet.config import load_recipe, split_arguments

    name, overrides = split_arguments("python -m finetune", arguments)
    run = train(load_recipe(FinetuneRecipe, "finetune", name, overrides))
    if is_main_rank():
        print(run)


if __name__ == "__main__":
    sys.exit(exit_code_of(main, sys.argv[1:]))
