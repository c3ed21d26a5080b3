"""What a run would cost on devices that are not here: compiled for them, and read from the program."""
