"""Who hands out weights, and which versions go live."""
