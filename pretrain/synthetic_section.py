"""The report's section on synthetic objects: does the network find what was planted?"""

from collections.abc import Mapping

from resunet.report import Section, curves


def synthetic_section(metrics: Mapping[str, tuple[list[float], list[float]]]) -> Section:
    """Focal + Dice loss and the Dice of what is found, by step."""
    loss, dice = metrics["synthetic_loss"], metrics["synthetic_dice"]
    last = dice[1][-max(1, len(dice[1]) // 10) :]
    told = (
        f"Last loss {loss[1][-1]:.3f}. Of the objects in the last tenth of the logged sets ({len(last)}) the network finds Dice "
        f"{sum(last) / len(last):.3f}; 0 is nothing, 1 all. Some are too faint to be seen: 1 is not to be reached."
    )
    pictures = [
        curves({"Focal + Dice": loss}, "Loss on synthetic objects by step", "step", "loss"),
        curves({"Dice": dice}, "Dice of synthetic objects by step", "step", "Dice", True),
    ]
    return Section("Synthetic objects", text=[told], pictures=pictures)
