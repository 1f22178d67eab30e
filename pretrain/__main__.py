"""`python -m pretrain RECIPE [key=value …]`, which is also what `accelerate launch -m pretrain` runs."""

import sys
from collections.abc import Sequence

from resunet.exits import exit_code_of, is_main_rank


def main(arguments: Sequence[str]) -> None:
    """Pretrain by a recipe; the run directory is the last line on standard output."""
    from pretrain.loop import pretrain
    from pretrain.recipe import PretrainRecipe
    from resunet.config import load_recipe, split_arguments

    name, overrides = split_arguments("python -m pretrain", arguments)
    run = pretrain(load_recipe(PretrainRecipe, "pretrain", name, overrides))
    if is_main_rank():
        print(run)


if __name__ == "__main__":
    sys.exit(exit_code_of(main, sys.argv[1:]))
