"""A package so that pytest puts the project, not this folder (with its tests/privacy), on the import path."""
