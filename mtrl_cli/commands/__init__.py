"""The work behind `mtrl train`, `resume`, `eval` and `bench`."""
