"""Request bodies: read, checked, bounded."""
