"""Schedules: rules that make jobs, one at each of their ticks."""
