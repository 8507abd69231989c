"""What a learned optimizer is trained on: families of small optimization problems, many copies at once.

A task is a class with a few lines:

    class Valley(Task):
        shapes = ((2,),)                                   # of the parameter tensors of one copy

        def instance(self, count, random):                 # optional: what differs between copies
            return {"steepness": random.uniform(count, low=1, high=100)}

        def loss(self, params, data):                      # params: [count, *shape] each -> [count]
            x, y = params[0].unbind(-1)
            return data["steepness"] * (y - x**2) ** 2 + (1 - x) ** 2

`lopt meta-train --tasks my_module:Valley` trains on it too.
"""

from lopt.meta.tasks.base import Data, LogOf, Noisy, Params, Random, Rescaled, Sparse, Sum, Task, try_out

__all__ = ["Data", "LogOf", "Noisy", "Params", "Random", "Rescaled", "Sparse", "Sum", "Task", "try_out"]
