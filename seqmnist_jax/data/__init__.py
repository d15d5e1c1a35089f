"""Data sets, the field's conventions about them, sequence views and batches. Knows no network."""
