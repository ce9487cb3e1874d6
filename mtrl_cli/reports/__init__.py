"""Read runs and write `mtrl report` and `mtrl compare`."""
