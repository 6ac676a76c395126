"""Python's collector of cycles, in the same steps on all ranks: a pause of one is a pause of all."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EVERY_STEPS = 50


@contextmanager
def collecting_by_steps() -> Iterator[Callable[[int], None]]:
    """No collection but where the function that it gives is called after a step, with the step's number.

    The first call leaves what is there by then (modules, networks, tables) out of all later ones, the others look every
    fifty steps.
    """
    was_enabled = gc.isenabled()
    is_first = True

    def after_step(step: int) -> None:
        nonlocal is_first
        if is_first:
            gc.collect()
            gc.freeze()
            is_first = False
        elif step % EVERY_STEPS == 0:
            gc.collect()

    gc.disable()
    try:
        yield after_step
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()
