"""What runs as Ray actors: policy replicas, reference and reward workers, trainer ranks, and the weights between them."""
