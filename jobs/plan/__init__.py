"""What a job takes before it runs: rows, bytes, memory, hours, money, and what limits it."""
