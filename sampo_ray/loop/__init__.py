"""What the driver does: fleet, rounds and their stages, display. No tensors."""
