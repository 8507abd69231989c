"""What `lopt train` runs: data, models, the training loop, checkpoints and plots around any torch optimizer.

command.py     options -> Config, validated before anything is written
loop.py        Config -> a trained model, metrics.csv and checkpoint.pt in a run folder
data.py        batches as a pure function of (seed, step), so that resuming needs no sampler state
models.py      models by name
checkpoint.py  atomic files
plots.py       metrics.csv -> curves.png
"""


class TrainError(RuntimeError):
    """A training run cannot start or go on. The message says the thing, the value and the cure."""
