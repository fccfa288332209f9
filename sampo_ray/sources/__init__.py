"""What people bring as data: files and repositories, their records, and the rows that these hold. No tokens, no Ray."""
