"""`mtrl sweep`: plan, schedule and store trials."""
