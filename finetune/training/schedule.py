"""Learning rates over a run: one rise and fall, and what a transferred encoder may have instead.

What there is for a transferred encoder, each a choice of the recipe, which may be combined:

* `warmup` of the whole network: what pretraining learned is not torn up by the first steps of a fresh decoder. On 3D encoders that
  were pretrained by SimCLR it was the best of the schedules that Wald et al. 2024 compared (arXiv 2412.17041).
* `optimizer.decoder_first`: the encoder stands still at first, then everything trains (linear probing, then fine-tuning: Kumar et
  al. 2022, arXiv 2202.10054). Never to the end: a frozen encoder was by far the worst in the same comparison.
* `optimizer.sawtooth` (the same comparison, and its code, TaWald/nnUNet sawtooth_trainer.py): while the decoder goes first its
  rate rises and falls, half of the steps each; then the whole network's rises over `warmup` of all steps, and falls to the end.
* `optimizer.encoder_lr_factor`: discriminative rates (Howard & Ruder 2018, arXiv 1801.06146, section 3.2), in two groups.
"""

import math

from finetune.recipe import FinetuneRecipe
from resunet.training import learning_rate


def encoder_stands_still(recipe: FinetuneRecipe, step: int, transferred: bool) -> bool:
    """Whether the decoder goes first in this step. An encoder that was not transferred has nothing to keep."""
    return transferred and step < recipe.optimizer.decoder_first * recipe.steps


def rates(recipe: FinetuneRecipe, step: int, transferred: bool) -> tuple[float, float]:
    """The learning rate of a step, and that of the encoder."""
    optimizer = recipe.optimizer
    still = encoder_stands_still(recipe, step, transferred)
    first = math.ceil(optimizer.decoder_first * recipe.steps)  # steps in which it stands still
    if not (transferred and optimizer.sawtooth):
        lr = learning_rate(step, recipe.steps, recipe.warmup, optimizer.lr, optimizer.decay)
    elif still:
        lr = learning_rate(step, first, 0.5, optimizer.lr, optimizer.decay)
    else:
        left = recipe.steps - first
        lr = learning_rate(step - first, left, min(1.0, recipe.warmup * recipe.steps / left), optimizer.lr, optimizer.decay)
    if still:
        return lr, 0.0
    return lr, lr * optimizer.encoder_lr_factor if transferred else lr
