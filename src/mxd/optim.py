"""Adam inside the backward pass: each parameter is updated as soon as its gradient is there, and the gradient forgotten.

The numbers are those of an ordinary Adam step after the backward pass, bit for bit; at most one gradient is held at a time instead of
one for every parameter.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor


class AdamInBackward:
    """Fused Adam over `parameters`; ``loss.backward()`` is the step. A gradient never outlives it.

    Set `learning_rate` and, to hold the weights still, `found_inf` (1.0) before the backward pass.
    """

    def __init__(self, parameters: Iterable[Tensor], *, learning_rate: float, factors: Mapping[Tensor, float] | None = None) -> None:
        """
        Args:
            parameters: what to optimise.
            learning_rate: of all of them.
            factors: what it is multiplied by for single parameters; 1 for those that are not named.
        """
        self.learning_rate = learning_rate
        self._factors = dict(factors or {})
        self.found_inf: Tensor | None = None
        """A tensor on the parameters' device: where it is 1, a step changes nothing, and nobody waits to find out."""
        self.holding = False
        """Leave gradients where they are, added up, until `release`."""
        self.moved = False
        """Whether a parameter was updated since this was last set to False."""
        self.adams = {parameter: torch.optim.Adam([parameter], lr=learning_rate, fused=True) for parameter in parameters}
        self._hooks = [parameter.register_post_accumulate_grad_hook(_updater(weakref.ref(self))) for parameter in self.adams]

    def close(self) -> None:
        """Leave the parameters alone from now on."""
        for hook in self._hooks:
            hook.remove()

    def state(self) -> dict[Tensor, dict[str, Tensor]]:
        """What each parameter's Adam has gathered so far; empty for one that was never stepped."""
        return {parameter: dict(adam.state[parameter]) for parameter, adam in self.adams.items()}

    @property
    def has_moments(self) -> bool:
        """Whether every parameter's averages have been allocated."""
        return all(parameter in adam.state for parameter, adam in self.adams.items())

    def release(self) -> None:
        """Update every parameter that holds a gradient."""
        for parameter in self.adams:
            if parameter.grad is not None:
                self.update(parameter)

    def update(self, parameter: Tensor) -> None:
        """One step of `parameter`, whose gradient is then forgotten."""
        adam = self.adams[parameter]
        adam.param_groups[0]["lr"] = self.learning_rate * self._factors.get(parameter, 1.0)
        adam.found_inf = self.found_inf  # pyright: ignore[reportAttributeAccessIssue]
        adam.step()
        self.moved = True
        parameter.grad = None


def _updater(owner: weakref.ref[AdamInBackward]) -> Callable[[Tensor], None]:
    """A hook that does not keep the optimiser alive, which holds the parameter, which holds the hook: circles are freed late."""

    def update(parameter: Tensor) -> None:
        optimiser = owner()
        if optimiser is not None and not optimiser.holding:
            optimiser.update(parameter)

    return update
