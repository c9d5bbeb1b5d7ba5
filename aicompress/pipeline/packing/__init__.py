"""Drivers of pack and unpack: lossless coding of all weight files of a folder, everything else copied."""
