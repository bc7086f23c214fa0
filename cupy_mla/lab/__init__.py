"""What the commands and benchmarks do: cases, their arrays and files, accuracy, timing."""
