"""Data augmentation of batches on the device."""
