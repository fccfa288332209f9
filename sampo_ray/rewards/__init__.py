"""Reward functions that are ready to use: each module has one, `reward`, which recipes name as
`reward.function: sampo_ray.rewards.MODULE:reward`, with what it is to be told in `reward.arguments`."""
