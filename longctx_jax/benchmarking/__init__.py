"""What is measured: a folder a suite, and the rows that it is recorded in."""
