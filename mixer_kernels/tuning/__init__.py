"""Tile configurations as data, the targets they are for, and the rules that choose one."""
