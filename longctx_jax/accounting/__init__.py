"""Bytes and floating-point operations: of models that exist, of programs, and of what would fit."""
