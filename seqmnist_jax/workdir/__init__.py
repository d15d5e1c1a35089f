"""What a run leaves in its folder, and how that is read back whole: config, metrics, checkpoints, provenance.

Knows files and arrays, not how anything is trained. Above `devices`, below `training`.
"""
