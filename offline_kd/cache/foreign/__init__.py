"""Label stores of other programs, ONE FILE PER FORMAT. What is read in them is numbers; nothing of theirs is run."""
