"""What `lopt evaluate` runs: trained meta-parameters on real data, beside tuned optimizers.

tasks.py       the tasks: data that ship inside scikit-learn, networks of 500 to 10,000 parameters
families.py    networks on digits that differ in activation, width or depth
problems.py    problems of Wichrowska et al. 2017, drawn once
ablations.py   meta-parameters of the other architectures
suites.py      which tasks, steps and settings make up an evaluation
optimizers.py  who takes part, at which learning rates
training.py    independent trainings in lock-step, and the cache of their results
timing.py      time of a training step against the batch size
statistics.py  results -> scores with confidence intervals
report.py      scores -> report.md and results.csv
figures.py     scores -> plots
command.py     options -> suites of trainings
"""
