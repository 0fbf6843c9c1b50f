"""Pretrained weights in and out, and from one scheme to another."""
