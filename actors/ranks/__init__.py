"""Training ranks under Ray Train.

`trainer` is the driver's side, `rank` what each process does, `exchange` the actor between them. How a step is computed
belongs to sampo_ray/training. The ranks import weights, transfer, run, data and training; the loop imports the trainer.
"""
