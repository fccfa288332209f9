"""What runs as Ray actors: policy replicas, reference and reward workers, trainer ranks, the weights between them."""
