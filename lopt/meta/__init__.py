"""Meta-training: tasks, unrolls, estimators of the meta-gradient, and the loop that makes meta-parameters of them."""
