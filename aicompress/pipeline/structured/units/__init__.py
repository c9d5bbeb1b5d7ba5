"""The structural units that can be removed, one file each."""
