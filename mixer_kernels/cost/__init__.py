"""What a block of a Mixer costs, launch by launch, for a GPU that need not exist."""
