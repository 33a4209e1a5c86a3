"""Reads the folder of a run: its metrics, responses, alarms and versions."""
