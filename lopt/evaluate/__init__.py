"""What `lopt evaluate` runs: trained meta-parameters on real data, beside tuned optimizers.

tasks.py       the tasks: data that ship inside scikit-learn, networks of 500 to 10,000 parameters
optimizers.py  who takes part, at which learning rates
training.py    independent trainings in lock-step, and the cache of their results
statistics.py  results -> scores with confidence intervals
report.py      scores -> report.md, results.csv and plots
command.py     options -> suites of trainings
"""
