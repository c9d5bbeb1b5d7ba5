"""Compression methods: one file each under the command they belong to, found by discovery."""

from aicompress.methods.method import Method, MethodConfig
from aicompress.methods.registry import COMMANDS, get, methods

__all__ = ["COMMANDS", "Method", "MethodConfig", "get", "methods"]
