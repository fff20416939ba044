"""What happened, and why did it take that long? Values for programs, tables and a progress bar for people."""
