"""``python -m actlake.jobs.cli``."""

from actlake.jobs.cli.app import main

if __name__ == "__main__":
    main()
