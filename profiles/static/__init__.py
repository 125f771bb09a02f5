"""What the compiler made of every kernel: registers, spills, SASS. Needs no GPU."""
