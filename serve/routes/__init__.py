"""What the endpoint answers, route by route."""
