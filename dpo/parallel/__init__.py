"""Mesh, partition, processes, votes: knows no batch and no model."""
