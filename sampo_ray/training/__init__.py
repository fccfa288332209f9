"""What makes a train step: losses, reductions, rows, the policy and its learner. No Ray, no files of a run."""
