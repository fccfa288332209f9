"""What is told to users and goes no further: errors that trying again does not mend."""


class ConfigError(ValueError):
    """A configuration that cannot run; the message names field, value and mend."""


class TrainingError(RuntimeError):
    """Training that cannot go on, and would fail again in the same way if it were tried again."""
