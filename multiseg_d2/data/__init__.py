"""From files on disk to batches: specs, registration, reading, augmentation, schedule, loader."""
