"""Policy replicas: vLLM under Ray Serve."""
