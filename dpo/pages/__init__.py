"""What people look at: reports, comparisons, curves, plots on a terminal, watching a run, chatting."""
