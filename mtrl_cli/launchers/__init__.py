"""Where the runs of a sweep are worked on: conf/launcher."""
