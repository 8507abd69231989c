"""What `lopt train` runs: data, models, the training loop, checkpoints and plots around any torch optimizer.

command.py     options -> Config, validated before anything is written
arguments.py   values of options, checked where they are parsed; other commands use it too
config.py      everything that decides what a run computes
runs.py        a run and those it is compared with, each in its folder
loop.py        Config -> a trained model, metrics.csv and checkpoint.pt in a run folder
data.py        batches as a pure function of (seed, step), so that resuming needs no sampler state
models.py      models by name
optimizers.py  optimizers by name
schedules.py   schedules of lr by name
precision.py   bf16 and fp16
ema.py         averaged weights
group.py       processes that take decisions together
parallel.py    one model trained by them: DDP and FSDP2
timing.py      where the time of a step goes
metrics.py     the rows of metrics.csv
scalars.py     rows -> TensorBoard
checkpoint.py  atomic files
stop.py        SIGINT and SIGTERM, noted until the step is done
plots.py       metrics.csv -> curves.png
textures.py    `lopt make-images`: a folder of images to try all this on
"""


class TrainError(RuntimeError):
    """A training run cannot start or go on. The message says the thing, the value and the cure."""
